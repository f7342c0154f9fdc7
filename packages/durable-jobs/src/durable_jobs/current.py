"""Which run the code that asks is part of: that of its thread, or of the task that awaits it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from durable_jobs.run import Run

NOBODY = UUID(int=0)
# Follows the task into its coroutines, which run in other threads.
_here: ContextVar["Run | None"] = ContextVar("durable_jobs_run", default=None)


def current(task_id: str | None) -> "Run | None":
    """Return the run that this is part of, if that is what `task_id` names."""
    mine = _here.get()
    return mine if mine is not None and str(mine.id) == task_id else None


def of(task: Any) -> "Run | None":
    """Return the task's run that this is part of, also where Celery knows of no request."""
    request = task.request_stack.top
    mine = _here.get()
    if request is None:
        return mine if mine is not None and mine.task.name == task.name else None
    return current(request.id)


@contextmanager
def running(mine: "Run") -> Iterator[None]:
    """Make it the current run."""
    before = _here.set(mine)
    try:
        yield
    finally:
        _here.reset(before)
