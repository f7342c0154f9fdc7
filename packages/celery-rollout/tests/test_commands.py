"""What is kept of releases: it survives a kill, and shows no secret. Nothing really runs here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rollout import commands, platform, shell, source, systemd
from rollout.__main__ import parse
from rollout.compose import Compose
from rollout.deploy import Deploy
from rollout.shell import RefusedError, StepError

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


class Platform(platform.Platform):
    """Releases in a folder of their own; of their processes only the names are kept."""

    def __init__(self, home: Path, *names: str) -> None:
        super().__init__("app", home, "nobody")
        self.found: list[tuple[str, str]] = []
        home.mkdir()
        (home / "env").write_text("MARK=old\n")
        for name in names:
            folder = self.releases / name / "rollout"
            folder.mkdir(parents=True)
            (folder / "__init__.py").touch()
            (folder / "release.py").write_text(RELEASE)
            (folder.parent / "manage.py").touch()
            self.is_current(name)

    def python(self, release: str, *, tty: bool = False, unit: str = "") -> list[str]:
        return ["env", "-C", str(self.releases / release), sys.executable]

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

    forget_others = install = prepare = wait_for_web = nothing


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
    return commands.rollback(platform, parse(["rollback", *arguments]))


def deploy(platform: Platform, release: str) -> int:
    return commands.deploy(platform, parse(["deploy", "--to", release]))


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
    commands.status(platform)
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
    commands.status(platform)
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
    (platform.releases / "two/rollout/release.py").write_text("raise SystemExit(1)")
    with pytest.raises(RefusedError):
        deploy(platform, "two")
    assert platform.begun() == ("rollback to", "one")


def test_settings_that_reached_a_part_are_told_after_they_are_put_back(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "app", "one")
    to_it = Deploy(platform, "one", 1)
    to_it.replace()
    assert not platform.runs_with_other_settings("one")
    (platform.home / "env").write_text("MARK=new\n")
    to_it.replace(back=True)  # everything runs: nothing has read them
    (platform.home / "env").write_text("MARK=old\n")
    assert not platform.runs_with_other_settings("one")
    (platform.home / "env").write_text("MARK=new\n")
    platform.stop({"worker-low": ["one"]})
    to_it.replace(back=True)
    (platform.home / "env").write_text("MARK=old\n")
    assert platform.runs_with_other_settings("one")
    platform.stop({role: ["one"] for role in ROLES})
    to_it.replace()
    assert not platform.runs_with_other_settings("one")


def test_the_name_that_new_settings_want_is_told_before_anything_is_to_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(tmp_path / "app", "one")
    Deploy(platform, "one", 1).replace()
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
    monkeypatch.setattr(systemd, "UNITS", tmp_path)
    systemd.Systemd("no-such-app", tmp_path, "nobody").close()


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
    with pytest.raises(StepError) as found:
        platform.check_settings()
    assert line.partition("=")[0] in str(found.value)
    assert "hunter" not in str(found.value)


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("PROBES_TOKEN=$hunter2", False),
        ('PROBES_TOKEN="$hunter2"', False),
        ("PROBES_TOKEN=a${hunter2}", False),
        ("PROBES_TOKEN='$hunter2'", True),
        ("# OLD=$hunter2", True),
        ("PROBES_TOKEN=hunter2", True),
    ],
)
def test_what_compose_would_replace_in_a_setting_is_refused(
    tmp_path: Path, line: str, right: bool
) -> None:
    """It made a token empty, and an address that was to be protected answered everybody."""
    (tmp_path / "env").write_text(f"{line}\n")
    compose = Compose("app", tmp_path)
    if right:
        compose.check_settings()
        return
    with pytest.raises(StepError, match=r"PROBES_TOKEN in line 1 of .* single quotes") as found:
        compose.check_settings()
    assert "hunter" not in str(found.value)


def test_of_a_traceback_the_error_is_told_and_no_value() -> None:
    error = "django.db.utils.ProgrammingError: column queue_probes_queue.note does not exist"
    assert shell.reason(POSTGRES) == error
    for value in ("'hunter2'", '"it\'s"', "'a' and 'b'"):
        text = f"Traceback (most recent call last):\n  File\nValueError: Port as {value}\n"
        assert shell.reason(text) == "ValueError: Port as '...'"
    assert shell.reason("Traceback (most recent call last):\n  File\nKeyError\n") == "KeyError"
    assert shell.reason("what was printed\nHINT: as it is") == "what was printed\nHINT: as it is"


def test_the_name_of_units_is_that_of_the_project_unless_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="names no project"):
        source.app_name(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "my-shop"\n')
    assert source.app_name(tmp_path) == "my_shop"
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write('[tool.rollout]\nname = "till"\n')
    assert source.app_name(tmp_path) == "till"


def test_a_dry_run_leaves_what_is_half_way_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = Platform(tmp_path / "app", "one", "two")
    monkeypatch.setattr(Platform, "provide", lambda *_: pytest.fail("it starts servers"))
    platform.begin("rollback to", "one")
    assert commands.deploy(platform, parse(["deploy", "--to", "two", "--dry-run"])) == 0
    assert "would migrate, and replace two" in capsys.readouterr().out
    assert (platform.units(), platform.begun()) == ([], ("rollback to", "one"))


def test_words_of_one_command_are_refused_to_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["deploy", "--home", "/x", "status"]).command == "status"
    assert parse(["deploy", "init", "--compose"]).compose
    for words in (
        ["deploy", "--compose"],
        ["deploy", "--to", "a", "--name", "b"],
        ["deploy", "-x"],
    ):
        with pytest.raises(SystemExit) as ended:
            parse(words)
        assert ended.value.code == 2
    assert "--compose and --user belong to init" in capsys.readouterr().err
