"""One attempt of one job: what is known of it, which one this thread is part of, and who holds it.

An `Attempt` is what a task sees as `self.job`. It writes nothing: run.py writes how it ended,
heartbeat.py that it still lives.
"""

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from uuid import UUID

from celery.exceptions import Retry
from django.db import models

from durable_jobs.exceptions import LeaseLost, NotYet
from durable_jobs.ids import row_id, uuid7
from durable_jobs.values import storable

NOBODY = UUID(int=0)
# Children inherit it, forked or spawned: the main process knows which jobs died with them.
BOOT = "DURABLE_JOBS_BOOT"


class State(models.TextChoices):
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    DEAD = "dead"
    CANCELLED = "cancelled"


@dataclass
class Asked:
    """What the body asked for while it ran: `self.retry()` need not be what it ends with."""

    retry: Retry | None = None
    args: str | None = None
    kwargs: str | None = None
    queue: str | None = None
    #: At least so many attempts, from here on.
    limit: int = 0
    #: No attempt will come after this one.
    final: bool = False


@dataclass(eq=False)
class Attempt:
    """The job that runs: id, token of the claim, arguments; `checkpoint()` and `wait_for()`."""

    task: Any
    id: UUID
    token: int
    attempts: int
    max_attempts: int = 1
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)
    #: Celery has come to the body.
    entered: bool = False
    #: It is one of several of a slice, whose ends are committed together.
    shared: bool = False
    #: Its end is being written, or is.
    over: bool = False
    #: The heartbeat is going to commit its end.
    ending: bool = False
    #: Somebody else has the job, or nobody.
    lost: bool = False
    progress: int = 0
    message: str = ""
    reported: float = 0.0
    #: Who hears of the progress: the heartbeat that keeps it alive.
    report: Callable[["Attempt"], None] | None = None

    def __str__(self) -> str:
        return f"{self.task.name}[{self.task_id}] attempt {self.attempts}"

    @property
    def task_id(self) -> str:
        """What Celery calls it: the id that the call was given, or the row's."""
        return self.options.get("id") or str(self.id)

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt: give it to the system that must not act twice.

        Raises RuntimeError in a thread that the task has started: hand it over.
        """
        if self.id == NOBODY:
            told = "this thread is not the job's own: read the key in the task, and hand it over"
            raise RuntimeError(f"{self.task.name}: {told}")
        return f"job-{self.id}"

    def checkpoint(self, done: int, total: int, message: str = "") -> None:
        """Tell how far the task is; raises LeaseLost when the job is no longer this run's.

        Written by the heartbeat thread within a second, outside the task's own transaction.
        """
        self.progress = max(0, min(100, 100 * done // total if total else 0))
        self.message = storable(message)[:200]
        if self.lost:
            raise LeaseLost(f"{self} was cancelled or given to another worker")
        if self.report:
            self.report(self)

    def wait_for(self, jobs: Any, pause: float = 5.0) -> None:
        """Let the job come back in `pause` seconds while any of these is unfinished: a fan-in.

        Call it first. Waiting uses up no attempt; and since every job ends, dead if need be, so
        does the waiting: what the ends were is for the task to look at.
        """
        # Of two jobs of one task only the older waits for the other.
        others = jobs.unfinished().exclude(task=self.task.name, pk__lte=self.id)
        if self.token and (left := others.count()):
            raise NotYet(pause, f"waits for {left} jobs")


def unclaimed(task: Any) -> Attempt:
    """Return what `self.job` is in a direct call and in eager mode: nothing is written."""
    request = task.request_stack.top
    if request is None:  # a thread that the task has started
        return Attempt(task, NOBODY, token=0, attempts=1)
    called = vars(request).setdefault("durable_jobs_call", uuid7())
    return Attempt(task, row_id(request.id) if request.id else called, token=0, attempts=1)


# Which attempt the code that asks is part of. Follows a task into its coroutines' threads.
_here: ContextVar[Attempt | None] = ContextVar("durable_jobs_attempt", default=None)


@contextmanager
def running(mine: Attempt) -> Iterator[None]:
    """Make it the current one."""
    before = _here.set(mine)
    try:
        yield
    finally:
        _here.reset(before)


def current(task_id: str | None) -> Attempt | None:
    """Return the attempt that this is part of, if that is what `task_id` names."""
    mine = _here.get()
    return mine if mine is not None and mine.task_id == task_id else None


def of(task: Any) -> Attempt | None:
    """Return the task's attempt that this is part of, also where Celery knows of no request."""
    if request := task.request_stack.top:
        return current(request.id)
    mine = _here.get()
    return mine if mine is not None and mine.task.name == task.name else None


# Who holds a job: `host/boot/pid`. A boot is one start of a worker: names and pids may repeat.


def start_boot() -> None:
    """Give this start of a worker its name; children that are started from now on share it."""
    os.environ[BOOT] = uuid.uuid4().hex[:12]
    boot.cache_clear()


@cache
def boot() -> str:
    name = os.environ.setdefault(BOOT, uuid.uuid4().hex[:12])
    return f"{socket.gethostname()[:120]}/{name}"


def holder(pid: int | None = None) -> str:
    """Return the name of a process of this boot, by default the calling one."""
    return f"{boot()}/{pid or os.getpid()}"
