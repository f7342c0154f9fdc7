"""Results of jobs for who has the task's result, the task, or nothing but an id."""

import threading

import pytest
from celery import current_app, states
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult

from durable_jobs import Job, JobDead
from durable_jobs.testing import drain
from tests import tasks

pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture
def rows(monkeypatch):
    """Configure Celery to read results from rows; each thread makes its backend anew."""
    monkeypatch.setattr(current_app.conf, "result_backend", "durable_jobs.result:RowBackend")
    monkeypatch.setattr(current_app, "_local", threading.local())


def test_an_id_is_enough_to_read_the_state_of_a_job(rows):
    assert AsyncResult("3f0b1a52-7d65-4f0a-8a3e-6f1f5d0c0000").state == states.PENDING
    job = tasks.add.delay(1, 2)
    assert (AsyncResult(job.id).state, AsyncResult(job.id).ready()) == (states.PENDING, False)
    with pytest.raises(ResultTimeout):
        AsyncResult(job.id).get(timeout=0.05)
    drain()
    found = current_app.AsyncResult(job.id)
    assert (found.state, found.result, found.get(timeout=1)) == (states.SUCCESS, 3, 3)
    assert (found.name, found.args, found.queue) == (tasks.add.name, [1, 2], "default")


def test_a_dead_and_a_cancelled_job_raise_for_who_asks_by_id(rows):
    dead, cancelled = tasks.fail_for_good.delay(), tasks.noop.delay()
    cancelled.revoke()
    drain()
    assert isinstance(AsyncResult(dead.id).result, JobDead)
    with pytest.raises(JobDead, match="no such account"):
        AsyncResult(dead.id).get(timeout=1)
    assert "Permanent" in AsyncResult(dead.id).traceback
    with pytest.raises(TaskRevokedError):
        AsyncResult(cancelled.id).get(timeout=1)


def test_a_task_id_of_the_callers_choice_need_not_be_a_uuid(rows):
    job = tasks.add.apply_async((1, 2), task_id="import-42")
    drain()
    for result in (job, AsyncResult("import-42"), tasks.add.AsyncResult("import-42")):
        assert result.get(timeout=1) == 3
    AsyncResult("import-42").forget()
    assert Job.objects.count() == 0


def test_results_of_plain_tasks_are_not_kept_and_a_chord_of_them_is_refused(rows):
    plain = tasks.plain.apply()
    assert AsyncResult(plain.id).state == states.PENDING
    with pytest.raises(NotImplementedError, match="result backend"):
        current_app.backend.ensure_chords_allowed()
