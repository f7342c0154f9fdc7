"""Publishes wake-up hints from a thread of its own, so that a broker never costs the caller time.

A hint is a Celery message with the task's name, the job's id and no arguments. It may be dropped,
doubled or late: the row stays queued and the reconcile loop sends another. So nothing here is
retried for long, nothing blocks, and a broker that is down or frozen is left alone for a while.
"""

import atexit
import heapq
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID

from celery import current_app
from celery.utils.nodenames import anon_nodename
from django.conf import settings
from kombu import Queue

from durable_jobs.conf import conf
from durable_jobs.values import decode

logger = logging.getLogger("durable_jobs.publisher")
# Two messages at least, so that an idle worker can start beside a busy one. A worker that finds the
# jobs of a message to be long ones passes the rest on (run.py).
SPREAD = 2
# While hints keep coming they are collected this long; the first one after a pause goes at once.
COLLECT_SECONDS = 0.01
# Delays up to this are timed here, to the moment; the loop starts what is left to it within a tick.
HORIZON_SECONDS = 60.0
# A hint must not come before its job is due, by the database's clock.
LATE_SECONDS = 0.02
PAUSES = (0.5, 1, 2, 5, 10, 30)
# What Redis answers when it takes nothing at all; any other refusal is about one queue.
OF_THE_BROKER = ("OutOfMemory", "ReadOnly", "ClusterDown", "MasterDown", "MISCONF", "NOREPLICAS")
EMPTY_BODY: tuple[list[Any], dict[str, Any], dict[str, None]] = (
    [],
    # No task takes this: a worker that knows it as a plain one fails instead of running it.
    {"wake-up of a durable job": None},
    {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
)


class Hint(NamedTuple):
    """What a wake-up message needs to know of a job; `args` and `kwargs` are JSON."""

    id: UUID
    task: str
    queue: str
    options: dict[str, Any]
    args: str
    kwargs: str
    attempts: int = 0
    state: str = "queued"

    @property
    def task_id(self) -> str:
        """What Celery calls the job: the id that the call was given, or the row's."""
        return self.options.get("id") or str(self.id)


class Publisher:
    """One per process; `send` is all a caller sees, and it only appends to a queue."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew, as a forked child must: its parent's thread and connection are not its."""
        most = conf.PUBLISH_BACKLOG if settings.configured else None
        self.hints: deque[Hint] = deque(maxlen=most)
        self.timers: list[tuple[float, int, Hint]] = []
        self.numbers = count()
        self.wake = threading.Event()
        self.idle = threading.Event()
        self.idle.set()
        self.start_lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.failures = 0
        self.process = os.getpid()
        self.producer: Any = None

    def send(self, hints: Iterable[Hint]) -> None:
        """Take hints of committed jobs; never waits, never raises, drops the oldest when full."""
        self._forked()
        self.hints.extend(hints)
        self.idle.clear()
        self._start()
        self.wake.set()

    def later(self, hints: Iterable[Hint], seconds: float) -> None:
        """Send these when they are due, if that is soon and this process lives so long."""
        if seconds > HORIZON_SECONDS or len(self.timers) > conf.PUBLISH_BACKLOG:
            return
        self._forked()
        due = time.monotonic() + seconds + LATE_SECONDS
        with self.start_lock:
            for hint in hints:
                heapq.heappush(self.timers, (due, next(self.numbers), hint))
        self._start()
        self.wake.set()

    def _forked(self) -> None:
        if self.process != os.getpid():  # by C code, which calls none of Python's hooks
            self.reset()

    def _start(self) -> None:
        if self.thread is None:
            with self.start_lock:
                if self.thread is None:
                    self.thread = threading.Thread(
                        target=self._run, name="durable-jobs-publisher", daemon=True
                    )
                    try:
                        self.thread.start()
                    except RuntimeError as error:  # no thread to be had; the loop sends the hints
                        self.thread = None
                        logger.warning("durable_jobs: no thread for hints: %s", error)

    def _fire(self) -> float | None:
        """Queue the delayed hints that are due; return the seconds until the next one is."""
        with self.start_lock:
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                self.hints.append(heapq.heappop(self.timers)[2])
            return self.timers[0][0] - now if self.timers else None

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until all hints are out, at most `seconds`; not for a broker in trouble."""
        if self.thread is None or self.failures:
            return not self.hints
        return self.idle.wait(conf.PUBLISH_FLUSH if seconds is None else seconds)

    def _run(self) -> None:
        me = threading.current_thread()
        while self.thread is me:  # not after `reset`
            pause = self._fire()
            if not self.hints:
                self.idle.set()
                if self.hints:  # sent meanwhile, before `idle` was set
                    self.idle.clear()
                    continue
                self.wake.wait(pause)
                if self.thread is not me:
                    return
            self.wake.clear()
            batch = [self.hints.popleft() for _ in range(min(len(self.hints), 10_000))]
            if not batch:
                continue
            try:
                self.publish(batch)
                self.failures = 0
                time.sleep(COLLECT_SECONDS)
            except Exception as error:  # whatever a broker client raises, the loop republishes
                self._failed(batch, error)

    def _failed(self, batch: Sequence[Hint], error: Exception) -> None:
        self._disconnect()
        self.failures += 1
        pause = PAUSES[min(self.failures, len(PAUSES)) - 1]
        text = "durable_jobs: broker does not take hints (%r); next try in %s s, jobs are safe"
        logger.warning(text, error, pause)
        # When the queue is full the oldest are dropped, not what came meanwhile.
        room = len(batch) if self.hints.maxlen is None else self.hints.maxlen - len(self.hints)
        self.hints.extendleft(reversed(batch[-room:] if room else []))
        self.idle.set()
        time.sleep(pause)

    def publish(self, hints: Sequence[Hint]) -> None:
        """Publish now, in the calling thread; raises what the broker client raises.

        Hints to a queue that the broker refuses are dropped: the others are not to wait for them.
        """
        refused: set[str] = set()
        for group in groups(hints):
            queue = group[0].queue
            if queue in refused:
                continue
            producer = self.producer = self.producer or self._connect()
            try:
                _publish(producer, group)
            except producer.connection.channel_errors as error:
                of_the_broker = any(word in f"{type(error)} {error}" for word in OF_THE_BROKER)
                if of_the_broker or not producer.connection.connected:
                    raise
                refused.add(queue)
                text = "durable_jobs: broker refuses queue %r (%s); the loop sends its hints again"
                logger.error(text, queue, error)
                self._disconnect()  # RabbitMQ has closed the channel
            except (TypeError, ValueError, LookupError, AttributeError):
                # Nothing a broker says: it would fail again, and hold up all the others.
                logger.exception("durable_jobs: no hint can be made of %s", group[0].task)

    def _disconnect(self) -> None:
        if self.producer is not None:  # a socket that is left open says so when it is collected
            self.producer.connection.collect(socket_timeout=1)
        self.producer = None

    def _connect(self) -> Any:
        app = current_app._get_current_object()
        options = {
            **app.conf.broker_transport_options,
            # A frozen broker holds this thread no longer than this.
            "socket_timeout": 2,
            "socket_connect_timeout": 1,
            "max_retries": 0,
        }
        connection = app.connection_for_write(transport_options=options, connect_timeout=2)
        connection.ensure_connection(max_retries=0, timeout=2)
        return app.amqp.Producer(connection, auto_declare=False)


def flush(seconds: float | None = None) -> bool:
    """Wait until this process has sent its hints, at most `seconds`; return whether it has."""
    return publisher.flush(seconds)


def groups(hints: Iterable[Hint]) -> Iterator[list[Hint]]:
    """Return the hints that may share a message; a job that failed before travels alone."""
    kinds: dict[tuple[Any, ...], list[Hint]] = {}
    for hint in hints:
        limits = tuple(hint.options.get("timelimit") or ())
        way = (hint.task, hint.queue, hint.options.get("priority"))
        kind = (*way, limits, hint.attempts > 0)
        kinds.setdefault(kind, []).append(hint)
    for (*_, failed), same in kinds.items():
        size = 1 if failed else min(conf.SLICE_MAX, -(-len(same) // SPREAD))
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _publish(producer: Any, hints: Sequence[Hint]) -> None:
    first = hints[0]
    queue = current_app.amqp.queues.get(first.queue) or Queue(first.queue)
    direct = queue.exchange.type == "direct"
    priority = first.options.get("priority")
    producer.publish(
        EMPTY_BODY,
        exchange="" if direct else queue.exchange,
        routing_key=queue.name if direct else queue.routing_key,
        # A queue this process does not know is somebody else's to declare.
        declare=[queue] if first.queue in current_app.amqp.queues else None,
        serializer="json",
        retry=False,
        headers=hint_headers(hints),
        correlation_id=first.task_id,
        **({} if priority is None else {"priority": priority}),
    )


def hint_headers(hints: Sequence[Hint]) -> dict[str, Any]:
    """Return the headers of a Celery task message that carries only ids."""
    first = hints[0]
    job = first.task_id
    alone = len(hints) == 1
    via = first.options.get("via")
    return {
        "lang": "py",
        "task": via or first.task,
        "id": job,
        "shadow": first.task if via else None,
        **dict.fromkeys(("eta", "expires", "group", "group_index")),
        "retries": first.attempts,
        "timelimit": first.options.get("timelimit") or [None, None],
        "root_id": first.options.get("root_id") or job,
        "parent_id": first.options.get("parent_id"),
        "argsrepr": _repr(first.args) if alone else f"({len(hints)} jobs)",
        "kwargsrepr": _repr(first.kwargs) if alone else "{}",
        "origin": anon_nodename(),
        "ignore_result": True,
        "durable_jobs": [str(hint.id) for hint in hints],
    }


def _repr(text: str) -> str:
    if len(text) > 1000:
        return f"{text[:1000]}..."
    value = decode(text)
    return repr(tuple(value) if isinstance(value, list) else value)


publisher = Publisher()
os.register_at_fork(after_in_child=publisher.reset)
atexit.register(publisher.flush)
