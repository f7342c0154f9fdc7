"""A worker is really killed in the middle of a job, and the job is done nevertheless."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from celery import shared_task
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.db import connection
from durable_jobs import Job

pytestmark = pytest.mark.django_db(transaction=True)


@shared_task
def build(name: str, seconds: float) -> None:
    """Write down who works, work, and write down that it is done: once, however often this runs."""
    Group.objects.create(name=f"{name} by {os.getpid()}")
    time.sleep(seconds)
    Group.objects.get_or_create(name=f"{name} done")


def test_a_job_whose_worker_is_killed_is_done_by_the_next_one(start_worker) -> None:
    worker = start_worker()
    build.delay("house", seconds=2)
    wait_until(lambda: Group.objects.filter(name__startswith="house by").exists())
    kill(worker)
    assert not Group.objects.filter(name="house done").exists()
    assert Job.objects.get().state == Job.State.RUNNING

    start_worker()

    def done() -> bool:
        call_command("reconcile", stdout=io.StringIO())  # in a real stack beat asks for it
        return Job.objects.get().state == Job.State.SUCCEEDED

    wait_until(done)
    assert Group.objects.filter(name="house done").exists()
    assert Group.objects.filter(name__startswith="house by").count() == 2


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Return a function that starts a worker; those that are left at the end are killed."""
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    environment = os.environ | {
        "DATABASE_URL": f"{server}/{connection.settings_dict['NAME']}",  # the test's own
        "DJANGO_SETTINGS_MODULE": "tests.settings",
    }
    command = [sys.executable, "-m", "hardened_celery", "worker", "-A", "config"]
    command += ["-I", __name__, "-Q", "default", "-c", "1", "--without-mingle"]
    workers = []

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "worker.log").open("ab") as log:
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return workers[-1]

    yield start
    for worker in workers:
        kill(worker)


def kill(worker: subprocess.Popen[bytes]) -> None:
    """Kill the launcher, the worker below it and its pool, as a power cut would."""
    table = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True)
    parents = {int(pid): int(parent) for pid, parent in map(str.split, table.splitlines())}
    family = {worker.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    worker.wait()


def wait_until(condition: Callable[[], object], seconds: float = 40) -> None:
    """Wait for a condition, never for a time: machines are slow now and then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)
