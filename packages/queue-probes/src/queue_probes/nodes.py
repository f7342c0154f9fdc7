"""What a worker says of itself: a thread of its main process writes a row every few seconds.

A worker that is stopped properly deletes its row. One that was killed leaves it behind, and its
session at the database ends with it; one that hangs, or is frozen, keeps the session.
"""

import atexit
import contextlib
import logging
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import signals
from celery.worker import state
from django.db import connection
from django.db.models.functions import Now

from queue_probes.conf import RELEASE, conf
from queue_probes.incidents import teller
from queue_probes.models import Node, Queue

logger = logging.getLogger("queue_probes")
# A fork waits at most this long for the thread.
FORK_SECONDS = 1.0


class Reporter:
    """Describes the worker of this process; does nothing in a process that is no worker."""

    def __init__(self) -> None:
        self.consumer: Any = None
        # The pool's children are not born while the thread holds some lock of a library.
        self.gate = threading.Lock()
        self.forking = False
        self.started = 0
        self.ended = False

    def start(self, sender: Any, **_: Any) -> None:
        """Begin; Celery calls it again each time it has found its broker again."""
        first, self.consumer = self.consumer is None, sender
        if not first:
            return
        after = self.after_fork
        os.register_at_fork(before=self.before_fork, after_in_parent=after, after_in_child=after)
        atexit.register(self.leave, os.getpid())
        threading.Thread(target=self.run, name="queue_probes", daemon=True).start()

    def before_fork(self) -> None:
        self.forking = self.gate.acquire(timeout=FORK_SECONDS)

    def after_fork(self) -> None:
        if self.forking:
            self.forking = False
            self.gate.release()

    def run(self) -> None:
        pause = threading.Event()
        while True:
            try:
                with self.gate:
                    self.report()
                    teller.look()
            except Exception as error:  # a database that is away; others see that we are silent
                logger.warning("queue_probes: this worker cannot report: %r", error)
                connection.close()  # and only then: the session shows that this process exists
            pause.wait(conf.NODE)

    def report(self) -> None:
        """Write the row of this worker."""
        if self.ended:
            return
        consumer = self.consumer
        starts = [request.time_start for request in list(state.active_requests)]
        oldest = min(filter(None, starts), default=None)
        connection.ensure_connection()
        served = sorted(consumer.app.amqp.queues.consume_from)
        facts = {
            "queues": served,
            "pid": os.getpid(),
            "release": RELEASE[:100],
            "slots": getattr(consumer.pool, "limit", 0) or 0,
            "active": len(starts),
            "stopped": stopped(consumer.pool),
            "oldest_at": oldest and Now() - timedelta(seconds=max(0.0, time.time() - oldest)),
            # The process of PostgreSQL that serves this connection.
            "backend": getattr(getattr(connection.connection, "info", None), "backend_pid", None),
            "seen_at": Now(),
        }
        Node.objects.bulk_create(
            [Node(name=consumer.hostname[:200], **facts)],
            update_conflicts=True,
            unique_fields=["name"],
            update_fields=list(facts),
        )
        # By worker, and not by queue: what one of its queues starts, the others wait for.
        if state.all_total_count[0] != self.started:
            self.started = state.all_total_count[0]
            Queue.objects.filter(name__in=served).update(moved_at=Now())

    def leave(self, pid: int) -> None:
        """Take the row away: this worker ends because somebody wanted it to."""
        if pid == os.getpid():
            self.ended = True
            try:
                Node.objects.filter(name=self.consumer.hostname[:200], pid=pid).delete()
            except Exception as error:
                logger.warning("queue_probes: this worker cannot say that it ends: %r", error)
            connection.close()


def stopped(pool: Any) -> int:
    """Return how many processes of the pool are stopped; 0 where there are none, or no /proc."""
    count = 0
    for process in getattr(getattr(pool, "_pool", None), "_pool", ()):
        with contextlib.suppress(OSError):  # it has just ended
            stat = Path(f"/proc/{process.pid}/stat").read_bytes()
            count += stat.rpartition(b") ")[2][:1] == b"T"
    return count


reporter = Reporter()
signals.worker_ready.connect(reporter.start, weak=False)
