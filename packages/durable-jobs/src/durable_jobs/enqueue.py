"""Writes jobs, in the caller's transaction, and tells the publisher once they are committed.

`RowProducer` is what Celery takes for a message producer: Celery routes the call, lets every
`before_task_publish` receiver and tracing tool add its headers or change the arguments, in the
caller's context, and then "publishes" into the table. The row keeps it, through delays and retries.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Self
from uuid import UUID

from celery import current_app
from django.contrib.contenttypes.models import ContentType
from django.db import connections, models, transaction

from durable_jobs import beat, database, transitions
from durable_jobs.attempt import State
from durable_jobs.conf import conf
from durable_jobs.exceptions import Unsupported
from durable_jobs.publisher import Hint
from durable_jobs.values import (
    QUEUE_MAX_CHARS,
    TASK_MAX_CHARS,
    checked_text,
    encode,
    instant,
    owner_key,
    packed,
    span,
)

STAMPS = ("stamped_headers", "stamps")
# Headers Celery writes itself at each publication; everything else belongs to the call.
OWN_HEADERS = frozenset((
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries",
    "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result",
    "replaced_task_nesting", *STAMPS
))  # fmt: skip


@dataclass
class Call:
    """One call of a task, before it is a row."""

    task: str
    max_attempts: int
    id: UUID
    args: str = "[]"
    kwargs: str = "{}"
    key: str | None = None
    rerun: bool = True
    owner: models.Model | None = None
    delay: float = 0
    eta: datetime | None = None
    expires: float | None = None
    expires_at: datetime | None = None
    queue: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    made: float = field(default_factory=time.monotonic)
    #: Seconds since then for which it had to wait for the database.
    late: float = 0
    #: It may be written already: the connection broke.
    tried: bool = False
    #: The options as JSON.
    packed: str = "{}"

    @property
    def task_id(self) -> str:
        """The id it was given, or its row's."""
        return self.options.get("id") or str(self.id)

    @property
    def waits(self) -> bool:
        return self.delay > 0 or self.eta is not None

    def timing(self, options: dict[str, Any], expires: float | None) -> None:
        """Move the times from the message's options to the row's timer."""
        self.delay = span(self.task, "countdown", options.pop("countdown", None))
        self.eta = instant(options.pop("eta", None))
        expires = options.pop("expires", expires)
        options["expires"] = None
        if isinstance(expires, int | float):
            self.expires = span(self.task, "expires", expires)
        else:
            self.expires_at = instant(expires)

    def take(self, args: Any, kwargs: Any) -> None:
        """Freeze the arguments; raises TypeError or ValueError where no row can hold them."""
        self.args = encode(self.task, args)
        self.kwargs = encode(self.task, kwargs) if kwargs else "{}"

    def route(self, queue: str, options: dict[str, Any]) -> None:
        """Take where it goes and what goes with it; raises TypeError or ValueError, too."""
        checked_text(self.task, "task's name", self.task, TASK_MAX_CHARS)
        self.queue = checked_text(self.task, "queue's name", queue, QUEUE_MAX_CHARS, 0)
        self.options |= options
        self.packed = packed(self.task, self.options)

    def row(self) -> dict[str, Any]:
        """Return the columns, and the spans from which the database makes its times."""
        owner_type, owner_id = owner_columns(self.owner)
        return vars(self) | {
            "options": self.packed,
            "given_id": self.options.get("id"),
            "state": (State.SCHEDULED if self.waits else State.QUEUED).value,
            # A queued job is due when its hint must have been lost.
            "delay": self.delay - self.late if self.waits else conf.REPUBLISH,
            "expires": None if self.expires is None else self.expires - self.late,
            "owner_type": owner_type,
            "owner_id": owner_id,
        }

    def insert(self) -> UUID:
        """Write the row and return its id, or that of the live job that holds the key."""
        if not beat.writer.takes(self):
            self.id = self.write()
        return self.id

    def write(self) -> UUID:
        found: UUID = database.anew(self._write)
        if found != self.id:  # its key has a job, which has an id
            self.options.pop("id", None)
        if self.eta is None:
            transitions.hint_on_commit([self.hint(found)], self.delay - self.late)
        return found

    def _write(self) -> UUID:
        again, self.tried = self.tried, True
        if again and transitions.known(self.id):
            return self.id
        if self.key is not None:
            return transitions.enqueue(self.row(), "UPSERT" if self.rerun else "UPSERT_ONCE")
        # The server may be about to commit what it was sent on the connection that broke.
        return transitions.enqueue(self.row(), "ADOPT" if again else "INSERT")

    def hint(self, job: UUID) -> Hint:
        return Hint(job, self.task, self.queue, self.options, self.args, self.kwargs)


class RowProducer:
    """Stands where Celery expects a kombu producer; `publish` writes the row."""

    def __init__(self, call: Call) -> None:
        self.call = call

    @property
    def connection(self) -> "RowProducer":
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def _reraise_as_library_errors(self) -> Any:
        return nullcontext()

    def publish(self, body: Any, **properties: Any) -> None:
        headers = properties["headers"]
        if "task" not in headers:  # an event that says of it; there is no message to speak of yet
            return
        args, kwargs, canvas = body
        if used := [name for name, value in canvas.items() if value]:  # a receiver's
            raise Unsupported(self.call.task, " and ".join(used))
        self.call.take(args, kwargs)
        self.call.route(queue_name(properties), call_options(headers, properties))
        self.accept(headers)

    def accept(self, headers: dict[str, Any]) -> None:
        # Whoever logs the call hears of the job there is, also where its key has one already.
        self.call.insert()
        headers["id"] = self.call.task_id


class TemplateProducer(RowProducer):
    """Only learns what Celery would publish: queue, headers and arguments."""

    def accept(self, headers: dict[str, Any]) -> None:
        return None


def queue_name(properties: Mapping[str, Any]) -> str:
    """Return the queue of a routed call; a hint must find its way again a day later."""
    declared = next(iter(properties.get("declare") or ()), None)
    if declared and declared.routing_key == properties["routing_key"]:
        return str(declared.name)
    way = properties.get("exchange"), properties["routing_key"]
    for queue in current_app.amqp.queues.values():  # one that was named by its exchange
        if (queue.exchange.name, queue.routing_key) == way:
            return str(queue.name)
    return str(declared.name if declared else properties["routing_key"])


def call_options(headers: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a published call carries besides task, arguments and queue."""
    options: dict[str, Any] = {}
    if properties.get("priority") is not None:
        options["priority"] = properties["priority"]
    if any(headers["timelimit"]):
        options["timelimit"] = headers["timelimit"]
    if headers["parent_id"]:
        options |= {"parent_id": headers["parent_id"], "root_id": headers["root_id"]}
    extra = {name: value for name, value in headers.items() if name not in OWN_HEADERS}
    extra |= {name: headers[name] for name in STAMPS if headers.get(name)}
    if extra:
        options["headers"] = extra
    return options


def owner_columns(owner: models.Model | None) -> tuple[int | None, str | None]:
    if owner is None:
        return None, None
    key = owner_key(owner)
    return ContentType.objects.get_for_model(owner).pk, key


def insert_many(calls: Sequence[Call]) -> list[UUID]:
    """Write many calls of one task: with COPY on PostgreSQL; those with a key one by one, in order.

    A key that is held already keeps its job, and that job's id is returned.
    """
    found: list[UUID] = database.anew(partial(_insert_many, calls))
    return found


def _insert_many(calls: Sequence[Call]) -> list[UUID]:
    found: dict[UUID, UUID] = {}
    using = conf.DATABASE
    if connections[using].vendor != "postgresql" or any(map(_alone, calls)):
        # Sorted, so that two such calls at once cannot wait for each other's keys.
        with transaction.atomic(using=using):
            for call in sorted(calls, key=lambda call: call.key or ""):
                found[call.id] = call.write()
    elif calls:
        again, calls[0].tried = calls[0].tried, True
        if not (again and transitions.known(calls[0].id)):
            first = calls[0].row()  # all have the same delay, that of one call of enqueue_many
            transitions.enqueue_many([call.row() for call in calls], first["delay"])
        transitions.hint_on_commit([call.hint(call.id) for call in calls], calls[0].delay)
    return [found.get(call.id, call.id) for call in calls]


def _alone(call: Call) -> bool:
    """Return whether the call needs what a bulk insert does not do."""
    return bool(call.key or call.eta or call.expires_at or call.expires is not None)
