"""Writes the calls of beat from a thread of its own: no other entry waits for the database.

Beat drops a call that raises, so none is given up because of a connection: the thread writes them
in order, each once, and waits while the database is away. They are lost when beat itself is killed
meanwhile.
"""

import atexit
import logging
import threading
import time
from collections import deque
from typing import Any

from celery import signals
from django.db import DataError, Error, IntegrityError, OperationalError, connections

from durable_jobs.conf import conf
from durable_jobs.database import LockedError, brief_locks

logger = logging.getLogger("durable_jobs.beat")
# Calls that are kept; those that come when there are so many are refused, and beat logs each.
MOST = 10_000
PAUSE_SECONDS = 1.0
# How long a call waits for a lock before others have their turn.
LOCK_SECONDS = 1.0


class Writer:
    """One in the process of beat; in others it takes nothing."""

    def __init__(self) -> None:
        self.calls: deque[Any] = deque()
        self.wake = threading.Event()
        self.beat: threading.Thread | None = None
        self.failing = False

    def start(self) -> None:
        """Serve the calling thread from now on."""
        self.beat = threading.current_thread()
        threading.Thread(target=self._run, name="durable-jobs-beat", daemon=True).start()
        atexit.register(self.finish)

    def takes(self, call: Any) -> bool:
        """Take a call of beat's thread, unless it is part of a transaction there."""
        if (
            self.beat is not threading.current_thread()
            or connections[conf.DATABASE].in_atomic_block
        ):
            return False
        if len(self.calls) >= MOST:
            raise OperationalError(f"{MOST} periodic calls wait for the database already")
        self.calls.append(call)
        self.wake.set()
        return True

    def finish(self) -> None:
        """Wait a moment at the end of the process; say what is lost."""
        until = time.monotonic() + conf.PUBLISH_FLUSH
        while self.calls and time.monotonic() < until:
            time.sleep(0.02)
        if self.calls:
            logger.error("durable_jobs: %s periodic calls end with beat", len(self.calls))

    def _run(self) -> None:
        connections[conf.DATABASE].execute_wrappers.append(briefly)
        while self.wake.wait():
            self.wake.clear()
            while self.calls:
                if self._settled(self.calls[0]):
                    self.calls.popleft()
                else:
                    time.sleep(PAUSE_SECONDS)

    def _settled(self, call: Any) -> bool:
        """Write it; return False if it has to wait."""
        call.late = time.monotonic() - call.made
        try:
            call.write()
            self.failing = False
        except Exception as error:
            # These are about this call alone, and would come again.
            alone = isinstance(error, LockedError | DataError | IntegrityError)
            if alone or not isinstance(error, Error):
                logger.error("durable_jobs: periodic call of %s is dropped: %r", call.task, error)
                return True
            if not self.failing:
                logger.error("durable_jobs: periodic calls wait for the database: %r", error)
            self.failing = True
            connections[conf.DATABASE].close()
            return False
        return True


def briefly(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
    """Write a periodic call in time or not at all.

    Only its key can make it wait: a caller has not committed a call with the same one. Once that
    commits there is a live job by that key, which is all the periodic call asks for.
    """
    if "durable_jobs_job" not in sql:
        return execute(sql, params, many, context)
    with brief_locks(LOCK_SECONDS):
        return execute(sql, params, many, context)


writer = Writer()


@signals.beat_init.connect(weak=False)
def on_beat(**_: Any) -> None:
    writer.start()
