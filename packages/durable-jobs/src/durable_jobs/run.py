"""One attempt, from body to Celery: the body yields one outcome, `write` writes it, `tell` tells.

Succeeded    what the task returned; the job is over
Failed       an exception: another attempt, or the job is dead
HandedBack   too early, or not for this worker: it comes again, and the attempt does not count
Nothing      the job is somebody else's, or nobody's: nothing is written
"""

import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from traceback import format_exception_only
from typing import Any

from celery.exceptions import Ignore, Reject, Retry
from django.db import connections, transaction

from durable_jobs import coroutines, session, transitions
from durable_jobs.attempt import Attempt, State
from durable_jobs.conf import conf
from durable_jobs.exceptions import LeaseLost, NotYet, Permanent, stops, tellable
from durable_jobs.heartbeat import heartbeat
from durable_jobs.values import UNBOUNDED, describe, place, to_json

logger = logging.getLogger("durable_jobs.run")
# A changed signature is a deployment in progress: the job waits for the worker that knows it.
MISFIT_SECONDS = 60.0
# How much of an exception's own text is logged; the row has all of it.
SAID_CHARS = 300


@dataclass(frozen=True)
class Succeeded:
    value: Any
    #: What is kept of it in the row.
    result: Any = None
    #: The body's own `raise Ignore()`, after which Celery is to say nothing more.
    ignored: Ignore | None = None


@dataclass(frozen=True)
class Failed:
    error: BaseException
    #: Seconds until the next attempt, or the time of it as the body asked for it.
    pause: float
    eta: datetime | None = None
    final: bool = False
    #: What Celery hears whatever becomes of the job.
    told: BaseException | None = None
    #: Its success was written before, so a function of `on_commit` has raised, or the commit.
    over: bool = False
    #: What became of the job, once it is written.
    state: str = ""


@dataclass(frozen=True)
class HandedBack:
    pause: float
    cause: BaseException
    why: str
    note: str | None = None


@dataclass(frozen=True)
class Nothing:
    cause: BaseException
    why: str


Outcome = Succeeded | Failed | HandedBack | Nothing


def perform(mine: Attempt, args: Any, kwargs: Any) -> Any:
    """Run the body of a job, write how it ended and tell Celery."""
    mine.entered = True
    outcome: Outcome | None = None
    try:
        with transaction.atomic(using=conf.DATABASE) if mine.task.atomic else nullcontext():
            outcome = write(mine, body(mine, args, kwargs))
    except BaseException as error:
        if stops(error):
            raise
        session.clean()  # after the transaction of an atomic body
        outcome = write(mine, meaning(mine, error, over=outcome is not None))
    return tell(mine, outcome)


def not_entered(mine: Attempt, outcome: Any) -> None:
    """Write a failed attempt when the body was never reached: nobody else will."""
    error = getattr(outcome, "exception", None)
    if error is None:
        mine.asked.final = True  # the next attempt would go the same way
        error = RuntimeError(
            f"{type(mine.task).__name__}.__call__ ran the task itself, so nobody knows how it"
            " ended: call super().__call__(*args, **kwargs) there, not self.run()"
        )
    write(mine, meaning(mine, error))


def body(mine: Attempt, args: Any, kwargs: Any) -> Succeeded:
    """Run the task's own code; whatever is no success is raised."""
    task = mine.task
    try:
        if task.typing:
            task.__header__(*args, **kwargs)
    except TypeError as error:
        logger.error("durable_jobs: %s does not fit this worker's signature: %s", mine, error)
        why = f"waits for a worker that knows its signature: {error}"
        raise NotYet(MISFIT_SECONDS, why) from error
    value, ignored = None, None
    try:
        value = coroutines.done(task.run(*args, **kwargs))
    except Ignore as ignore:
        ignored = ignore
    finally:
        session.clean()
    if mine.asked.retry:  # self.retry(throw=False)
        raise mine.asked.retry
    if task.ignore_result or mine.options.get("ignore_result"):
        return Succeeded(value, ignored=ignored)
    try:
        to_json(value)
    except (TypeError, ValueError) as error:
        mine.asked.final = True  # another attempt would do the work again and return the same
        text = f"it returned what is not JSON (ignore_result=True keeps nothing): {error}"
        raise TypeError(text) from error
    return Succeeded(value, value, ignored)


def meaning(mine: Attempt, error: BaseException, *, over: bool = False) -> Outcome:
    """Return what an exception says of the attempt."""
    if isinstance(error, LeaseLost):
        logger.warning("durable_jobs: %s", error)
        return Nothing(error, str(error))
    if isinstance(error, NotYet):
        return HandedBack(error.pause, error, str(error), note=str(error))
    if isinstance(error, Reject) and error.requeue:
        return HandedBack(0, error, "handed back by Reject(requeue=True)")
    told = error if isinstance(error, Retry | Reject) else None
    when = error.when if isinstance(error, Retry) else None
    cause = (error.exc or error) if isinstance(error, Retry) else error
    task = mine.task
    permanent = (Permanent, *(task.throws or ()), *getattr(task, "dont_autoretry_for", ()))
    return Failed(
        cause,
        pause=when if isinstance(when, int | float) else _backoff(mine.attempts),
        eta=when if isinstance(when, datetime) else None,
        final=mine.asked.final or isinstance(error, Reject) or isinstance(cause, permanent),
        told=told,
        over=over,
    )


def _backoff(attempts: int) -> float:
    pause = min(conf.BACKOFF_MAX, conf.BACKOFF_MIN * 2 ** min(attempts - 1, 20))
    return float(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads load


def write(mine: Attempt, outcome: Outcome) -> Outcome:
    """Write how the attempt ended; return the outcome as it then is.

    Raises LeaseLost or NotYet where a success cannot be written: an atomic body is rolled back.
    """
    mine.over = True
    match outcome:
        case Succeeded():
            _finish(mine, outcome.result)
        case Failed():
            return _fail(mine, outcome)
        case HandedBack():
            while not transitions.release([mine], outcome.pause, outcome.note):
                if not transitions.still_mine([mine]):
                    break
                time.sleep(0.1)  # its row is locked by another transaction
    return outcome


def tell(mine: Attempt, outcome: Outcome) -> Any:
    """Return the value, or raise what makes Celery report what the row says."""
    match outcome:
        case Succeeded():
            if outcome.ignored:
                raise outcome.ignored
            return outcome.value
        case Failed():
            if outcome.told:
                raise outcome.told
            error = outcome.error
            if outcome.state == State.DEAD:
                raise tellable(error)
            text = f"attempt {mine.attempts} failed: {error!r}"
            raise Retry(text, error, outcome.pause) from error
        case _:
            raise Ignore(outcome.why) from outcome.cause


def _finish(mine: Attempt, result: Any) -> None:
    if mine.task.atomic:
        _finish_inside(mine, result)
    elif mine.shared and result is None:
        heartbeat.finish_later(mine)
    elif not transitions.finish([mine], result):
        if transitions.still_mine([mine]) and result is None:
            # Somebody holds the row, and this process has other work to do.
            heartbeat.finish_later(mine)
        elif not transitions.finish([mine], result, wait=True):
            raise _lost(mine)


def _finish_inside(mine: Attempt, result: Any) -> None:
    """Finish in the task's transaction, whose locks nobody must have to wait for long.

    Somebody may hold the job's row, to cancel it, and wait for a row this task has written.
    """
    for _ in range(10):
        if transitions.finish([mine], result):
            return
        if not transitions.still_mine([mine]):
            if _seen_by_others(mine):
                return  # deleted or cancelled by itself
            raise _lost(mine)
        time.sleep(0.05)
    raise NotYet(1.0, "its row was locked by another transaction when it ended")


def _lost(mine: Attempt) -> LeaseLost:
    return LeaseLost(f"{mine} had lost its lease when it ended")


def _fail(mine: Attempt, failed: Failed) -> Outcome:
    error = failed.error
    state = transitions.fail(
        mine, describe(error), failed.pause, final=failed.final, eta=failed.eta
    )
    if state is None:
        # A function of on_commit has raised, or nobody wants to know: it was cancelled.
        log = logger.error if failed.over else logger.info
        log("durable_jobs: %s failed when its job was over", mine, exc_info=error)
        return Nothing(error, f"{mine} had lost its lease when it failed: {error!r}")
    again = f"the next comes at {failed.eta}" if failed.eta else f"the next in {failed.pause:.0f} s"
    coming = again if state == State.SCHEDULED else f"the job is {state}"
    limit = max(mine.max_attempts, mine.asked.limit)
    name = f"{mine} of {limit}" if limit < UNBOUNDED else str(mine)
    said = " ".join("".join(format_exception_only(error)).split())[:SAID_CHARS]
    text = "durable_jobs: %s failed at %s: %s; %s. See `manage.py jobs show %s`"
    logger.warning(text, name, place(error), said, coming, mine.id)
    return replace(failed, state=state)


def _seen_by_others(mine: Attempt) -> bool:
    """Return whether the job is the run's in what is committed: as another connection sees it.

    If it is, and its own transaction finds it deleted or cancelled, that transaction did it. All
    others have to wait for it, so committing it ends the job.
    """
    if heartbeat.manual:  # a test, in which nobody else works
        return True

    def look() -> bool:
        try:
            return bool(transitions.still_mine([mine]))
        finally:
            connections[conf.DATABASE].close()

    with ThreadPoolExecutor(1) as other:
        return other.submit(look).result()
