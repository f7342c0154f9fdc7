"""A project that was never baked: `startproject`, Celery, and no package of ours but this one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from devstack.state import birth
from tests.stack import Project

CELERY = """\
import os
from celery import Celery, shared_task

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
app = Celery("shop")

@shared_task(name="greetings.tasks.hello")
def hello():
    return "hello"
"""
SETTINGS = """
import environ
DATABASES = {"default": environ.Env().db("DATABASE_URL")}
"""
# As where hardened-celery and Flower are not installed.
ALONE = """\
import sys
from devstack import __main__, programs
programs.installed = lambda module: False
sys.exit(__main__.main())
"""


@pytest.mark.faults
def test_startproject_with_celery_runs_and_is_restarted_without_hardened_celery(tmp_path: Path):
    source = tmp_path / "shop"
    source.mkdir()
    command = [sys.executable, "-m", "django", "startproject", "shop", str(source)]
    subprocess.run(command, check=True)
    with (source / "shop" / "settings.py").open("a") as file:
        file.write(SETTINGS)
    (source / "shop" / "celery.py").write_text(CELERY)
    (source / "shop" / "__init__.py").write_text("from shop.celery import app as celery_app\n")
    project = Project(tmp_path / "copy", source=source)
    project.devstack = [sys.executable, "-c", ALONE]
    project.queue = "celery"
    project.up()
    try:
        assert project.pids.keys() == {"postgres", "valkey", "web", "worker", "beat"}
        assert re.search(r"Login +admin / \S+", project.text)
        project.run_task()
        before, position = project.pids["worker"], len(project.text)
        subprocess.run(["kill", "-9", str(before)], check=True)
        project.wait_for_output("worker is up again", position)
        project.run_task()
        everything = project.pids.values()
    finally:
        code = project.down()
    assert code == 0
    assert not [pid for pid in everything if birth(pid)]
