"""One thread per process that speaks to the database while tasks run.

It renews the leases of all runs in one statement and notices which were lost; commits finished jobs
of a slice together, as many as pile up while the last commit was under way; and hands the rest of a
slice back when one of its jobs turns out slow. Its connection is its own, so it never waits for a
task's transaction. It does not help against code that holds the GIL for longer than the lease: such
a job runs twice at the same time, and the first run is fenced off.
"""

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from celery.utils.log import get_logger
from django.db import connections
from kombu.utils.json import dumps

from durable_jobs import dialect, statements
from durable_jobs.conf import conf
from durable_jobs.publisher import publisher

if TYPE_CHECKING:
    from uuid import UUID

    from durable_jobs.run import Run

logger = get_logger("durable_jobs.heartbeat")
# A slice whose current job takes longer than this gives its other jobs to idle workers.
PATIENCE_SECONDS = 0.2
PROGRESS_SECONDS = 1.0


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
        self.committed = threading.Condition(self.lock)
        self.wake = threading.Event()
        self.thread: threading.Thread | None = None
        self.next_renewal = 0.0

    def add(self, runs: list["Run"]) -> None:
        """Keep these alive from now on."""
        with self.lock:
            if not self.runs:
                self.next_renewal = time.monotonic() + conf.HEARTBEAT
            self.runs.update((run.id, run) for run in runs)
            if self.thread is None:
                self.thread = threading.Thread(
                    target=self._work, name="durable-jobs-heartbeat", daemon=True
                )
                self.thread.start()

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
        """Commit its end as soon as possible, together with others."""
        with self.lock:
            self.finished.append(run)
        self.wake.set()

    def flush(self) -> None:
        """Wait until nothing that finished is uncommitted; a lost database ends the wait."""
        with self.lock:
            self.committed.wait_for(lambda: not self.finished, timeout=conf.LEASE)

    def report(self, run: "Run") -> None:
        """Renew now, with the run's progress, unless that was done within the last second."""
        if time.monotonic() - run.reported > PROGRESS_SECONDS:
            run.reported = time.monotonic()
            self.next_renewal = 0.0
            self.wake.set()

    def _work(self) -> None:
        while True:
            pause = self.next_renewal - time.monotonic() if self.runs else conf.HEARTBEAT
            if self.holders:
                pause = min(pause, PATIENCE_SECONDS / 4)
            self.wake.wait(max(pause, 0))
            self.wake.clear()
            try:
                self._commit_finished()
                self._relieve()
                self._renew()
            except Exception as error:
                # The next beat tries again; what stays silent for a whole lease is run again.
                logger.warning("durable_jobs: heartbeat failed: %r", error)
                connections[conf.DATABASE].close()
                time.sleep(1)

    def _commit_finished(self) -> None:
        batch = list(self.finished)
        if not batch:
            return
        found = finish(batch)
        with self.lock:
            del self.finished[: len(batch)]
            for run in batch:
                self.runs.pop(run.id, None)
            self.committed.notify_all()
        for run in batch:
            if run.id not in found:
                logger.warning("durable_jobs: %s had lost its lease when it ended", run)

    def _relieve(self) -> None:
        for holder in list(self.holders):
            holder.surrender_if_slow(PATIENCE_SECONDS)

    def _renew(self) -> None:
        with self.lock:
            runs = [run for run in self.runs.values() if not run.lost]
        if not runs or time.monotonic() < self.next_renewal:
            return
        pairs: dict[str, Any] = {
            "ids": [run.id for run in runs],
            "tokens": [run.token for run in runs],
        }
        dialect.run(
            statements.RENEW,
            progress=[run.progress for run in runs],
            messages=[run.message for run in runs],
            **pairs,
        )
        self.next_renewal = time.monotonic() + conf.HEARTBEAT
        # A row that is locked was not renewed, but is not lost: nobody else can take it meanwhile.
        mine = {dialect.uuid(job) for (job,) in dialect.run(statements.STILL_MINE, **pairs)}
        for run in runs:
            if run.id not in mine and run.id in self.runs:
                run.lost = True
                logger.warning("durable_jobs: %s has lost its lease", run)


def finish(runs: list["Run"], result: Any = None) -> "set[UUID]":
    """End runs as succeeded and return the ids still theirs; those to run again are published."""
    found = dialect.hints(
        statements.FINISH,
        ids=[run.id for run in runs],
        tokens=[run.token for run in runs],
        result=None if result is None else dumps(result),
    )
    if again := [hint for hint in found if hint.state == "queued"]:
        publisher.send(again)
    return {hint.id for hint in found}


heartbeat = Heartbeat()
os.register_at_fork(after_in_child=heartbeat.reset)
