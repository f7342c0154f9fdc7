"""Real beat, real workers, a real broker; the verdicts are read from the test's own database."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from celery import current_app
from django.db import connection

from queue_probes.diagnosis import verdicts
from tests.fast_settings import QUEUE_PROBES

PACKAGE = Path(__file__).resolve().parent.parent
QUICK = ("--without-mingle", "--without-gossip", "-l", "info")


def wait_until(condition, seconds=30, what=""):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s {what}"
        time.sleep(0.02)
    return found


def states():
    """Return the state of each queue."""
    return {verdict.queue: verdict.state for verdict in verdicts()}


class Crew:
    """Processes of the project, by name."""

    def __init__(self, folder, environment):
        self.folder = folder
        self.environment = environment
        self.started = {}

    def beat(self):
        return self.start(
            "beat", "beat", "-s", str(self.folder / "beat"), "--pidfile=", "-l", "info"
        )

    def worker(self, name, queues, concurrency=1):
        node = ("-n", f"{name}@test", "-Q", queues, "-c", str(concurrency))
        return self.start(name, "worker", *node, *QUICK)

    def start(self, name, *command):
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tests.app", *command],
                cwd=PACKAGE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        self.started[name] = psutil.Process(process.pid)
        self.started[name].popen = process
        return self.started[name]

    def everybody(self):
        """Start beat and workers of all queues, and wait until every queue has answered."""
        self.beat()
        self.worker("work", "default,high,low")
        self.worker("control", "control")
        wait_until(lambda: set(states().values()) == {"ok"} and answered(), 60, str(self.folder))
        return self

    def signal(self, name, number, *, children=True, main=True):
        """Send a signal to the main process of a worker, its children, or both."""
        process = self.started[name]
        if process.popen.poll() is not None:
            return
        family = process.children(recursive=True) if children else []
        chosen = [process, *family] if main else family
        assert chosen, f"{name} has no children"
        for each in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        if number == signal.SIGSTOP:  # the fault is real before its effect is waited for
            wait_until(lambda: all(map(stopped, chosen)), 10, f"stop {name}: {chosen}")

    def end(self):
        end([process.popen for process in self.started.values()])


def end(processes):
    """Kill processes and their children, and wait until all are gone."""
    alive = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    alive += [child for process in alive for child in process.children(recursive=True)]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in processes:
        process.wait(10)
    wait_until(lambda: all(map(gone, alive)), 10)


def stopped(process):
    return process.status() == psutil.STATUS_STOPPED


def gone(process):
    """Tell whether it has ended; a zombie that nobody reaps yet has."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def answered():
    return all(verdict.age is not None for verdict in verdicts())


@pytest.fixture
def fast(settings, monkeypatch):
    settings.QUEUE_PROBES = QUEUE_PROBES
    monkeypatch.setattr("queue_probes.incidents.BEGAN", 0.0)


@pytest.fixture
def free_port():
    """Return a port of the loopback interface on which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def project_environment(transactional_db):
    """Return an environment in which programs of the project use the test's own database."""
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    return {**os.environ, "DATABASE_URL": f"{server}/{connection.settings_dict['NAME']}"}


@pytest.fixture
def crew(fast, project_environment, tmp_path):
    redis.Redis.from_url(current_app.conf.broker_url).flushall()
    own = {"DJANGO_SETTINGS_MODULE": "tests.fast_settings", "RELEASE": "r1"}
    crew = Crew(tmp_path, project_environment | own)
    yield crew
    crew.end()


@pytest.fixture
def own_broker(tmp_path, monkeypatch):
    """A Valkey of this test alone, which it may kill."""
    valkey = pytest.importorskip("devstack.valkey", reason="starts its own broker with devstack")
    processes = pytest.importorskip("devstack.processes")
    server, url = valkey.process(tmp_path / "valkey")
    server.start()
    processes.wait_until_ready([server])
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        monkeypatch.setenv(name, url)
    yield server
    server.send(signal.SIGCONT)
    processes.stop([server])
