"""Plain Celery tasks for tests: what ran, and how often, is counted in a database table.

Load them in a worker with `-I tests.tasks`. `create_table` makes the table, once per test.
"""

import os
import signal
import subprocess
import time
from typing import Any

from celery import Task, shared_task
from celery.worker.control import control_command
from django.db import connection


def create_table() -> None:
    """Create the empty table that the tasks write to."""
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS test_run")
        cursor.execute(
            "CREATE TABLE test_run (id serial, name text, event text, pid integer,"
            " at timestamptz DEFAULT clock_timestamp())"
        )


def count(event: str, name: str = "%") -> int:
    """Return how often an event, "start" or "end", happened to tasks whose name is LIKE `name`."""
    with connection.cursor() as cursor:
        query = "SELECT count(*) FROM test_run WHERE event = %s AND name LIKE %s"
        cursor.execute(query, [event, name])
        return int(cursor.fetchone()[0])


def record(name: str, event: str) -> None:
    """Add one row; it is committed at once."""
    with connection.cursor() as cursor:
        query = "INSERT INTO test_run (name, event, pid) VALUES (%s, %s, %s)"
        cursor.execute(query, [name, event, os.getpid()])


@shared_task(base=Task)
def work(name: str, seconds: float = 0) -> None:
    """Record a start, take the given time, record an end."""
    record(name, "start")
    time.sleep(seconds)
    record(name, "end")


@shared_task(base=Task)
def no_memory() -> None:
    """Record a start, and find no memory."""
    record("greedy", "start")
    raise MemoryError("Unable to allocate 9 GiB")


@shared_task(base=Task)
def burn(name: str, seconds: float) -> None:
    """As `work`, but keep a processor busy for that time."""
    record(name, "start")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    record(name, "end")


@shared_task(base=Task)
def ignore_the_end(seconds: float) -> None:
    """As C code that never comes back to Python: no signal but SIGKILL ends its process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    work("deaf", seconds)


@shared_task(base=Task)
def leave_child() -> None:
    """Start a process that loses its parent at once and runs for a second."""
    subprocess.run(["sh", "-c", "sleep 1 &"], check=True)


@control_command()
def hang(state: Any, seconds: float) -> None:
    """Block the main process of a worker: `app.control.broadcast("hang", {"seconds": 60})`."""
    print("the main process hangs", flush=True)
    time.sleep(seconds)
