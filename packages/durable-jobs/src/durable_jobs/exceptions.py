"""What a task may raise to say how its job ends, and what it meets when it lost the job."""

import signal
import threading
from typing import Any

from billiard.common import terminate_handler_fired
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker import state

# Told of these, Celery's main process would end, or take a child that works for lost.
UNTOLD = (MemoryError, Terminated, TimeLimitExceeded, WorkerLostError)


class Permanent(Exception):  # noqa: N818
    """Raised in a task: no attempt will ever succeed, the job is dead now."""


class LeaseLost(Exception):  # noqa: N818
    """The job was cancelled, deleted or given to another worker; this run writes nothing more."""


class NotYet(Exception):  # noqa: N818
    """It is too early for this job, or this worker: it comes back in `pause` seconds."""

    def __init__(self, pause: float, why: str) -> None:
        super().__init__(why)
        self.pause = pause


class JobDead(Exception):  # noqa: N818
    """Raised by `.get()` of a dead job: its error text."""


class Unsupported(NotImplementedError):  # noqa: N818
    """A Celery feature that would lose its meaning, or the job, when the task is durable."""

    def __init__(self, task: str, feature: Any) -> None:
        super().__init__(
            f"{task} is a durable job and does not take {feature}: what is left of a canvas is "
            "lost with its message. Enqueue the next step inside the task (atomic=True commits "
            "both together), many calls with enqueue_many, and let a @reconciler find what is "
            "ready; a task that must be in a canvas opts out: @shared_task(base=celery.Task)."
        )


def stops(error: BaseException) -> bool:
    """Return whether it is the end of this process, and not what its task has raised."""
    if isinstance(error, Exception):
        return False
    if terminate_handler_fired():  # a stop or a `terminate=True` has come to this child
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(error, KeyboardInterrupt):  # in a test: no worker has Python's own handler
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    forced = isinstance(error, WorkerShutdown | WorkerTerminate)
    return forced and state.should_terminate is not None  # solo


def escapes(error: BaseException) -> bool:
    """Return whether Celery catches it nowhere though it is not the end of this process."""
    unknown = isinstance(error, MemoryError) or not isinstance(error, Exception)
    return unknown and not stops(error)


def tellable(error: BaseException) -> Exception:
    """Return what Celery's main process can be told of a job that died of it."""
    if isinstance(error, Exception) and not isinstance(error, UNTOLD):
        return error
    told = JobDead(repr(error))
    told.__cause__ = error
    return told
