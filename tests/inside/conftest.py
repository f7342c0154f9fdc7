"""What the tests need that `tests/test_bake.py` copies into a bake, to run there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from django.db import connection
from notes.models import Note
from notes.tests import FORM


@pytest.fixture
def project_environment(transactional_db: None) -> dict[str, str]:
    """Return an environment in which programs of the project use the test's own database."""
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    return {**os.environ, "DATABASE_URL": f"{server}/{connection.settings_dict['NAME']}"}


@pytest.fixture(autouse=True)
def developing(settings) -> None:
    settings.DEBUG = True


@pytest.fixture
def note() -> Note:
    return Note.objects.create(**FORM)


def wait_until(condition: Callable[[], object], seconds: float = 30, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


@contextmanager
def running_worker(log: Path, environment: dict[str, str], *options: str) -> Iterator[Path]:
    """Run a worker through the launcher; it hands back what it runs when the test ends."""
    command = [sys.executable, "-m", "hardened_celery", "worker", "-A", "config"]
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [*command, *options, "-l", "info", "--without-mingle"],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: " ready." in log.read_text(), 60, "the worker is ready")
        yield log
    except BaseException:
        print(f"--- {log.name}\n{log.read_text()}")
        raise
    finally:
        worker.send_signal(signal.SIGQUIT)
        with suppress(subprocess.TimeoutExpired):
            worker.wait(20)
        worker.kill()
