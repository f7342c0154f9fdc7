"""One attempt of one job: runs the body and writes how it ended, under the token of its claim.

Celery learns the outcome through its own exceptions: Retry when there will be another attempt, the
task's exception when the job is dead, Ignore when the job is no longer this run's.
"""

import logging
import random
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.exceptions import Ignore, Reject, Retry
from django.db import transaction
from kombu.utils.json import dumps

from durable_jobs import dialect, statements
from durable_jobs.conf import conf
from durable_jobs.exceptions import LeaseLost, Permanent
from durable_jobs.heartbeat import finish, heartbeat, still_mine
from durable_jobs.ids import row_id
from durable_jobs.publisher import publisher

if TYPE_CHECKING:
    from durable_jobs.models import JobQuerySet

logger = logging.getLogger("durable_jobs.run")
# A changed signature is a deployment in progress: the job waits for the worker that knows it.
MISFIT_SECONDS = 60.0
_here = threading.local()


def current(task_id: str | None) -> "Run | None":
    """Return the run of this thread, if that is what `task_id` names."""
    mine: Run | None = getattr(_here, "run", None)
    return mine if mine is not None and str(mine.id) == task_id else None


@contextmanager
def running(mine: "Run") -> Iterator[None]:
    """Make it the current run of this thread."""
    _here.run = mine
    try:
        yield
    finally:
        _here.run = None


def unclaimed(task: Any) -> "Run":
    """Return what `self.job` is in a direct call and in eager mode: nothing is written."""
    return Run(task, row_id(task.request.id or str(UUID(int=0))), token=0, attempts=1)


class NotYet(Exception):  # noqa: N818
    """The task found that it is too early: the pause in seconds, and why."""


class Run:
    """One attempt of one job, as its task sees it through `self.job`."""

    def __init__(
        self,
        task: Any,
        job: UUID,
        token: int,
        attempts: int,
        max_attempts: int = 1,
        args: str = "[]",
        kwargs: str = "{}",
        options: str = "{}",
    ) -> None:
        self.task = task
        self.id = job
        self.token = token
        self.attempts = attempts
        self.max_attempts = max_attempts
        self.args: list[Any] = dialect.decode(args)
        self.kwargs: dict[str, Any] = dialect.decode(kwargs)
        self.options: dict[str, Any] = dialect.decode(options)
        self.claimed = token > 0
        self.entered = False
        self.shared = False
        self.ending = False
        self.lost = False
        self.progress = 0
        self.message = ""
        self.reported = 0.0
        # What self.retry() asked for.
        self.asked: Retry | None = None
        self.replacement: tuple[Any, Any] = (None, None)
        self.raised_limit = 0
        self.final = False

    def __str__(self) -> str:
        return f"{self.task.name}[{self.id}] attempt {self.attempts}"

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt: give it to the system that must not act twice."""
        return f"job-{self.id}"

    def checkpoint(self, done: int, total: int, message: str = "") -> None:
        """Tell how far the task is; raises LeaseLost when the job is no longer this run's.

        Written by the heartbeat thread within a second, outside the task's own transaction.
        """
        self.progress = max(0, min(100, 100 * done // total if total else 0))
        self.message = message[:200]
        if self.lost:
            raise LeaseLost(f"{self} was cancelled or given to another worker")
        if self.claimed:
            heartbeat.report(self)

    def wait_for(self, jobs: "JobQuerySet", pause: float = 5.0) -> None:
        """Let the job come back in `pause` seconds while any of these is unfinished: a fan-in.

        Call it first. Waiting uses up no attempt; and since every job ends, dead if need be, so
        does the waiting: what the ends were is for the task to look at.
        """
        if self.claimed and (left := jobs.unfinished().exclude(pk=self.id).count()):
            raise NotYet(pause, f"waits for {left} jobs")

    def perform(self, args: Any, kwargs: Any) -> Any:
        """Run the body and write how it ended; Celery is told through its own exceptions."""
        self.entered = True
        try:
            self._check_signature(args, kwargs)
            if not self.task.atomic:
                return self._succeed(self.task.run(*args, **kwargs))
            with transaction.atomic(using=conf.DATABASE):
                return self._succeed(self.task.run(*args, **kwargs))
        except LeaseLost as error:
            logger.warning("durable_jobs: %s", error)
            raise Ignore(str(error)) from error
        except NotYet as early:
            self._give_back(*early.args)
            raise Ignore(str(early)) from early
        except Ignore:
            self._succeed(None)
            raise
        except Reject as reject:
            if reject.requeue:
                self._give_back(0, None)
                raise Ignore("handed back by Reject(requeue=True)") from reject
            self.final = True
            self._fail(reject)
            raise
        except Retry as retry:
            self.asked = self.asked or retry
            self._fail(retry.exc or retry, delay=retry.when)
            raise
        except Exception as error:
            state, delay = self._fail(error)
            if state == "dead":
                raise
            raise Retry(f"attempt {self.attempts} failed: {error!r}", error, delay) from error

    def _check_signature(self, args: Any, kwargs: Any) -> None:
        try:
            if self.task.typing:
                self.task.__header__(*args, **kwargs)
        except TypeError as error:
            self._give_back(MISFIT_SECONDS, f"waits for a worker that knows its signature: {error}")
            logger.error("durable_jobs: %s does not fit this worker's signature: %s", self, error)
            raise Ignore(str(error)) from error

    def _succeed(self, value: Any) -> Any:
        if self.asked:  # self.retry(throw=False)
            raise self.asked
        kept = None if self.task.ignore_result else self._json(value)
        if self.shared and kept is None and not self.task.atomic:
            self.ending = True
            heartbeat.finish_later(self)
        elif self.task.atomic:
            if not self._finish_inside(kept):
                raise LeaseLost(f"{self} had lost its lease when it ended")
        elif not finish([self], kept, statement=statements.FINISH_FREE):
            self._finish_locked(kept)
        return value

    def _finish_locked(self, kept: Any) -> None:
        if not still_mine([self]):
            raise LeaseLost(f"{self} had lost its lease when it ended")
        if kept is None:  # somebody holds the row, and this process has other work to do
            self.ending = True
            heartbeat.finish_later(self)
        elif not finish([self], kept):
            raise LeaseLost(f"{self} had lost its lease when it ended")

    def _json(self, value: Any) -> Any:
        try:
            dumps(value)
        except (TypeError, ValueError) as error:
            self.final = True  # another attempt would do the work again and return the same
            text = f"it returned what is not JSON (ignore_result=True keeps nothing): {error}"
            raise TypeError(text) from error
        return value

    def _finish_inside(self, result: Any) -> bool:
        """Finish in the task's transaction, whose locks nobody must have to wait for long.

        Somebody may hold the job's row, to cancel it, and wait for a row this task has written.
        """
        for _ in range(10):
            if finish([self], result, statement=statements.FINISH_FREE):
                return True
            if not still_mine([self]):
                return False
            time.sleep(0.05)
        raise NotYet(1.0, "its row was locked by another transaction when it ended")

    def _fail(self, error: BaseException, delay: Any = None) -> tuple[str, float]:
        """Write a failed attempt; return the state it leads to and the pause before the next."""
        eta = delay if isinstance(delay, datetime) else None
        seconds = delay if isinstance(delay, int | float) else self._backoff()
        args, kwargs = self.replacement
        found = dialect.hints(
            statements.FAIL,
            ids=[self.id],
            tokens=[self.token],
            error=describe(error),
            final=self.final or isinstance(error, self._permanent()),
            max_attempts=self.raised_limit,
            delay=seconds,
            eta=eta,
            args=None if args is None else dumps(args),
            kwargs=None if kwargs is None else dumps(kwargs),
        )
        if not found:
            raise Ignore(f"{self} had lost its lease when it failed: {error!r}") from error
        if found[0].state == "queued":
            publisher.send(found)
        elif found[0].state == "scheduled" and eta is None:
            publisher.later(found, seconds)
        return found[0].state, seconds

    def _permanent(self) -> tuple[type[BaseException], ...]:
        task = self.task
        return (
            Permanent,
            *(task.throws or ()),
            *getattr(task, "dont_autoretry_for", ()),
        )

    def _backoff(self) -> float:
        pause = min(conf.BACKOFF_MAX, conf.BACKOFF_MIN * 2 ** min(self.attempts - 1, 20))
        return float(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads load

    def _give_back(self, delay: float, error: str | None) -> None:
        while not give_back([self], delay, error) and still_mine([self]):
            time.sleep(0.1)  # its row is locked by another transaction


def describe(error: BaseException) -> str:
    """Return the traceback, its end kept: that is where the error stands."""
    text = "".join(traceback.format_exception(error)).strip()
    return text[-conf.ERROR_MAX_CHARS :]


def give_back(runs: list[Run], delay: float = 0, error: str | None = None) -> bool:
    """Hand claimed jobs back; the attempt does not count. Return whether any was given.

    A locked row is left to its lease: this may run in the heartbeat's thread.
    """
    hints = dialect.hints(
        statements.RELEASE,
        ids=[run.id for run in runs],
        tokens=[run.token for run in runs],
        delay=delay,
        error=error,
    )
    publisher.later(hints, delay) if delay else publisher.send(hints)
    return bool(hints)
