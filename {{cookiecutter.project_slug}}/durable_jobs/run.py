"""One attempt of one job: runs the body and writes how it ended, under the token of its claim.

Celery learns the outcome through its own exceptions: Retry when there will be another attempt, the
task's exception when the job is dead, Ignore when the job is no longer this run's.
"""

import random
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from celery.exceptions import Ignore, Reject, Retry
from celery.utils.log import get_logger
from django.db import connections, transaction
from kombu.utils.json import dumps, loads

from durable_jobs import dialect, statements
from durable_jobs.conf import conf
from durable_jobs.exceptions import LeaseLost, Permanent
from durable_jobs.heartbeat import finish, heartbeat
from durable_jobs.publisher import publisher

logger = get_logger("durable_jobs.run")
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
    task_id = task.request.id
    return Run(task, UUID(task_id) if task_id else UUID(int=0), token=0, attempts=1)


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
        self.args: list[Any] = loads(args)
        self.kwargs: dict[str, Any] = loads(kwargs)
        self.options: dict[str, Any] = loads(options)
        self.claimed = token > 0
        self.entered = False
        self.shared = False
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
            self._fail(self.asked.exc or self.asked, delay=self.asked.when)
            raise self.asked
        kept = None if self.task.ignore_result else value
        if self.shared and kept is None and not self.task.atomic:
            heartbeat.finish_later(self)
        elif self.id not in finish([self], kept):
            raise LeaseLost(f"{self} had lost its lease when it ended")
        return value

    def _fail(self, error: BaseException, delay: Any = None) -> tuple[str, float]:
        """Write a failed attempt; return the state it leads to and the pause before the next."""
        eta = delay if isinstance(delay, datetime) else None
        seconds = delay if isinstance(delay, int | float) else self._backoff()
        # A connection that failed under the task must not cost the job its record of the failure.
        connections[conf.DATABASE].close_if_unusable_or_obsolete()
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
        publisher.send(hint for hint in found if hint.state == "queued")
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
        give_back([self], delay, error)


def describe(error: BaseException) -> str:
    """Return the traceback, its end kept: that is where the error stands."""
    text = "".join(traceback.format_exception(error)).strip()
    return text[-conf.ERROR_MAX_CHARS :]


def give_back(runs: list[Run], delay: float = 0, error: str | None = None) -> None:
    """Hand claimed jobs back; the attempt does not count."""
    hints = dialect.hints(
        statements.RELEASE,
        ids=[run.id for run in runs],
        tokens=[run.token for run in runs],
        delay=delay,
        error=error,
    )
    if not delay:
        publisher.send(hints)
