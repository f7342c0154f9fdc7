"""A bake passes its own checks and tests under each answer that matters, and so does an own app."""

import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import environment, python_for, run

BROKERS = {
    "valkey": "redis://:password@127.0.0.1:1/0",
    "rabbitmq": "amqp://u:password@127.0.0.1:1//",
}
COMBINATIONS = [
    {"django_version": django, "broker": broker, "example_app": example}
    for django, broker, example in product(("5.2", "6.1"), BROKERS, (True, False))
]
PRODUCTION = {
    "DATABASE_URL": "postgres://u:p@127.0.0.1:1/n",
    "DJANGO_SECRET_KEY": "k" * 20 + "".join(map(chr, range(33, 90))),
    "DJANGO_ALLOWED_HOSTS": "example.com",
    "DJANGO_DEBUG": "0",
}
Bake = Callable[..., Path]


def interpreter(django: str) -> dict[str, str]:
    """Return the environment that makes the project use a Python its Django runs on."""
    found = python_for((3, 12) if django == "6.1" else (3, 11))
    if found is None:
        pytest.skip(f"no Python on this machine runs Django {django}")
    return {"UV_PYTHON": found}


def commit(project: Path, branch: str = "main") -> None:
    """Commit everything on a branch of the project's own repository."""
    if not (project / ".git").exists():
        run("git", "init", "--quiet", "--initial-branch=main", cwd=project)
    if branch != "main":
        run("git", "checkout", "--quiet", "-b", branch, cwd=project)
    who = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    run("git", "add", "--all", cwd=project)
    run("git", *who, "commit", "--quiet", "--message=all", cwd=project)


def refused(project: Path, *command: str, **more: str) -> str:
    """Run a command that must fail; return what it said."""
    env = environment(**more)
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


@pytest.mark.parametrize("answers", COMBINATIONS, ids=lambda a: "-".join(map(str, a.values())))
def test_baked_project_is_clean(bake: Bake, answers: dict[str, object]) -> None:
    project = bake(**answers)
    commit(project)
    run("make", "lint", cwd=project, **interpreter(str(answers["django_version"])))
    manage = (".venv/bin/python", "-W", "error", "manage.py")
    production = PRODUCTION | {"CELERY_BROKER_URL": BROKERS[str(answers["broker"])]}
    for which in (["--deploy"], ["--tag", "celery"]):
        run(*manage, "check", *which, "--fail-level", "WARNING", cwd=project, **production)


# Together they have every answer that reaches the code.
SUITES = [
    {"django_version": "5.2"},
    {"django_version": "6.1", "example_app": False, "broker": "rabbitmq"},
]


@pytest.mark.parametrize("answers", SUITES, ids=lambda a: "-".join(map(str, a.values())))
def test_baked_project_passes_its_own_tests(bake: Bake, answers: dict[str, object]) -> None:
    project = bake(**answers)
    python = interpreter(str(answers["django_version"]))
    strict = "-W error -W 'ignore:No directory at:UserWarning'"
    run("make", "test", cwd=project, ARGS=strict, timeout=300, **python)


def test_example_stands_outages_and_odd_input(bake: Bake) -> None:
    """What would be too much for a person to own, run where it belongs: in a bake."""
    project = bake()
    shutil.copytree(Path(__file__).with_name("inside"), project / "inside")
    run("make", "test", cwd=project, ARGS="inside", timeout=300)


PLAIN = {
    "models.py": """\
from django.db import models

# Create your models here.


class Item(models.Model):
    name = models.CharField(max_length=50)
""",
    "views.py": """\
from django.http import HttpResponse
from django.shortcuts import render

from shop.models import Item


def hello(request, name):
    item, created = Item.objects.get_or_create(name=name)
    return HttpResponse('hello %s' % item.name)
""",
    "tests.py": """\
from django.test import TestCase

from shop.models import Item


class ItemTests(TestCase):
    def test_name(self):
        Item.objects.create(name='x')
        self.assertEqual(Item.objects.count(), 1)
""",
    "test_more.py": """\
def test_sum():
    assert 1 + 1 == 2
""",
}


def add_app(project: Path) -> None:
    """Do what a person does first: `startapp`, and a line in the settings."""
    run("make", ".venv/.installed", cwd=project)
    run(".venv/bin/python", "manage.py", "startapp", "shop", cwd=project)
    settings = project / "config/settings.py"
    apps = '    "accounts",\n'
    settings.write_text(settings.read_text().replace(apps, apps + '    "shop",\n', 1))


def test_own_app_is_tested_and_linted_as_plain_django_is_written(bake: Bake) -> None:
    project = bake()
    add_app(project)
    run("make", "lint", cwd=project)  # as `startapp` left it
    for name, text in PLAIN.items():
        (project / "shop" / name).write_text(text)
    run("make", "migrations", cwd=project)
    assert (project / "shop/migrations/0001_initial.py").exists()
    run("make", "lint", cwd=project)
    assert "2 passed" in run("make", "test", ARGS="shop", cwd=project)


def test_lint_says_what_to_write_in_a_migration_once_it_is_on_main(bake: Bake) -> None:
    project = bake()
    add_app(project)
    models = project / "shop/models.py"
    models.write_text(PLAIN["models.py"])
    run("make", "migrations", cwd=project)
    commit(project)
    models.write_text(models.read_text() + '    color = models.TextField(default="")\n')
    run("make", "migrations", cwd=project)
    commit(project, "new-field")
    run("make", "lint", cwd=project)
    assert "shop 0002_item_color: " in refused(project, "make", "lint", CI="true")
    run("git", "checkout", "--quiet", "main", cwd=project)
    run("git", "merge", "--quiet", "new-field", cwd=project)
    said = refused(project, "make", "lint")
    assert re.search(r'^shop 0002_item_color: .*db_default=""', said, re.M), said
    (migration,) = (project / "shop/migrations").glob("0002*.py")
    migration.write_text(migration.read_text().replace("default='", "db_default='"))
    run("make", "lint", cwd=project)


def test_fix_mends_what_lint_finds(bake: Bake) -> None:
    project = bake(example_app=False)
    urls = project / "config/urls.py"
    good = urls.read_text()
    urls.write_text(good.replace("from django", "import os\nfrom   django", 1))
    assert "`make fix` mends" in refused(project, "make", "lint")
    run("make", "fix", cwd=project)
    assert urls.read_text() == good
    run("make", "lint", cwd=project)


def test_python_that_was_answered_is_used_or_a_line_says_why_not(bake: Bake) -> None:
    project = bake(python_version="3.14")
    said = run("make", ".venv/.installed", cwd=project)
    used = run(".venv/bin/python", "--version", cwd=project)
    assert used.startswith("Python 3.14.") != ("Python 3.14 is not on this machine" in said)
    shutil.rmtree(project / ".venv")
    older = interpreter("5.2")
    assert "is not on this machine" not in run("make", ".venv/.installed", cwd=project, **older)


IMPORTS = """\
from celery import shared_task
from django.db import models, transaction
from django.http import HttpResponse
from django.test import TestCase
from durable_jobs.testing import drain
"""


def test_readme_leads_to_a_first_task_and_its_test(bake: Bake) -> None:
    project = bake(example_app=False)
    add_app(project)
    section = (project / "README.md").read_text().split("## Your first task")[1]
    code = "\n".join(line[4:] for line in section.splitlines() if not line or line[:4] == "    ")
    pieces = re.findall(r"(?ms)^\S[^\n]*# shop/(\w+\.py)[^\n]*\n.*?(?=\n\n)", code)
    assert pieces == ["models.py", "tasks.py", "views.py", "tests.py"]
    for name, piece in zip(pieces, re.split(r"\n{2,}", code.strip()), strict=False):
        own = "".join(
            f"from shop.{module} import {what}\n"
            for module, what in (("models", "Order"), ("tasks", "charge"))
            if name != f"{module}.py" and what in piece
        )
        (project / "shop" / name).write_text(f"{IMPORTS}{own}\n\n{piece}\n")
    urls = project / "config/urls.py"
    path = "urlpatterns = [\n"
    text = urls.read_text().replace(path, path + '    path("buy/", buy),\n')
    urls.write_text(text.replace("\n\nurl", "\nfrom shop.views import buy\n\nurl", 1))
    run("make", "migrations", cwd=project)
    assert "1 passed" in run("make", "test", ARGS="shop", cwd=project)


def test_updates_of_dependencies_leave_the_engines_alone(bake: Bake) -> None:
    project = bake()
    text = (project / ".github/dependabot.yml").read_text()
    for ecosystem in ("uv", "docker", "github-actions"):
        assert f"package-ecosystem: {ecosystem}\n" in text
    engines = {path.name for path in (project / "packages").iterdir()}
    assert engines <= set(re.findall(r"dependency-name: (\S+)", text))
