"""What a plain task raises is the task's failure, and nobody else's."""

from pathlib import Path

import pytest

from tests import tasks
from tests.processes import running_worker, wait_until


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_plain_task_that_finds_no_memory_fails_once_and_the_worker_goes_on(
    tmp_path: Path, project_environment: dict[str, str], pool: str
) -> None:
    tasks.create_table()
    how = "--pool", pool, "-c", "1", "-Q", "high"
    with running_worker(tmp_path / "log", project_environment, *how) as worker:
        main = worker.celery_pid
        for _ in range(2):
            tasks.no_memory.apply_async(queue="high")
        tasks.work.apply_async(["after"], queue="high")
        wait_until(lambda: tasks.count("end", "after"), what="the next task runs")
        assert worker.celery_pid == main
        assert "Unable to allocate 9 GiB" in worker.text()
    # nothing is left that another worker would have to run again
    with running_worker(tmp_path / "next", project_environment, *how):
        tasks.work.apply_async(["last"], queue="high")
        wait_until(lambda: tasks.count("end", "last"), what="the next worker works")
    assert tasks.count("start", "greedy") == 2
