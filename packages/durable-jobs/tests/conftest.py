"""Real workers, a real broker and a real database; effects are counted where they are written."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import current_app
from django.db import connection, transaction

from durable_jobs.publisher import publisher
from tests.history.plugin import (  # noqa: F401 - pytest finds them here
    _recorder,
    history,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.tasks import CREATE_TABLE, TABLE

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
            "tests.worker_app",
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
        end([self.process])

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


@pytest.fixture
def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def project_environment(transactional_db: None) -> dict[str, str]:
    """Return an environment in which programs of the project use the test's own database."""
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    return {**os.environ, "DATABASE_URL": f"{server}/{connection.settings_dict['NAME']}"}


@pytest.fixture(autouse=True)
def fast(settings: object) -> None:
    settings.DURABLE_JOBS = FAST


@pytest.fixture(autouse=True)
def own_publisher() -> Iterator[None]:
    """A publisher without the memory of other tests' broken brokers."""
    publisher.reset()
    yield
    publisher.flush()
    publisher._disconnect()  # a socket of RabbitMQ's client says when it is left open


@pytest.fixture(scope="session")
def _table(django_db_setup: None, django_db_blocker: object) -> None:
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute(CREATE_TABLE)


@pytest.fixture
def jobs_db(transactional_db: None, _table: None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {TABLE}")


@pytest.fixture
def broker() -> Iterator[redis.Redis | None]:
    """The broker, empty; tests that look into it do so on Redis or Valkey only."""
    if not current_app.conf.broker_url.startswith("redis"):
        with current_app.connection_for_write() as connected:
            for queue in current_app.amqp.queues.values():
                bound = queue(connected.default_channel)
                bound.declare()
                bound.purge()
        yield None
        return
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
    end([worker.process for worker in started])


@pytest.fixture
def control(start_worker: Callable, tmp_path: Path) -> Worker:
    """The loop: beat and the worker of its queue."""
    return start_worker("control", "-B", "-s", str(tmp_path / "beat"), "-c", "1", "-Q", "control")


class Loop:
    """`manage.py reconcile --loop` on the tests' database, as a process of its own."""

    def __init__(self, log: Path, interval: float = 0.2, seconds: float = 3600) -> None:
        self.log = log
        script = (
            "from tests.worker_app import app; app.set_default();"
            "from django.core.management import call_command;"
            f"call_command('reconcile', loop=True, interval={interval}, seconds={seconds})"
        )
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "TEST_DATABASE": str(connection.settings_dict["NAME"]),
            "TEST_DURABLE_JOBS": json.dumps(FAST),
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )


@pytest.fixture
def start_loop(jobs_db: None, tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    """Start loops that need neither beat nor broker."""
    started: list[Loop] = []

    def start(name: str = "loop", **how: float) -> Loop:
        started.append(Loop(tmp_path / f"{name}.log", **how))
        return started[-1]

    yield start
    end([loop.process for loop in started])


@pytest.fixture
def crew(jobs_db: None, broker: redis.Redis, tmp_path: Path) -> Iterator[Callable]:
    """Start several workers at once: name="arguments"; all are killed at the end.

    `do_all=EVERYTHING` is one worker that is beat, loop and two children for jobs.
    """
    started: list[Worker] = []

    def start(**wanted: str) -> list[Worker]:
        new = [
            Worker(tmp_path / f"{name}.log", *words.format(folder=tmp_path).split())
            for name, words in wanted.items()
        ]
        started.extend(new)
        return [worker.wait_until_ready() for worker in new]

    yield start
    end([worker.process for worker in started])


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill them and their children; a zombie that nobody reaps yet is as good as gone."""
    alive = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    alive += [child for process in alive for child in process.children(recursive=True)]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.wait(10)
    wait_until(lambda: all(map(gone, alive)), 10)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


EVERYTHING = "-B -s {folder}/beat -c 3 -Q default,control"
CONTROL = "-B -s {folder}/beat -c 1 -Q control"
WORK = "-c 2 -Q default"


def holder(workers: list[Worker], pid: int) -> Worker:
    """Return the worker whose child that is."""
    return next(worker for worker in workers if pid in [child.pid for child in worker.children()])


def terminate_connections() -> int:
    """Cut every other connection to the tests' database; return how many there were."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return cursor.fetchone()[0]


def now() -> Any:
    """Return the database's clock, now."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        return cursor.fetchone()[0]


@contextlib.contextmanager
def open_transaction(work: Callable[[], object]) -> Iterator[None]:
    """Do `work` in a transaction that stays open as long as the block."""
    done, release = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            work()
            done.set()
            release.wait(60)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert done.wait(10)
        yield
    finally:
        release.set()
        thread.join()
