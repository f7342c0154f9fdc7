"""Every test that writes jobs: what it did to their rows is recorded, and checked when it ends."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

from tests.history import checker, recorder

seen = {"transitions": 0, "histories": 0}


@pytest.fixture(scope="session")
def _recorder(django_db_setup: None, django_db_blocker: Any) -> None:
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        recorder.install(cursor)


@pytest.fixture(autouse=True)
def history(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], list[checker.Fault]]]:
    """Check all that a test's processes have committed; one that rolls back leaves nothing.

    Returns a function that checks what was done so far. A test marked `unsound` means to do wrong.
    """
    if "transactional_db" not in request.fixturenames or connection.vendor != "postgresql":
        yield list
        return
    request.getfixturevalue("_recorder")
    request.getfixturevalue("transactional_db")
    folder: Path = request.getfixturevalue("tmp_path") / "bodies"
    folder.mkdir()
    monkeypatch.setenv(recorder.BODIES, str(folder))
    with connection.cursor() as cursor:
        start = recorder.last(cursor)

    def checked() -> list[checker.Fault]:
        with connection.cursor() as cursor:
            changes = recorder.changes(cursor, start)
        seen["transitions"] += len(changes)
        seen["histories"] += len({change.job for change in changes})
        return checker.check(changes, recorder.bodies(folder))

    yield checked
    if not request.node.get_closest_marker("unsound") and (faults := checked()):
        pytest.fail("\n".join(map(str, faults[:20])), pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what this process has seen to the one that starts others."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["history"] = seen


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, count in getattr(node, "workeroutput", {}).get("history", {}).items():
        seen[name] += count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    line = f"{seen['transitions']} transitions of {seen['histories']} jobs checked"
    terminalreporter.write_line(line)
