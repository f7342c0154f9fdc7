"""What `.delay()` returns: Celery's AsyncResult, read from the row instead of a result backend.

`CELERY_RESULT_BACKEND = "durable_jobs.result:RowBackend"` gives the same to code that has only an
id, as in `AsyncResult(task_id).state`. It keeps nothing of plain tasks.
"""

import time
from functools import partial
from typing import Any

from celery import states
from celery.backends.base import DisabledBackend
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult, assert_will_not_block
from django.db import transaction
from kombu.utils.json import dumps

from durable_jobs.conf import conf
from durable_jobs.database import anew
from durable_jobs.exceptions import JobDead
from durable_jobs.models import Job
from durable_jobs.values import decode

STATES = {
    Job.State.SCHEDULED: states.PENDING,
    Job.State.QUEUED: states.PENDING,
    Job.State.RUNNING: states.STARTED,
    Job.State.SUCCEEDED: states.SUCCESS,
    Job.State.DEAD: states.FAILURE,
    Job.State.CANCELLED: states.REVOKED,
}
POLL_SECONDS = 0.02
POLL_MAX_SECONDS = 0.5


def _value(stored: Any) -> Any:
    """Return a result as it was, with the dates and decimals that JSON has no words for."""
    return decode(dumps(stored)) if isinstance(stored, dict | list) else stored


class JobResult(AsyncResult):
    """`.state` speaks Celery's words; `.job` is the row with the rest."""

    @property
    def job(self) -> Job:
        return Job.objects.with_id(self.id).latest("created_at")

    def _get_task_meta(self) -> dict[str, Any]:
        job = anew(Job.objects.with_id(self.id).order_by("-created_at").first)
        if job is None:
            return {"task_id": self.id, "status": states.PENDING, "result": None}
        state = STATES[Job.State(job.state)]
        if job.state == Job.State.SCHEDULED and job.attempts:
            state = states.RETRY
        return {
            "task_id": self.id,
            "status": state,
            "result": JobDead(job.error) if state == states.FAILURE else _value(job.result),
            "traceback": job.error or None,
            "date_done": job.finished_at,
            "retries": max(job.attempts - 1, 0),
            "name": job.task,
            "args": job.args,
            "kwargs": job.kwargs,
            "queue": job.queue,
            "worker": job.worker,
            "children": [],
        }

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = POLL_SECONDS,
        disable_sync_subtasks: bool = True,
        **_: Any,
    ) -> Any:
        """Wait for the end and return the result, None when the task ignores results."""
        if disable_sync_subtasks:
            assert_will_not_block()
        deadline = None if timeout is None else time.monotonic() + timeout
        while (meta := self._get_task_meta())["status"] not in states.READY_STATES:
            if deadline is not None and time.monotonic() > deadline:
                raise ResultTimeout(f"job {self.id} is {meta['status']} after {timeout} s")
            time.sleep(interval)
            interval = min(interval * 1.5, POLL_MAX_SECONDS)
        if propagate and meta["status"] == states.REVOKED:
            raise TaskRevokedError(self.id)
        if propagate and meta["status"] == states.FAILURE:
            raise meta["result"]
        return meta["result"]

    wait = get

    def revoke(
        self, connection: Any = None, terminate: bool = False, signal: Any = None, **how: Any
    ) -> None:
        """Cancel the job; a run in progress can write nothing more, and `terminate` ends it."""
        anew(Job.objects.with_id(self.id).cancel)
        if terminate:
            kill = partial(super().revoke, connection, True, signal, **how)
            transaction.on_commit(kill, using=conf.DATABASE, robust=True)

    def forget(self) -> None:
        Job.objects.with_id(self.id).filter(due_at=None).delete()


class RowBackend(DisabledBackend):
    """Reads jobs, writes nothing: their ends are written with their rows."""

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:
        return JobResult(task_id, app=self.app)._get_task_meta()

    def wait_for_pending(self, result: AsyncResult, **options: Any) -> Any:
        return JobResult(result.id, app=self.app).get(**options)

    def forget(self, task_id: str) -> None:
        JobResult(task_id, app=self.app).forget()

    def as_uri(self, *_: Any, **__: Any) -> str:
        return "rows of durable_jobs"
