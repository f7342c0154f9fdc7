"""`python -m rollout.lint` says what to write instead, of what is on main, without a database."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """\
SECRET_KEY = "x"
INSTALLED_APPS = ["django_migration_linter", "shop"]
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": "x", "HOST": "127.0.0.1", "PORT": "1",
}}
"""
MIGRATION = """\
from django.db import migrations as do, models
from django_migration_linter import IgnoreMigration


class Migration(do.Migration):
    initial = {initial}
    dependencies = {dependencies}
    operations = [{operations}]
"""
FIRST = """do.CreateModel("Item", [
    ("id", models.BigAutoField(primary_key=True)), ("name", models.CharField(max_length=9)),
    ("size", models.IntegerField()),
], options={"unique_together": {("name", "size")}})"""
ADDED = 'do.AddField("item", "color", models.TextField({}))'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "settings.py").write_text(SETTINGS)
    folder = tmp_path / "shop/migrations"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    first = MIGRATION.format(initial=True, dependencies=[], operations=FIRST)
    (folder / "0001_initial.py").write_text(first)
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    return tmp_path


def git(project: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=project, check=True, capture_output=True)


def judge(project: Path, ci: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "rollout.lint"],
        cwd=project,
        env=os.environ | {"DJANGO_SETTINGS_MODULE": "settings", "CI": ci},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done


def lint(project: Path, operations: str, branch: str = "main") -> tuple[int, list[str]]:
    """Commit a second migration to a branch; return the exit code, and what is said."""
    second = MIGRATION.format(
        initial=False, dependencies=[("shop", "0001_initial")], operations=operations
    )
    if branch != "main":
        git(project, "add", "--all")
        git(project, "commit", "--quiet", "--message=first")
        git(project, "checkout", "--quiet", "-b", branch)
    (project / "shop/migrations/0002_second.py").write_text(second)
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message=second")
    done = judge(project)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("operations", "advice"),
    [
        (ADDED.format('default=""'), 'db_default=""'),
        ('do.RemoveField("item", "size")', "deploy code that does not name it"),
        ('do.DeleteModel("Item")', "deploy code without it"),
        ('do.RenameField("item", "size", "width")', 'db_column="…"'),
        ('do.RenameModel("Item", "Thing")', 'db_table = "…"'),
        ('do.AlterField("item", "size", models.TextField())', "add a field, fill it"),
    ],
)
def test_a_migration_that_breaks_what_runs_is_named_with_what_to_write(
    project: Path, operations: str, advice: str
) -> None:
    code, said = lint(project, operations)
    assert code == 1
    assert said[0].startswith("shop 0002_second: ")
    assert advice in said[0]
    assert "IgnoreMigration()" in said[-1]


@pytest.mark.parametrize(
    "operations",
    [
        ADDED.format('db_default=""'),
        ADDED.format("null=True"),
        f"IgnoreMigration(), {ADDED.format('default=1')}",
        # looks for the name of a constraint in the database: for the guard to judge
        'do.AlterUniqueTogether("item", set())',
    ],
)
def test_others_are_not(project: Path, operations: str) -> None:
    assert lint(project, operations) == (0, [])


def test_a_migration_that_is_not_on_main_yet_may_change_at_will(project: Path) -> None:
    assert lint(project, 'do.RemoveField("item", "size")', branch="work") == (0, [])
    git(project, "checkout", "--quiet", "main")
    git(project, "merge", "--quiet", "work")
    code, _ = lint(project, 'do.RemoveField("item", "name")')
    assert code == 1


def test_ci_judges_what_a_pull_request_adds_in_a_shallow_checkout_without_main(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert lint(project, ADDED.format('default=""'), branch="work") == (0, [])
    checkout = tmp_path_factory.mktemp("checkout")
    git(checkout, "init", "--quiet", "--initial-branch=none")
    git(checkout, "fetch", "--quiet", "--depth=1", project.as_uri(), "work")
    git(checkout, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    done = judge(checkout, ci="true")
    assert done.returncode == 1
    assert done.stdout.startswith("shop 0002_second: ")
    unknown = judge(checkout)
    assert (unknown.returncode, unknown.stdout) == (0, "")
    assert unknown.stderr == "no migration was looked at: git knows no main branch here\n"
