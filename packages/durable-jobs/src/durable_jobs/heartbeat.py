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
from contextlib import contextmanager, suppress
from typing import Protocol
from uuid import UUID

from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections

from durable_jobs import transitions
from durable_jobs.attempt import Attempt
from durable_jobs.conf import conf

logger = logging.getLogger("durable_jobs.heartbeat")
# A slice whose current job takes longer than this gives its other jobs to idle workers.
PATIENCE_SECONDS = 0.2
PROGRESS_SECONDS = 1.0
FLUSH_SECONDS = 1.0


class Holder(Protocol):
    """A slice in work: what it has not started yet can be taken back."""

    def release_if_slow(self, patience: float) -> None: ...


class Heartbeat:
    """The runs of this process, and the thread that keeps them alive."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew in a forked child."""
        self.lock = threading.Lock()
        self.runs: dict[UUID, Attempt] = {}
        self.holders: set[Holder] = set()
        self.finished: list[Attempt] = []
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

    def add(self, runs: list[Attempt]) -> None:
        """Keep these alive from now on."""
        with self.lock:
            if not self.runs:
                self.next_renewal = time.monotonic() + conf.HEARTBEAT
            for run in runs:
                run.report = self.report
                self.runs[run.id] = run
            if self.thread is None and not self.manual:
                self.thread = threading.Thread(
                    target=self._work, name="durable-jobs-heartbeat", daemon=True
                )
                try:
                    self.thread.start()
                except RuntimeError as error:  # the next claim tries again
                    self.thread = None
                    logger.warning("durable_jobs: no thread for the heartbeat: %s", error)

    def drop(self, run: Attempt) -> None:
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

    def finish_later(self, run: Attempt) -> None:
        """Commit its end with those of the jobs beside it, in a moment."""
        run.ending = True
        with self.lock:
            self.finished.append(run)

    def flush(self) -> None:
        """Commit in the calling thread what has finished; what cannot be yet is tried again."""
        try:
            self._commit_finished()
        except Exception as error:
            logger.warning("durable_jobs: ends not committed yet: %r", error)
            connections[conf.DATABASE].close_if_unusable_or_obsolete()

    def report(self, run: Attempt) -> None:
        """Renew now, with the run's progress, unless that was done within the last second."""
        if time.monotonic() - run.reported > PROGRESS_SECONDS:
            run.reported = time.monotonic()
            self.next_renewal = 0.0
            if not self.manual:
                self.wake.set()
                return
            with suppress(SynchronousOnlyOperation):  # in a coroutine
                self._renew()

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
            found = transitions.finish(batch) if batch else set()
            rest = [run for run in batch if run.id not in found]
            # Somebody is enqueuing its key again and has not committed: it ends a little later.
            waits = transitions.still_mine(rest) if rest else set()
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
            holder.release_if_slow(PATIENCE_SECONDS)

    def _renew(self) -> None:
        with self.lock:
            runs = [run for run in self.runs.values() if not run.lost]
        if not runs or time.monotonic() < self.next_renewal:
            return
        renewed = transitions.renew(runs)
        self.next_renewal = time.monotonic() + conf.HEARTBEAT
        # A row that is locked was not renewed, but is not lost: nobody else can take it meanwhile.
        mine = transitions.still_mine(runs)
        for run in runs:
            # What ends meanwhile in its own thread has not lost anything.
            if run.id not in mine and run.id in self.runs and not run.over:
                run.lost = True
                logger.warning("durable_jobs: %s has lost its lease", run)
        if mine - renewed:  # soon again: its lease may be over when the lock goes
            self.next_renewal = time.monotonic() + PATIENCE_SECONDS


heartbeat = Heartbeat()
os.register_at_fork(after_in_child=heartbeat.reset)
