"""Real workers, a real broker and a real database; effects are counted where they are written."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from celery import current_app
from django.db import connection

from durable_jobs.publisher import publisher
from durable_jobs.tests.tasks import TABLE

# Short enough for tests, in the proportions of the defaults.
FAST = {
    "LEASE": 3,
    "HEARTBEAT": 1,
    "TICK": 0.5,
    "REPUBLISH": 3,
    "REPUBLISH_MAX": 6,
    "BACKOFF_MIN": 0.2,
    "BACKOFF_MAX": 1,
}
# No greeting of neighbours: a second of each start.
QUICK = ("--without-mingle", "--without-gossip")


class Worker:
    """A Celery worker process of the tests' application."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        environment = {
            **os.environ,
            "TEST_DATABASE": str(connection.settings_dict["NAME"]),
            "TEST_DURABLE_JOBS": json.dumps(FAST),
        }
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "durable_jobs.tests.worker_app",
            "worker",
        ]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "-l", "info", "-n", f"{log.stem}@test", *QUICK, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait_until_ready(self) -> "Worker":
        wait_until(
            lambda: " ready." in self.log.read_text() or self.process.poll() is not None,
            30,
        )
        assert self.process.poll() is None, self.log.read_text()
        return self

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """End main and children at once, as a lost machine does."""
        children = self.children()
        for process in [self.process, *children]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        psutil.wait_procs(children, 10)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Poll until the condition holds; fail with its source line when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def effects(note: str = "") -> list[str]:
    """Return what tasks wrote, in order."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT note FROM {TABLE} WHERE note LIKE %s ORDER BY id",  # noqa: S608
            [f"{note}%"],
        )
        return [found for (found,) in cursor.fetchall()]


def pids(note: str = "") -> list[int]:
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT pid FROM {TABLE} WHERE note LIKE %s ORDER BY id",  # noqa: S608
            [f"{note}%"],
        )
        return [found for (found,) in cursor.fetchall()]


@pytest.fixture(autouse=True)
def fast(settings: object) -> None:
    settings.DURABLE_JOBS = FAST


@pytest.fixture(autouse=True)
def own_publisher() -> Iterator[None]:
    """A publisher without the memory of other tests' broken brokers."""
    publisher.reset()
    yield
    publisher.flush()


@pytest.fixture(scope="session")
def _table(django_db_setup: None, django_db_blocker: object) -> None:
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute(
            f"CREATE TABLE IF NOT EXISTS {TABLE} (id serial PRIMARY KEY, job text, note text,"
            " pid int, at timestamptz DEFAULT clock_timestamp())"
        )


@pytest.fixture
def jobs_db(transactional_db: None, _table: None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {TABLE}")


@pytest.fixture
def broker() -> Iterator[redis.Redis]:
    """The broker, empty."""
    client = redis.Redis.from_url(current_app.conf.broker_url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def start_worker(jobs_db: None, broker: redis.Redis, tmp_path: Path) -> Iterator[Callable]:
    """Start workers; by default one that works, with two children."""
    started: list[Worker] = []

    def start(name: str = "work", *arguments: str) -> Worker:
        worker = Worker(tmp_path / f"{name}.log", *(arguments or ("-c", "2", "-Q", "default")))
        started.append(worker)
        return worker.wait_until_ready()

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture
def control(start_worker: Callable, tmp_path: Path) -> Worker:
    """The loop: beat and the worker of its queue."""
    return start_worker("control", "-B", "-s", str(tmp_path / "beat"), "-c", "1", "-Q", "control")
