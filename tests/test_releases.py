"""What the deploy scripts keep of releases: it survives a kill, and shows no secret."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TEMPLATE

sys.path.append(str(TEMPLATE / "{{cookiecutter.project_slug}}/deploy"))
import on_systemd
import releases
from change import Deploy
from source import RefusedError

import rollout

ROLES = ["beat", "web", "worker-low"]
# What a release answers when it is asked; its tasks are the only thing that matters here.
RELEASE = 'import sys\nif sys.argv[1] == "tasks":\n    print(\'{"tasks": {}, "queues": []}\')\n'
POSTGRES = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
psycopg.errors.UndefinedColumn: column queue_probes_queue.note does not exist
LINE 1: SELECT 1

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in <module>
    raise dj_exc_value.with_traceback(traceback) from exc_value
django.db.utils.ProgrammingError: column queue_probes_queue.note does not exist
LINE 1: SELECT "queue_probes_queue"."note" FROM "queue_probes_queue"
               ^
DETAIL: Failing row contains (1, a customer's name).
HINT:  Perhaps you meant to reference the column "queue_probes_queue.name".
"""


class Platform(releases.Releases):
    """Releases in a folder of their own; of their processes only the names are kept."""

    def __init__(self, home: Path, *names: str) -> None:
        super().__init__("app", home, "nobody")
        self.found: list[tuple[str, str]] = []
        home.mkdir()
        (home / "env").write_text("MARK=old\n")
        for name in names:
            folder = self.releases / name / "deploy"
            folder.mkdir(parents=True)
            (folder / "release.py").write_text(RELEASE)
            (folder.parent / "manage.py").touch()
            self.is_current(name)

    def inside(self, release: str, *command: str, stdin: str = "", alone: bool = False) -> str:
        return releases.run(sys.executable, *command, cwd=self.releases / release, input=stdin)

    def roles(self, release: str | None = None) -> list[str]:
        return ROLES

    def units(self) -> list[tuple[str, str]]:
        return self.found

    def start(self, release: str, *roles: str) -> None:
        self.found += [(role, release) for role in roles if (role, release) not in self.found]

    def stop(self, others: dict[str, list[str]]) -> None:
        self.found = [unit for unit in self.found if unit[1] not in others.get(unit[0], ())]

    def ailing(self, release: str) -> list[str]:
        return []

    def last_words(self, release: str) -> str:
        return ""

    def nothing(self, *_: Any) -> Any:
        """Do nothing: no server has to be prepared."""

    attended = forget_others = install = prepare = provide = wait_for_web = nothing


def kill(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, when: Callable[..., bool]) -> Any:
    """Have a method end the script where `when` is true of its arguments, once."""
    real = getattr(owner, name)

    def method(*arguments: Any, **more: Any) -> Any:
        if when(*arguments):
            monkeypatch.setattr(owner, name, real)
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, method)


def roll_back(platform: Platform, *arguments: str) -> int:
    return rollout.rollback(platform, rollout.parse(["rollback", *arguments]))


def deploy(platform: Platform, release: str) -> int:
    return rollout.deploy(platform, rollout.parse(["deploy", "--to", release]))


def test_a_kill_between_any_two_writes_forgets_no_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        platform = Platform(tmp_path / str(number), "one", "two")
        (platform.releases / "three").mkdir()
        writes = iter(range(9))
        kill(monkeypatch, Path, "rename", lambda *_, n=number, w=writes: next(w) == n)
        try:
            platform.is_current("three")
        except KeyboardInterrupt:
            assert (platform.current(), platform.previous()) == ("two", "one")
        else:
            assert (platform.current(), platform.previous()) == ("three", "two")
        platform.is_current("three")
        assert (platform.current(), platform.previous()) == ("three", "two")
        monkeypatch.undo()


@pytest.mark.parametrize("step", ["is_current", "prepare"])
def test_a_rollback_that_was_killed_goes_on_to_its_release(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
) -> None:
    platform = Platform(tmp_path / "app", "one", "two", "three")
    platform.start("three", *ROLES)
    kill(monkeypatch, Platform, step, lambda *_: True)
    with pytest.raises(KeyboardInterrupt):
        roll_back(platform, "--to", "one")
    rollout.status(platform)
    assert "half-way: the rollback to one; repeat it, or deploy" in capsys.readouterr().out
    assert roll_back(platform) == 0
    assert platform.current() == "one"
    assert set(platform.units()) == {(role, "one") for role in [*ROLES, "reconcile"]}
    assert platform.begun() == ("", "")
    with pytest.raises(RefusedError, match="no release is known to have run before one"):
        roll_back(platform)


def test_a_deploy_that_was_killed_is_undone_and_the_release_before_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    platform = Platform(tmp_path / "app", "three", "one", "two")
    platform.start("two", *ROLES)
    kill(monkeypatch, Platform, "is_current", lambda *_: True)
    with pytest.raises(KeyboardInterrupt):
        deploy(platform, "three")
    rollout.status(platform)
    assert "half-way: the deploy of three; repeat it, or roll back" in capsys.readouterr().out
    assert roll_back(platform) == 0
    assert roll_back(platform, "--to", "two") == 0  # it runs: nothing to do
    assert (platform.current(), platform.previous()) == ("two", "one")
    assert roll_back(platform) == 0
    assert platform.current() == "one"


def test_a_refused_deploy_leaves_a_rollback_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(tmp_path / "app", "one", "two")
    platform.begin("rollback to", "one")
    (platform.releases / "two/deploy/release.py").write_text("raise SystemExit(1)")
    with pytest.raises(RefusedError):
        deploy(platform, "two")
    assert platform.begun() == ("rollback to", "one")


def test_settings_that_reached_a_part_are_told_after_they_are_put_back(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "app", "one")
    change = Deploy(platform, "one", 1)
    change.change_over()
    assert not platform.runs_with_other_settings("one")
    (platform.home / "env").write_text("MARK=new\n")
    change.change_over(back=True)  # everything runs: nothing has read them
    (platform.home / "env").write_text("MARK=old\n")
    assert not platform.runs_with_other_settings("one")
    (platform.home / "env").write_text("MARK=new\n")
    platform.stop({"worker-low": ["one"]})
    change.change_over(back=True)
    (platform.home / "env").write_text("MARK=old\n")
    assert platform.runs_with_other_settings("one")
    platform.stop({role: ["one"] for role in ROLES})
    change.change_over()
    assert not platform.runs_with_other_settings("one")


def test_the_name_that_new_settings_want_is_told_before_anything_is_to_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(tmp_path / "app", "one")
    Deploy(platform, "one", 1).change_over()
    (platform.home / "env").write_text("MARK=new\nno setting\n")
    with pytest.raises(RefusedError, match="--name one-2"):
        deploy(platform, "one")


def test_what_is_half_written_is_asked_for_again(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "app", "one")
    for left in ("", '{"tasks": {'):
        (platform.releases / "one/.tasks").write_text(left)
        assert json.loads(Deploy(platform, "one", 1).tasks("one"))["tasks"] == {}


def test_a_first_deploy_ends_before_it_has_installed_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_systemd, "UNITS", tmp_path)
    on_systemd.Systemd("no-such-app", tmp_path, "nobody").close()


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("CELERY_BROKER_URL=redis://:hunter2/secret@127.0.0.1:6379/0", False),
        ("DATABASE_URL=postgres://app:hunter2#secret@127.0.0.1:5432/app", False),
        ("EMAIL_URL='smtp://app:hunter2?secret@127.0.0.1:25'", False),
        ("CACHE_URL=redis://:hunter2[secret@127.0.0.1", False),
        ("CELERY_BROKER_URL=redis://:hunter2%2Fsecret@127.0.0.1:6379/0", True),
        ("CELERY_BROKER_URL=amqp://a:b@one:5672//;amqp://a:b@two:5672//", True),
        ("CELERY_BROKER_URL=sentinel://one:26379;sentinel://two:26379", True),
        ("CACHE_URL=memcache://one:11211,two:11211", True),
        ("DATABASE_URL=sqlite:////srv/a@b/c", True),
        ("EMAIL_URL=", True),
        ("# OLD_URL=redis://:hunter2/secret@127.0.0.1", True),
    ],
)
def test_a_setting_that_is_no_url_is_named_and_not_shown(
    tmp_path: Path, line: str, right: bool
) -> None:
    platform = Platform(tmp_path / "app")
    (platform.home / "env").write_text(line)
    if right:
        platform.check_settings()
        return
    with pytest.raises(releases.StepError) as found:
        platform.check_settings()
    assert line.partition("=")[0] in str(found.value)
    assert "hunter" not in str(found.value)


def test_of_a_traceback_the_error_is_told_and_no_value() -> None:
    error = "django.db.utils.ProgrammingError: column queue_probes_queue.note does not exist"
    assert releases.reason(POSTGRES) == error
    for value in ("'hunter2'", '"it\'s"', "'a' and 'b'"):
        text = f"Traceback (most recent call last):\n  File\nValueError: Port as {value}\n"
        assert releases.reason(text) == "ValueError: Port as '...'"
    assert releases.reason("Traceback (most recent call last):\n  File\nKeyError\n") == "KeyError"
    assert releases.reason("what was printed\nHINT: as it is") == "what was printed\nHINT: as it is"
