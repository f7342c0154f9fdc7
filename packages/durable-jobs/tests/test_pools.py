"""Every way Celery runs tasks: pools, recycled children, autoscaling, events; what is refused."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from celery import current_app
from django.db import connection

from durable_jobs import Job
from durable_jobs.publisher import publisher
from tests import tasks
from tests.celery_tasks import retry_quietly
from tests.conftest import effects, pids, wait_until

State = Job.State
TASKS = "-Q default -I tests.celery_tasks"


def succeeded(count):
    return lambda: Job.objects.filter(state=State.SUCCEEDED).count() == count


def most_at_once(note):
    """Return how many runs overlapped, from what they wrote at start and end."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT max(running) FROM (SELECT sum(CASE WHEN note LIKE 'start%%' THEN 1 ELSE -1 END)"
            " OVER (ORDER BY at, id) AS running FROM durable_jobs_test_effect"
            " WHERE note LIKE %s) AS s",
            [f"%{note}"],
        )
        return cursor.fetchone()[0]


def test_threads_run_jobs_at_once_each_under_its_own_claim(crew):
    for _ in range(8):
        tasks.write.delay("t", 0.5)
    tasks.write_atomic.delay("a")
    quiet = retry_quietly.delay()
    failing = tasks.fail.apply_async(max_attempts=2)
    publisher.flush(5)
    [worker] = crew(threads=f"--pool=threads -c 4 {TASKS}")
    wait_until(succeeded(10))
    wait_until(lambda: failing.job.state == State.DEAD)
    assert (len(effects("start t")), len(effects("end t"))) == (8, 8)
    assert most_at_once("t") in (3, 4)
    assert set(pids()) == {worker.process.pid}
    assert (quiet.job.attempts, failing.job.attempts) == (3, 2)


def test_a_threads_worker_that_is_stopped_lets_its_jobs_end_and_takes_no_more(crew):
    jobs = [tasks.write.delay(f"s{number}", 1) for number in range(6)]
    publisher.flush(5)
    [worker] = crew(threads=f"--pool=threads -c 2 {TASKS}")
    wait_until(lambda: len(effects("start")) == 2)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(15) == 0
    assert len(effects("start")) == len(effects("end"))
    states = {job.job.state for job in jobs}
    assert State.RUNNING not in states


def test_solo_runs_one_job_after_the_other_in_the_main_process(crew):
    for _ in range(3):
        tasks.write.delay("t", 0.1)
    quiet = retry_quietly.delay()
    publisher.flush(5)
    [worker] = crew(solo=f"--pool=solo {TASKS}")
    wait_until(succeeded(4))
    assert most_at_once("t") == 1
    assert set(pids()) == {worker.process.pid}
    assert quiet.job.attempts == 3


@pytest.fixture
def events():
    """Return the events that workers send meanwhile: (type, uuid)."""
    seen = []
    handlers = {"*": lambda event: seen.append((event["type"], event.get("uuid")))}
    with current_app.connection_for_read() as connected:
        receiver = current_app.events.Receiver(connected, handlers=handlers)
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        thread.start()
        yield seen
        receiver.should_stop = True
        thread.join(10)


def test_children_that_are_recycled_and_scaled_lose_nothing_and_report_their_jobs(crew, events):
    crew(work=f"--autoscale=3,1 --max-tasks-per-child=1 -E {TASKS}")
    jobs = [tasks.write.delay(f"n{number}", 0.05) for number in range(12)]
    wait_until(succeeded(12))
    assert sorted(effects("end")) == sorted(f"end n{number}" for number in range(12))
    assert {job.job.attempts for job in jobs} == {1}
    assert len(set(pids())) >= 6
    finished = {("task-succeeded", job.id) for job in jobs}
    wait_until(lambda: len(finished & set(events)) >= 6)


def test_pools_of_green_threads_are_refused_before_they_take_a_job(broker, tmp_path):
    # Celery itself fails where gevent is not installed; this pool has the name only.
    pool = "from celery.concurrency.solo import TaskPool\n\n\nclass Pool(TaskPool):\n    pass\n"
    (tmp_path / "gevent_pool.py").write_text(pool)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}",
        "CELERY_CUSTOM_WORKER_POOL": "gevent_pool:Pool",
        "TEST_DATABASE": "none",
    }
    command = [sys.executable, "-m", "celery", "-A", "tests.worker_app", "worker"]
    run = subprocess.run(
        [*command, "--pool=custom"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "durable_jobs does not run in the gevent_pool pool: its heartbeat needs a real thread. "
        "Use --pool=prefork or --pool=threads."
    )
