"""The wheels, where the source is not: in a project that was never baked, and in a bake."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PACKAGES, run
from tests.newcomer import Newcomer, wait_until

TASKS = """
import time
from celery import shared_task
from shop.models import Effect

@shared_task(atomic=True)
def write(name, seconds=0):
    Effect.objects.create(name=name)
    time.sleep(seconds)
"""
MODELS = """
from django.db import models

class Effect(models.Model):
    name = models.CharField(max_length=40)
"""
# Short enough for a test; the READMEs' blocks come before it.
FAST = """
DURABLE_JOBS = {"LEASE": 3, "HEARTBEAT": 1, "TICK": 0.5, "REPUBLISH": 3}
CELERY_BEAT_SCHEDULE["durable_jobs.reconcile"]["schedule"] = 0.5
"""
PRODUCTION = ("sync", "--quiet", "--no-dev", "--no-editable")
MARK = "# a line that was not there before\n"


@pytest.fixture
def newcomer(tmp_path: Path, uv: str, dist: Path, servers: dict[str, str]) -> Iterator[Newcomer]:
    project = Newcomer(tmp_path / "project", uv, dist, servers)
    yield project
    project.close()


@pytest.fixture
def project(tmp_path: Path, plain_bake: Path) -> Path:
    return Path(shutil.copytree(plain_bake, tmp_path / "my_project", symlinks=True))


@pytest.mark.faults
def test_the_readmes_make_a_fresh_project_that_survives_a_killed_worker(
    newcomer: Newcomer,
) -> None:
    newcomer.append("shop/models.py", MODELS)
    newcomer.run("python manage.py makemigrations -v 0 shop && python manage.py migrate -v 0")
    processes = newcomer.follow("durable-jobs")
    newcomer.append("mysite/settings.py", FAST)
    newcomer.append("shop/tasks.py", TASKS)
    newcomer.follow("queue-probes")
    newcomer.follow("hardened-celery")
    newcomer.run("python manage.py migrate -v 0 && python manage.py check")
    installed = newcomer.run("pip freeze")
    for package in ("durable-jobs", "queue-probes", "hardened-celery"):
        assert f"{package} @ file://" in installed
    assert "No changes" in newcomer.run("python manage.py makemigrations --check --dry-run")
    worker, _ = (newcomer.start(line) for line in processes)
    slow = "SELECT state, attempts FROM durable_jobs_job WHERE args::text LIKE '%slow%'"
    newcomer.shell("from shop.tasks import write; write.delay('slow', 2); write.delay('quick')")
    wait_until("a run of the slow job", lambda: newcomer.rows(slow) == [("running", 1)])
    newcomer.kill(worker)
    # The fault took effect: nobody runs it, and nothing was written.
    assert newcomer.rows(slow) == [("running", 1)]
    effects = "SELECT name FROM shop_effect ORDER BY name"
    assert ("slow",) not in newcomer.rows(effects)
    newcomer.start(processes[0])
    wait_until("another run", lambda: newcomer.rows(slow) == [("succeeded", 2)])
    assert newcomer.rows(effects) == [("quick",), ("slow",)]


def test_launcher_and_deploy_are_commands_of_their_wheels(newcomer: Newcomer) -> None:
    newcomer.run("pip install ./packages/hardened-celery ./packages/celery-rollout")
    for name in ("hardened-celery", "rollout"):
        for command in (name, f"python -m {name.replace('-', '_')}"):
            assert f"{name} " in newcomer.run(f"{command} --help")


def test_devstack_runs_a_fresh_project_on_services_of_its_own(newcomer: Newcomer) -> None:
    newcomer.follow("django-devstack")
    newcomer.append("shop/models.py", MODELS)
    newcomer.run("python manage.py makemigrations -v 0 shop")
    said = newcomer.run(
        "devstack run -- python -c 'import os; print(os.environ[\"DATABASE_URL\"])'"
    )
    assert re.search(r"^postgres\w*://", said, re.MULTILINE)


def test_a_changed_line_of_an_engine_arrives_though_the_cache_is_warm(
    project: Path, uv: str
) -> None:
    """Without `cache-keys` over `src/**` the engine that was built before is installed again."""
    run(uv, *PRODUCTION, cwd=project)
    installed = ".venv/lib/python*/site-packages"
    for package, module in PACKAGES.items():
        changed = project / "packages" / package / "src" / module / "__init__.py"
        changed.write_text(changed.read_text() + MARK)
    run(uv, *PRODUCTION, cwd=project)
    for module in PACKAGES.values():
        for file in project.glob(f"{installed}/{module}/__init__.py"):
            assert file.read_text().endswith(MARK), module
    # Also in a new environment, as the image's build makes one beside a cache of its own.
    shutil.rmtree(project / ".venv")
    new = project / "packages/durable-jobs/src/durable_jobs/brand_new.py"
    new.write_text(MARK)
    run(uv, *PRODUCTION, "--frozen", cwd=project)
    (found,) = project.glob(f"{installed}/durable_jobs")
    assert (found / "brand_new.py").read_text() == MARK
    assert (found / "__init__.py").read_text().endswith(MARK)


@pytest.mark.parametrize("package", ["queue-probes", "durable-jobs"])
def test_a_wheel_takes_the_place_of_a_folder(
    project: Path, uv: str, dist: Path, servers: dict[str, str], package: str
) -> None:
    """One line of pyproject.toml, one deleted folder, and the project runs as before."""
    (wheel,) = dist.glob(f"{package.replace('-', '_')}-*.whl")
    settings = project / "pyproject.toml"
    before = settings.read_text()
    line = f"{package} = {{ workspace = true }}\n"
    assert before.count(line) == 1
    settings.write_text(before.replace(line, f'{package} = {{ path = "{wheel}" }}\n'))
    shutil.rmtree(project / "packages" / package)
    run("make", ".venv/.installed", cwd=project)
    run(uv, "sync", "--quiet", "--locked", cwd=project)
    where = f"import {PACKAGES[package]} as it; print(it.__file__)"
    assert "site-packages" in run(".venv/bin/python", "-c", where, cwd=project)
    manage = ("make", "-s", ".venv/.installed")
    run(*manage, cwd=project)
    run(".venv/bin/python", "manage.py", "check", cwd=project, DJANGO_DEBUG="1", **servers)
    # The project's own test of a durable task, in its own words.
    (project / "tests" / "test_swapped.py").write_text(SWAPPED)
    ends = run("make", "test", "ARGS=tests/test_swapped.py -q", cwd=project)
    assert "1 passed" in ends


SWAPPED = """
import pytest
from celery import shared_task
from durable_jobs import Job
from durable_jobs.testing import drain

DONE = []


@shared_task(name="swapped")
def swapped(word):
    DONE.append(word)


@pytest.mark.django_db(transaction=True)
def test_a_task_runs():
    swapped.delay("yes")
    drain()
    assert DONE == ["yes"]
    assert Job.objects.get().state == Job.State.SUCCEEDED
"""
