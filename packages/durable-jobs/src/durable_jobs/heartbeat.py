"""One thread per process that speaks to the database while tasks run.

It renews the leases of all runs in one statement and notices which were lost; commits the finished
jobs of a slice that takes long; and hands the rest of the slice back when one of its jobs turns out
slow. Its connection is its own, so it never waits for a task's transaction. It does not help
against code that holds the GIL for longer than the lease: such a job runs twice at the same time,
and the first run is fenced off.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from django.db import DataError, OperationalError, connections, transaction
from kombu.utils.json import dumps

from durable_jobs import dialect, statements
from durable_jobs.conf import conf
from durable_jobs.publisher import publisher

if TYPE_CHECKING:
    from uuid import UUID

    from durable_jobs.run import Run

logger = logging.getLogger("durable_jobs.heartbeat")
# A slice whose current job takes longer than this gives its other jobs to idle workers.
PATIENCE_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
FLUSH_SECONDS = 1.0
# How long beat waits for a lock before it turns to other things.
LOCK_SECONDS = 1.0
RENEW = f"{statements.RENEW} RETURNING {statements.T}.id"


class Holder(Protocol):
    """A slice in work: what it has not started yet can be taken back."""

    def surrender_if_slow(self, patience: float) -> None: ...


class Heartbeat:
    """The runs of this process, and the thread that keeps them alive."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew in a forked child."""
        self.lock = threading.Lock()
        self.runs: dict[UUID, Run] = {}
        self.holders: set[Holder] = set()
        self.finished: list[Run] = []
        self.committing = threading.Lock()
        self.wake = threading.Event()
        self.thread: threading.Thread | None = None
        self.manual = False
        self.next_renewal = 0.0

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """For tests: no thread, whose connection would not see what a test has not committed."""
        self.manual = True
        try:
            yield
        finally:
            self.manual = False

    def add(self, runs: list["Run"]) -> None:
        """Keep these alive from now on."""
        with self.lock:
            if not self.runs:
                self.next_renewal = time.monotonic() + conf.HEARTBEAT
            self.runs.update((run.id, run) for run in runs)
            if self.thread is None and not self.manual:
                self.thread = threading.Thread(
                    target=self._work, name="durable-jobs-heartbeat", daemon=True
                )
                try:
                    self.thread.start()
                except RuntimeError as error:  # the next claim tries again
                    self.thread = None
                    logger.warning("durable_jobs: no thread for the heartbeat: %s", error)

    def drop(self, run: "Run") -> None:
        """It ended, or was given back."""
        with self.lock:
            self.runs.pop(run.id, None)

    def watch(self, holder: Holder) -> None:
        with self.lock:
            self.holders.add(holder)
        self.wake.set()

    def unwatch(self, holder: Holder) -> None:
        with self.lock:
            self.holders.discard(holder)

    def finish_later(self, run: "Run") -> None:
        """Commit its end with those of the jobs beside it, in a moment."""
        with self.lock:
            self.finished.append(run)

    def flush(self) -> None:
        """Commit in the calling thread what has finished; what cannot be yet is tried again."""
        try:
            self._commit_finished()
        except Exception as error:
            logger.warning("durable_jobs: ends not committed yet: %r", error)
            connections[conf.DATABASE].close_if_unusable_or_obsolete()

    def report(self, run: "Run") -> None:
        """Renew now, with the run's progress, unless that was done within the last second."""
        if time.monotonic() - run.reported > PROGRESS_SECONDS:
            run.reported = time.monotonic()
            self.next_renewal = 0.0
            self._renew() if self.manual else self.wake.set()

    def _work(self) -> None:
        while True:
            pause = self.next_renewal - time.monotonic() if self.runs else conf.HEARTBEAT
            if self.holders or self.finished:
                pause = min(pause, PATIENCE_SECONDS / 4)
            if not self.wake.wait(max(pause, 0)) and not (self.runs or self.finished):
                connections[conf.DATABASE].close()  # an idle process needs one connection, not two
            self.wake.clear()
            if self.manual:
                continue
            for step in (self._renew, self._commit_finished, self._relieve):
                try:
                    step()
                except Exception as error:
                    # The next beat tries again; what is silent for a whole lease is run again.
                    logger.warning("durable_jobs: heartbeat failed: %r", error)
                    connections[conf.DATABASE].close()
                    time.sleep(1)

    def _commit_finished(self) -> None:
        if not self.finished or not self.committing.acquire(timeout=FLUSH_SECONDS):
            return
        try:
            with self.lock:
                batch = list(self.finished)
            found = finish(batch, statement=statements.FINISH_FREE) if batch else set()
            rest = [run for run in batch if run.id not in found]
            # Somebody is enqueuing its key again and has not committed: it ends a little later.
            waits = still_mine(rest) if rest else set()
            with self.lock:
                self.finished[: len(batch)] = [run for run in rest if run.id in waits]
                for run in batch:
                    if run.id not in waits:
                        self.runs.pop(run.id, None)
        finally:
            self.committing.release()
        for run in rest:
            if run.id not in waits:
                logger.warning("durable_jobs: %s had lost its lease when it ended", run)

    def _relieve(self) -> None:
        for holder in list(self.holders):
            holder.surrender_if_slow(PATIENCE_SECONDS)

    def _renew(self) -> None:
        with self.lock:
            runs = [run for run in self.runs.values() if not run.lost]
        if not runs or time.monotonic() < self.next_renewal:
            return
        renewed = renew(runs)
        self.next_renewal = time.monotonic() + conf.HEARTBEAT
        # A row that is locked was not renewed, but is not lost: nobody else can take it meanwhile.
        mine = still_mine(runs)
        for run in runs:
            if run.id not in mine and run.id in self.runs:
                run.lost = True
                logger.warning("durable_jobs: %s has lost its lease", run)
        if mine - renewed:  # soon again: its lease may be over when the lock goes
            self.next_renewal = time.monotonic() + PATIENCE_SECONDS


class LockedError(OperationalError):
    """Somebody holds the row, or the key, in an open transaction."""


@contextmanager
def brief_locks(seconds: float) -> Iterator[None]:
    """Raise LockedError rather than wait longer for a lock, in a transaction; on PostgreSQL only.

    In a transaction of the caller's it changes nothing.
    """
    connection = connections[conf.DATABASE]
    if connection.vendor != "postgresql" or connection.in_atomic_block:
        yield
        return
    try:
        with transaction.atomic(using=conf.DATABASE):
            dialect.run("SELECT set_config('lock_timeout', %(wait)s, true)", wait=f"{seconds}s")
            yield
    except OperationalError as error:
        if getattr(error.__cause__, "sqlstate", None) != "55P03":
            raise
        raise LockedError(str(error)) from error


def renew(runs: list["Run"]) -> "set[UUID]":
    """Renew those leases whose rows are free, and write the progress; return their ids."""

    def attempt() -> "set[UUID]":
        progress: dict[str, Any] = {
            "progress": [run.progress for run in runs],
            "messages": [run.message for run in runs],
        }
        return {dialect.uuid(job) for (job,) in dialect.run(RENEW, **progress, **pairs(runs))}

    try:
        return attempt()
    except (DataError, UnicodeError):  # what one job says must not cost the others their leases
        for run in runs:
            run.message = ""
        return attempt()


def pairs(runs: list["Run"]) -> dict[str, Any]:
    """Return the parameters that fence a statement."""
    return {"ids": [run.id for run in runs], "tokens": [run.token for run in runs]}


def still_mine(runs: list["Run"]) -> "set[UUID]":
    return {dialect.uuid(job) for (job,) in dialect.run(statements.STILL_MINE, **pairs(runs))}


def finish(runs: list["Run"], result: Any = None, *, statement: str | None = None) -> "set[UUID]":
    """End runs as succeeded and return the ids still theirs; those to run again are published."""
    found = dialect.hints(
        statement or statements.FINISH,
        result=None if result is None else dumps(result),
        **pairs(runs),
    )
    if again := [hint for hint in found if hint.state == "queued"]:
        # An atomic task's transaction is still open.
        transaction.on_commit(partial(publisher.send, again), using=conf.DATABASE)
    return {hint.id for hint in found}


heartbeat = Heartbeat()
os.register_at_fork(after_in_child=heartbeat.reset)
