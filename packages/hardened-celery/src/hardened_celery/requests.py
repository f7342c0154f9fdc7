"""A plain task that raises MemoryError is a failed task, as any other that raises.

Celery's main process raises it once more, to end; the message comes back, and ends the next worker,
and so on. Durable tasks have a request class of their own, which does the same.
"""

from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import Task, bootsteps
from celery.worker import WorkController
from celery.worker.request import Request


class PlainRequest(Request):
    """A plain task in the main process."""

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        raised = exc_info.exception
        error = raised.exc if isinstance(raised, ExceptionWithTraceback) else raised
        if isinstance(error, MemoryError):
            exc_info.exception = RuntimeError(repr(error))
        return super().on_failure(exc_info, send_failed_event, return_ok)


class PlainTasks(bootsteps.Step):
    """Give every task of a worker that class, unless it has one of its own."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: WorkController, **options: Any) -> None:
        Task.Request = PlainRequest
