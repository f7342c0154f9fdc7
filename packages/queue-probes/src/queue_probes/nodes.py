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

from queue_probes.conf import conf
from queue_probes.models import Node, Queue
from queue_probes.tasks import RELEASE

logger = logging.getLogger("queue_probes")
# A fork waits at most this long for the thread.
FORK_SECONDS = 1.0


class Gate:
    """Keeps the pool's children from being born while the thread holds some lock of a library."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held = False

    def close(self) -> None:
        self.held = self.lock.acquire(timeout=FORK_SECONDS)

    def open(self) -> None:
        if self.held:
            self.held = False
            self.lock.release()


class Reporter:
    """Describes the worker of this process; does nothing in a process that is no worker."""

    def __init__(self) -> None:
        self.consumer: Any = None
        self.gate = Gate()
        self.started = 0
        self.ended = False

    def start(self, sender: Any, **_: Any) -> None:
        """Begin; Celery calls it again each time it has found its broker again."""
        first, self.consumer = self.consumer is None, sender
        if not first:
            return
        gate = self.gate
        os.register_at_fork(before=gate.close, after_in_parent=gate.open, after_in_child=gate.open)
        atexit.register(self.leave, os.getpid())
        threading.Thread(target=self.run, name="queue_probes", daemon=True).start()

    def run(self) -> None:
        from queue_probes import incidents

        pause = threading.Event()
        while True:
            try:
                with self.gate.lock:
                    self.report()
                    incidents.teller.look()
            except Exception as error:  # a database that is away; others see that we are silent
                logger.warning("queue_probes: this worker cannot report: %r", error)
                connection.close()  # and only then: the session shows that this process exists
            pause.wait(conf.NODE)

    def report(self) -> None:
        """Write the row of this worker."""
        consumer = self.consumer
        if self.ended:
            return
        starts = [request.time_start for request in list(state.active_requests)]
        oldest = min((start for start in starts if start), default=None)
        age = timedelta(seconds=max(0.0, time.time() - oldest)) if oldest else None
        connection.ensure_connection()
        node = Node(
            name=consumer.hostname[:200],
            queues=sorted(consumer.app.amqp.queues.consume_from),
            pid=os.getpid(),
            release=RELEASE[:100],
            slots=getattr(consumer.pool, "limit", 0) or 0,
            active=len(starts),
            stopped=stopped(consumer.pool),
            oldest_at=Now() - age if age is not None else None,
            backend=backend(),
            seen_at=Now(),
        )
        changing = [
            field.name for field in Node._meta.fields if field.name not in ("name", "started_at")
        ]
        Node.objects.bulk_create(
            [node], update_conflicts=True, unique_fields=["name"], update_fields=changing
        )
        # By worker, and not by queue: what one of its queues starts, the others wait for.
        if state.all_total_count[0] != self.started:
            self.started = state.all_total_count[0]
            Queue.objects.filter(name__in=node.queues).update(moved_at=Now())

    def leave(self, pid: int) -> None:
        """Take the row away: this worker ends because somebody wanted it to."""
        if pid == os.getpid():
            self.ended = True
            try:
                Node.objects.filter(name=self.consumer.hostname, pid=pid).delete()
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


def backend() -> int | None:
    """Return the process of PostgreSQL that serves this connection."""
    info = getattr(connection.connection, "info", None)
    return getattr(info, "backend_pid", None)


reporter = Reporter()


def connect() -> None:
    """Listen to Celery; called once, when Django has loaded its apps."""
    signals.worker_ready.connect(reporter.start, weak=False)
