"""Sends a probe to each queue, from beat, and notes when a worker has taken it.

At most one probe of a queue is on its way; a missing answer is the signal. It is sent again, with
the same id, at doubled intervals, in case the broker has lost it: what piles up in a queue without
a worker grows with the logarithm of the time, and all but the first to arrive do nothing.
"""

import logging
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import celery
from celery import current_app, shared_task, signals
from celery.exceptions import QueueNotFound
from django.db import Error, connection, transaction
from django.db.models import F
from django.db.models.functions import Coalesce, Now

from queue_probes.conf import RELEASE, conf, known, queues
from queue_probes.incidents import teller
from queue_probes.jobs import sample
from queue_probes.models import BOUNDS, Node, Queue, Sample
from queue_probes.tally import tally

logger = logging.getLogger("queue_probes")
NODE_KEPT = timedelta(days=1)
# By the kind of broker: after how many seconds an operation gives up.
LIMITS = {
    "redis": {"socket_timeout": 2, "socket_connect_timeout": 2, "max_retries": 0},
    "amqp": {"read_timeout": 2, "write_timeout": 2},
}


class ProbeTask(celery.Task):
    """Beat's call of the task only shows that its scheduler turns; the thread below sends."""

    abstract = True
    durable = False  # on purpose: a probe is a message, and says so to the check of durable_jobs

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        if not args and not kwargs:
            sender.ticked = time.monotonic()
            return None
        return super().apply_async(args, kwargs, **options)


# Plain Celery, since what it proves is that messages arrive.
@shared_task(
    base=ProbeTask,
    bind=True,
    name="queue_probes.probe",
    ignore_result=True,
    acks_late=False,
    time_limit=30,
    soft_time_limit=20,
)
def probe(self: Any, queue: str = "", asked: str = "") -> None:
    """Note the arrival of a probe; called without arguments, by beat, it sends them."""
    arrived(queue, asked, self.request.hostname or "")


class Sender:
    """A thread of beat. In the scheduler itself a broker that hangs would hold the probes up."""

    def __init__(self) -> None:
        self.ticked = time.monotonic()

    def start(self, **_: Any) -> None:
        self.ticked = time.monotonic()
        threading.Thread(target=self.run, name="queue_probes", daemon=True).start()

    def run(self) -> None:
        pause = threading.Event()
        while True:
            try:
                visit(alive=time.monotonic() - self.ticked < 3 * conf.INTERVAL)
                teller.look()
                tally()
                sample()
            except Exception as error:  # a database that is away, for one; what it knows is stale
                logger.warning("queue_probes: not sent: %r", error)
                connection.close()
            pause.wait(conf.INTERVAL)


sender = Sender()
signals.beat_init.connect(sender.start, weak=False)
signals.beat_embedded_init.connect(sender.start, weak=False)


def visit(*, alive: bool = True) -> None:
    """Ask the broker for the depth of each queue and send the probes that are due.

    `alive`: whether beat's scheduler turns. While the broker is away it may hang for a while.
    """
    names = queues()
    Queue.objects.bulk_create([Queue(name=name) for name in names], ignore_conflicts=True)
    rows = Queue.objects.filter(name__in=names)
    if alive:
        rows.update(seen_at=Now())
    try:
        for name in names:
            if not known(name):  # this one alone
                note_failure(rows.filter(name=name), QueueNotFound(name))
                continue
            # One for each: after a refusal RabbitMQ's is of no more use.
            with broker() as connected:
                try:
                    look_after(name, connected)
                except connected.channel_errors as error:  # the broker refuses this queue alone
                    note_failure(rows.filter(name=name), error)
    except Error:
        raise
    except Exception as error:  # whatever a broker client raises
        rows.update(seen_at=Now())
        note_failure(rows, error)
    Sample.objects.filter(at__lt=Now() - timedelta(seconds=conf.RETENTION)).delete()
    Node.objects.filter(seen_at__lt=Now() - NODE_KEPT).delete()


def look_after(name: str, connected: Any) -> None:
    """Send the probe of a queue if it is due, and note how many messages wait there."""
    row = Queue.objects.filter(name=name)
    if asked := due(name):
        try:
            probe.apply_async((name, str(asked)), queue=name, connection=connected, retry=False)
        except Exception:
            row.filter(sends=1).update(outstanding_since=None)  # the next visit sends it
            raise
    row.update(depth=depth(name, connected), failing_since=None, failure="")


def note_failure(rows: Any, error: Exception) -> None:
    rows.update(failing_since=Coalesce("failing_since", Now()), failure=type(error).__name__[:100])


def broker() -> Any:
    """Return a connection that gives up soon, whatever the broker does."""
    app = current_app._get_current_object()
    driver = app.connection_for_write().transport.driver_type
    options = {**app.conf.broker_transport_options, **LIMITS.get(driver, {})}
    connected = app.connection_for_write(transport_options=options, connect_timeout=2)
    connected.ensure_connection(max_retries=0, timeout=2)
    return connected


def due(name: str) -> uuid.UUID | None:
    """Note that a probe of this queue is sent now, and return its id; None when it is too early."""
    row = Queue.objects.filter(name=name)
    fresh = uuid.uuid4()
    new = {"probe": fresh, "outstanding_since": Now(), "sent_at": Now(), "sends": 1}
    if row.filter(outstanding_since=None).update(**new):
        return fresh
    found = row.get()
    wait = min(conf.RESEND * 2 ** max(found.sends - 1, 0), conf.RESEND_MAX)
    if found.depth == 0:  # taken by somebody, or lost: sending it again piles nothing up
        wait = conf.RESEND
    again = row.filter(
        probe=found.probe, sends=found.sends, sent_at__lt=Now() - timedelta(seconds=wait)
    ).exclude(outstanding_since=None)
    return found.probe if again.update(sent_at=Now(), sends=F("sends") + 1) else None


def depth(name: str, connected: Any) -> int:
    """Return how many messages wait in the queue, without those a worker has taken."""
    with connected.channel() as channel:
        try:
            found = current_app.amqp.queues[name](channel).queue_declare(passive=True)
            return int(found.message_count)
        except connected.channel_errors:  # it does not exist: on Redis it is empty
            return 0


def arrived(name: str, asked: str, worker: str) -> None:
    """Note that a worker took the probe, unless it had been answered before."""
    with transaction.atomic():
        rows = Queue.objects.filter(name=name, probe=asked).exclude(outstanding_since=None)
        row = rows.select_for_update().annotate(now=Now()).first()
        if row is None or row.outstanding_since is None:
            return
        latency = max(0.0, (row.now - row.outstanding_since).total_seconds())
        row.buckets[next(slot for slot, bound in enumerate(BOUNDS) if latency <= bound)] += 1
        rows.update(
            outstanding_since=None,
            answered_at=Now(),
            latency=latency,
            worker=worker[:200],
            release=RELEASE[:100],
            answers=F("answers") + 1,
            seconds=F("seconds") + latency,
            buckets=row.buckets,
        )
        Sample.objects.create(queue=name, latency=latency)
