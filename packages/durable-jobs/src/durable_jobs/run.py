"""One attempt of one job: runs the body and writes how it ended, under the token of its claim.

Celery learns the outcome through its own exceptions: Retry when there will be another attempt, the
task's exception when the job is dead, Ignore when the job is no longer this run's.
"""

import logging
import random
import time
from contextlib import nullcontext, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.exceptions import Ignore, Reject, Retry
from django.db import transaction

from durable_jobs import dialect, statements
from durable_jobs.conf import conf
from durable_jobs.connection import autocommit_again, seen_by_others
from durable_jobs.current import NOBODY
from durable_jobs.exceptions import LeaseLost, NotYet, Permanent
from durable_jobs.heartbeat import finish, heartbeat, still_mine
from durable_jobs.ids import row_id, uuid7
from durable_jobs.publisher import publisher
from durable_jobs.values import UNBOUNDED, describe, storable, to_json

if TYPE_CHECKING:
    from durable_jobs.models import JobQuerySet

logger = logging.getLogger("durable_jobs.run")
# A changed signature is a deployment in progress: the job waits for the worker that knows it.
MISFIT_SECONDS = 60.0


def unclaimed(task: Any) -> "Run":
    """Return what `self.job` is in a direct call and in eager mode: nothing is written."""
    request = task.request_stack.top
    if request is None:  # a thread that the task has started
        return Run(task, NOBODY, token=0, attempts=1)
    called = vars(request).setdefault("durable_jobs_call", uuid7())
    return Run(task, row_id(request.id) if request.id else called, token=0, attempts=1)


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
        self.replacement: list[str | None] = [None, None]
        self.queue: str | None = None
        self.ignored: Ignore | None = None
        self.raised_limit = 0
        self.final = self.done = False

    def __str__(self) -> str:
        return f"{self.task.name}[{self.id}] attempt {self.attempts}"

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt: give it to the system that must not act twice.

        Raises RuntimeError in a thread that the task has started: hand it over.
        """
        if self.id == NOBODY:
            told = "this thread is not the job's own: read the key in the task, and hand it over"
            raise RuntimeError(f"{self.task.name}: {told}")
        return f"job-{self.id}"

    def retries(self, task: Any) -> int | None:
        """Return how many retries the call, or else the task, allows; None is no limit."""
        if self.max_attempts == task.max_attempts:
            limit: int | None = task.max_retries
            return limit
        return None if self.max_attempts >= UNBOUNDED else self.max_attempts - 1

    def checkpoint(self, done: int, total: int, message: str = "") -> None:
        """Tell how far the task is; raises LeaseLost when the job is no longer this run's.

        Written by the heartbeat thread within a second, outside the task's own transaction.
        """
        self.progress = max(0, min(100, 100 * done // total if total else 0))
        self.message = storable(message)[:200]
        if self.lost:
            raise LeaseLost(f"{self} was cancelled or given to another worker")
        if self.claimed:
            heartbeat.report(self)

    def wait_for(self, jobs: "JobQuerySet", pause: float = 5.0) -> None:
        """Let the job come back in `pause` seconds while any of these is unfinished: a fan-in.

        Call it first. Waiting uses up no attempt; and since every job ends, dead if need be, so
        does the waiting: what the ends were is for the task to look at.
        """
        # Of two jobs of one task only the older waits for the other.
        others = jobs.unfinished().exclude(task=self.task.name, pk__lte=self.id)
        if self.claimed and (left := others.count()):
            raise NotYet(pause, f"waits for {left} jobs")

    def perform(self, args: Any, kwargs: Any) -> Any:
        """Run the body and write how it ended; Celery is told through its own exceptions."""
        self.entered = True
        try:
            self._check_signature(args, kwargs)
            whole = transaction.atomic(using=conf.DATABASE) if self.task.atomic else nullcontext()
            with whole:
                value = self._succeed(self._body(args, kwargs))
                self.done = True
        except LeaseLost as error:
            logger.warning("durable_jobs: %s", error)
            raise Ignore(str(error)) from error
        except NotYet as early:
            self._give_back(*early.args)
            raise Ignore(str(early)) from early
        except Ignore:  # not the task's: it does not fit this worker
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
        if self.ignored:  # what it wrote is committed, and Celery is to say nothing more
            raise self.ignored
        return value

    def _body(self, args: Any, kwargs: Any) -> Any:
        """Run the task's own code; with `raise Ignore()` it is done."""
        try:
            return self.task.run(*args, **kwargs)
        except Ignore as ignored:
            self.ignored = ignored
            return None
        finally:
            autocommit_again()

    def not_entered(self, outcome: Any) -> None:
        """Write a failed attempt when the body was never reached: nobody else will."""
        error = getattr(outcome, "exception", None)
        if error is None:
            self.final = True  # the next attempt would go the same way
            error = RuntimeError(
                f"{type(self.task).__name__}.__call__ ran the task itself, so nobody knows how it"
                " ended: call super().__call__(*args, **kwargs) there, not self.run()"
            )
        with suppress(Ignore):  # it is not this run's any more
            self._fail(error)

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
        ignored = self.task.ignore_result or self.options.get("ignore_result")
        kept = None if ignored else self._json(value)
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
            to_json(value)
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
                return seen_by_others(self)  # deleted or cancelled by itself, if they still see it
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
            args=args,
            kwargs=kwargs,
            queue=self.queue,
        )
        if not found:
            # A function of on_commit has raised, or nobody wants to know: it was cancelled.
            log = logger.error if self.done else logger.info
            log("durable_jobs: %s failed when its job was over", self, exc_info=error)
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
