"""For a project's own tests: run jobs in-process, as a worker would, without a broker.

note.publish()                    # enqueues
assert drain() == 1               # claims, runs and finishes what is due
drain(everything=True)            # also what is delayed or backs off
"""

from typing import Any

from celery import current_app
from celery.app.trace import build_tracer
from django.db.models.functions import Now

from durable_jobs import transitions
from durable_jobs.heartbeat import heartbeat
from durable_jobs.models import Job
from durable_jobs.reconcilers import run_all
from durable_jobs.slices import Slice


def drain(*, everything: bool = False, reconcile: bool = False, limit: int = 1000) -> int:
    """Run jobs until none is left that could start; return how many attempts were made.

    Exceptions of tasks are recorded as in a worker; look at `Job`. `everything` does not wait for
    delays; `reconcile` lets reconcilers insert their jobs first.
    """
    attempts = 0
    if reconcile:
        run_all()
    while job := _next(everything):
        if attempts == limit:
            raise AssertionError(f"{limit} attempts and still jobs to do: {job}")
        task = current_app.tasks[job.task]
        request: dict[str, Any] = {"id": str(job.pk), "is_eager": True, "delivery_info": {}}
        with heartbeat.by_hand():
            Slice(task, _tracer(task), request, [str(job.pk)]).work()
        attempts += 1
    return attempts


def _next(everything: bool) -> Job | None:
    waiting = Job.objects.filter(state__in=[Job.State.QUEUED, Job.State.SCHEDULED])
    waiting.filter(expires_at__lte=Now()).cancel("expired before it started")
    waiting = waiting.filter(task__in=list(current_app.tasks)).order_by("due_at")
    queued = waiting.filter(state=Job.State.QUEUED).order_by("pk").first()
    job = queued or waiting.filter(due_at__lte=Now()).first()
    if job is None and everything and (job := waiting.first()):
        transitions.hasten(Job.objects.filter(pk=job.pk))
    return job


def _tracer(task: Any) -> Any:
    # `eager` keeps Celery from closing the database connection of the test.
    return build_tracer(task.name, task, eager=True, app=current_app._get_current_object())
