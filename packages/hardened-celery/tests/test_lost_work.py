"""A fault that loses a running plain task with Celery's own defaults, and does not with ours.

Durable jobs, which lose none in far worse ones, have tests of their own.
Each test proves that the fault hit a running task, and counts in the database. The control arm is
the same worker with `tests.stock_settings`.
"""

import os
import signal
from pathlib import Path

import pytest
from django.db import connection

from tests import tasks
from tests.processes import running_worker, wait_until

pytestmark = pytest.mark.faults
TASKS = 6
ARMS = {"tests.settings": 0, "tests.stock_settings": 1}


def running() -> dict[str, int]:
    """Return the names of the tasks that have begun and not ended, and the processes run in."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT name, max(pid) FROM test_run GROUP BY name"
            " HAVING bool_and(event = 'start') AND count(*) = 1"
        )
        return dict(cursor.fetchall())


def ended() -> set[str]:
    """Return the names of the tasks that have ended."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT name FROM test_run WHERE event = 'end'")
        return {name for (name,) in cursor.fetchall()}


@pytest.mark.parametrize(("arm", "lost"), ARMS.items())
def test_sigkill_of_a_pool_process_loses_nothing(
    tmp_path: Path, project_environment: dict[str, str], arm: str, lost: int
) -> None:
    tasks.create_table()
    environment = project_environment | {"DJANGO_SETTINGS_MODULE": arm}
    with running_worker(tmp_path / "log", environment, "-c", "2", "-Q", "high") as worker:
        for number in range(TASKS):
            tasks.work.apply_async([f"task-{number}", 1], queue="high")
        interrupted, victim = next(iter(wait_until(running, what="a task runs").items()))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: f"pid:{victim} exited" in worker.text(), 30, "the death is noticed")
        wait_until(lambda: len(ended()) >= TASKS - lost, 120, "the other tasks end")
        assert interrupted not in running() or lost
    assert (interrupted in ended()) == (not lost)
    assert len(ended()) == TASKS - lost
    assert tasks.count("start") == TASKS + (not lost)
