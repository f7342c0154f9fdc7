"""What devstack reads of a project, and what it says of values that are wrong."""

import sys
from pathlib import Path

import pytest

from devstack import commands, programs, project
from devstack.console import Console
from devstack.project import Worker
from devstack.state import StackError
from devstack.watch import Watch
from tests.waiting import wait_until

MANAGE = "os.environ.setdefault('DJANGO_SETTINGS_MODULE', 'mysite.settings')"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "")  # so that what a test sets is taken back
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")


def made(folder: Path, toml: str = "", manage: str = MANAGE) -> Path:
    (folder / "pyproject.toml").write_text(toml and f"[tool.devstack]\n{toml}\n")
    if manage:
        (folder / "manage.py").write_text(manage)
    return folder


def test_what_startproject_makes_needs_no_settings_of_ours(tmp_path):
    found = project.find(made(tmp_path))
    assert (found.settings, found.celery) == ("mysite.settings", "mysite")
    assert found.workers == {"worker": Worker()}
    names = [one.name for one in programs.all_programs(found, {"web": "http://127.0.0.1:1234/"})]
    assert names == ["web", "worker", "beat"]


def test_project_is_found_from_a_folder_below_it(tmp_path):
    (tmp_path / "app" / "deep").mkdir(parents=True)
    assert project.find(made(tmp_path) / "app" / "deep").root == tmp_path


def test_pyproject_may_stand_above_the_folder_with_manage(tmp_path):
    made(tmp_path, "celery = 'other'", manage="")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manage.py").write_text(MANAGE)
    found = project.find(tmp_path / "site")
    assert (found.root, found.celery) == (tmp_path / "site", "other")


def test_settings_of_the_environment_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "mysite.settings.local")
    found = project.find(made(tmp_path, "settings = 'mysite.other'"))
    assert (found.settings, found.celery) == ("mysite.settings.local", "mysite")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("web_port = '80'", "web_port must be a number, not '80'"),
        ("web_port = 80000", "web_port must be between 1 and 65535, not 80000"),
        ("flower = 1", "flower must be true or false, not 1"),
        ("wep = 'x'", "a key must be one of beat, broker, celery.*, not 'wep'"),
        ("broker = 'sqs'", "broker must be valkey or rabbitmq, not 'sqs'"),
        ("web = 'gunicorn'", r"web must be a command with \{port\} in it, not 'gunicorn'"),
        ("workers = { a = 3 }", "workers.a must be a table, not 3"),
        ("workers = { a = { queue = 'x' } }", "one of concurrency, queues, not 'workers.a.queue'"),
        ("workers = { a = { concurrency = 0 } }", "workers.a.concurrency must be 1 or more, not 0"),
        ("workers = { beat = {} }", "must be a word that is not taken, not 'beat'"),
        ("programs = { worker = 'ls' }", "must be a word that is not taken, not 'worker'"),
        ("links = { Admin = 1 }", "links.Admin must be text in quotes, not 1"),
        ("broker = ", "pyproject.toml: Invalid value"),
    ],
)
def test_wrong_value_is_refused_in_one_line(tmp_path, toml, said):
    with pytest.raises(StackError, match=said) as caught:
        project.find(made(tmp_path, toml))
    assert "\n" not in str(caught.value)


def test_line_of_env_that_sets_nothing_is_named_and_not_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (made(tmp_path) / ".env").write_text("# ours\nPROBES_TOKEN = s3cret\n")
    with pytest.raises(StackError, match=r"line 2 of .*\.env is not NAME=value$"):
        commands.prepared(project.find(tmp_path), Console())


def test_folder_without_a_project_says_what_is_missing(tmp_path):
    with pytest.raises(StackError, match=r"neither manage.py nor a pyproject.toml with"):
        project.find(tmp_path)
    with pytest.raises(StackError, match="does not say which settings to use: give `settings`"):
        project.find(made(tmp_path, manage="import sys"))


def test_program_that_is_not_here_is_named_with_its_setting(tmp_path):
    found = project.find(made(tmp_path, "web = 'nothing-like-it {port}'"))
    with pytest.raises(StackError, match=r"nothing-like-it: no such program; .* web names it"):
        programs.all_programs(found, {"web": "http://127.0.0.1:1234/"})


@pytest.mark.parametrize("hardened", [True, False])
def test_worker_runs_below_the_launcher_where_it_is_installed(tmp_path, monkeypatch, hardened):
    monkeypatch.setattr(programs, "installed", lambda module: hardened)
    found = project.find(made(tmp_path, "workers = { slow = { queues = 'a,b', concurrency = 5 } }"))
    _, worker, _ = programs.all_programs(found, {"web": "http://127.0.0.1:1234/"})
    launcher = ["hardened_celery", "worker", "-A", "mysite"]
    plain = ["celery", "-q", "-A", "mysite", "worker"]
    wanted = [sys.executable, "-m", *(launcher if hardened else plain)]
    assert worker.command[: len(wanted)] == wanted
    assert worker.name == "slow"
    assert worker.command[(at := worker.command.index("-Q")) : at + 2] == ["-Q", "a,b"]


def test_watch_tells_what_changed_of_the_persons_source_only(tmp_path):
    for folder in ("app/templates", "tests", ".hidden", "venv", "node_modules"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    source = {"app/models.py", "app/templates/page.html", "later/__init__.py"}
    others = {"app/notes.txt", "app/tests.py", "app/.#draft.py", "tests/a.py", ".hidden/a.py"}
    others |= {"venv/a.py", "node_modules/a.py", "app/test_models.py"}
    (tmp_path / "app" / "gone.py").touch()
    watch, seen = Watch(tmp_path), set()
    (tmp_path / "later").mkdir()
    for name in source | others:
        (tmp_path / name).touch()
    (tmp_path / "app" / "gone.py").unlink()
    wait_until(lambda: seen.update(watch.changes()) or len(seen) >= 4)
    assert seen == source | {"app/gone.py"}
    (tmp_path / "app" / "models.py").write_text("changed")
    assert wait_until(watch.changes) == {"app/models.py"}
