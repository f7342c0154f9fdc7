"""Programs and processes of the tests' project, on the test's own database."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from django.db import connection

import tests.app as app_module
from tests.fast_settings import QUEUE_PROBES

PACKAGE = Path(__file__).resolve().parent.parent
Ask = Callable[..., "subprocess.CompletedProcess[str]"]


def wait_until(condition: Callable[[], Any], seconds: float = 30, what: str = "") -> Any:
    """Poll until the condition holds; return what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


@pytest.fixture
def project_environment(transactional_db: None) -> dict[str, str]:
    """Return an environment in which programs of the project use the test's own database."""
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    return {**os.environ, "DATABASE_URL": f"{server}/{connection.settings_dict['NAME']}"}


@pytest.fixture
def ask() -> Ask:
    """Return a function that asks the project a question, as a deploy asks a release."""

    def asked(
        *question: str, stdin: str = "", **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "rollout.release", *question],
            cwd=PACKAGE,
            env=os.environ | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return asked


class Crew:
    """Processes of the project, of release `r1`, whose probes take seconds."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        own = {"DJANGO_SETTINGS_MODULE": "tests.fast_settings", "RELEASE": "r1"}
        self.environment = environment | own
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def beat(self) -> None:
        self.start("beat", "beat", "-s", str(self.folder / "schedule"), "--pidfile=")

    def worker(self, name: str, queues: str, concurrency: int = 1) -> None:
        quick = ("--without-mingle", "--without-gossip", "-c", str(concurrency))
        self.start(name, "worker", "-n", f"{name}@test", "-Q", queues, *quick)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "celery", "-A", "tests.app", *command, "-l", "info"],
                    cwd=PACKAGE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                )
            )

    def end(self) -> None:
        """Kill them and their children, and wait until all are gone."""
        for process in self.started:
            if process.poll() is None:
                children = psutil.Process(process.pid).children(recursive=True)
                for each in (process, *children):
                    each.kill()
                psutil.wait_procs(children, 10)
            process.wait(10)


@pytest.fixture
def crew(settings: Any, project_environment: dict[str, str], tmp_path: Path) -> Iterator[Crew]:
    settings.QUEUE_PROBES = QUEUE_PROBES
    redis.Redis.from_url(app_module.app.conf.broker_url).flushall()
    crew = Crew(tmp_path, project_environment)
    yield crew
    crew.end()
