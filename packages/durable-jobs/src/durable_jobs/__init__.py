"""Durable jobs for Django and Celery: no `.delay()` is lost, none takes effect twice in it.

    .delay() -> task.py -> enqueue.py: one row in the caller's transaction (models.py, values.py)
                               | after commit, publisher.py: a hint, which may be lost
                               v
    worker.py -> slices.py: claim by id -> run.py: run, write, tell     heartbeat.py: renews leases
                               ^
    reconcile.py: every row whose `due_at` has passed: publish, retry, rescue, expire
    reconcilers.py: a job for every object that is not as it should be
    beat.py: the calls of beat, once the database is there
    session.py: closes a database session that a task has changed

     .delay() --> QUEUED --claim: token+1, attempts+1--> RUNNING --> SUCCEEDED
                    ^  ^                                  |  | exception, attempts used up: DEAD
     countdown --> SCHEDULED <---- exception: backoff ----'  | lease over: QUEUED, or DEAD
                    due: publish                           any unfinished, .cancel(): CANCELLED

Every arrow is a verb of transitions.py; every write of a run carries its token. From below: conf,
values, attempt; postgresql and sqlite, database, publisher, transitions; fields, models, heartbeat,
run, slices; task on top.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from durable_jobs.exceptions import JobDead, LeaseLost, Permanent, Unsupported
    from durable_jobs.models import Job
    from durable_jobs.publisher import flush
    from durable_jobs.reconcilers import enqueue_for, reconciler
    from durable_jobs.task import JobTask

_HOME = {
    "Job": "models",
    "JobDead": "exceptions",
    "JobTask": "task",
    "LeaseLost": "exceptions",
    "Permanent": "exceptions",
    "Unsupported": "exceptions",
    "enqueue_for": "reconcilers",
    "flush": "publisher",
    "reconciler": "reconcilers",
}
__all__ = [
    "Job",
    "JobDead",
    "JobTask",
    "LeaseLost",
    "Permanent",
    "Unsupported",
    "enqueue_for",
    "flush",
    "reconciler",
]


# Lazily: Django imports this package before its models may be imported.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
