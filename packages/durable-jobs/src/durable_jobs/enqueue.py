"""Writes jobs, in the caller's transaction, and tells the publisher once they are committed.

`RowProducer` is what Celery takes for a message producer: Celery routes the call, lets every
`before_task_publish` receiver and tracing tool add its headers in the caller's context, and then
"publishes" into the table. What they added stays with the row, through delays and retries.
"""

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
from kombu.utils.json import dumps

from durable_jobs import dialect, statements
from durable_jobs.conf import conf
from durable_jobs.dialect import Hint
from durable_jobs.models import Job
from durable_jobs.publisher import publisher

# Headers Celery writes itself at each publication; everything else belongs to the call.
OWN_HEADERS = frozenset(
    [
        "lang",
        "task",
        "id",
        "shadow",
        "eta",
        "expires",
        "group",
        "group_index",
        "retries",
        "timelimit",
        "root_id",
        "parent_id",
        "argsrepr",
        "kwargsrepr",
        "origin",
        "ignore_result",
        "replaced_task_nesting",
        "stamped_headers",
        "stamps",
    ]
)
COLUMNS = "id task args kwargs queue options key owner_type_id owner_id max_attempts state due_at"


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

    def insert(self, *, adopt: bool = False) -> UUID:
        """Write the row and return its id, or that of the live job that holds the key."""
        statement = statements.INSERT
        if adopt:
            statement = statements.ADOPT
        elif self.key is not None:
            statement = statements.UPSERT if self.rerun else statements.UPSERT_ONCE
        waits = self.delay > 0 or self.eta is not None
        owner_type, owner_id = owner_columns(self.owner)
        found = dialect.run(
            statement,
            **vars(self)
            | {
                "options": dumps(self.options) if self.options else "{}",
                "state": Job.State.SCHEDULED.value if waits else Job.State.QUEUED.value,
                # A queued job is due when its hint must have been lost.
                "delay": self.delay if waits else conf.REPUBLISH,
                "owner_type": owner_type,
                "owner_id": owner_id,
            },
        )
        if found:
            self.id = dialect.uuid(found[0][0])
        if not adopt and self.eta is None:
            hint_on_commit([self.hint()], self.delay)
        return self.id

    def hint(self) -> Hint:
        return Hint(self.id, self.task, self.queue, self.options, self.args, self.kwargs)


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
        self.call.queue = queue_name(properties)
        self.call.options |= call_options(headers, properties)
        self.call.insert()


class TemplateProducer(RowProducer):
    """Only learns what Celery would publish: queue and headers for many rows at once."""

    def publish(self, body: Any, **properties: Any) -> None:
        if "task" in properties["headers"]:
            self.call.queue = queue_name(properties)
            self.call.options |= call_options(properties["headers"], properties)


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
    if extra := {name: value for name, value in headers.items() if name not in OWN_HEADERS}:
        options["headers"] = extra
    return options


def owner_columns(owner: models.Model | None) -> tuple[int | None, str | None]:
    if owner is None:
        return None, None
    if owner.pk is None:
        raise ValueError(f"The owner {owner!r} is not saved: it has no primary key yet.")
    return ContentType.objects.get_for_model(owner).pk, str(owner.pk)


class _Commit(list[Hint]):
    """The hints of one transaction, or of one savepoint of it."""

    def __call__(self) -> None:
        publisher.send(self)


def hint_on_commit(hints: Sequence[Hint], delay: float = 0) -> None:
    """Hand hints to the publisher after the commit, with one callback per transaction."""
    connection = connections[conf.DATABASE]
    send = partial(publisher.later, hints, delay) if delay > 0 else partial(publisher.send, hints)
    if not connection.in_atomic_block:
        send()
        return
    if delay > 0:
        transaction.on_commit(send, using=conf.DATABASE, robust=True)
        return
    if connection.run_on_commit:
        savepoints, callback = connection.run_on_commit[-1][:2]
        # Only within one savepoint: its rollback drops the callback, and others' hints with it.
        if isinstance(callback, _Commit) and savepoints == set(connection.savepoint_ids):
            callback.extend(hints)
            return
    transaction.on_commit(_Commit(hints), using=conf.DATABASE, robust=True)


def insert_many(calls: Sequence[Call]) -> list[UUID]:
    """Write many calls of one task: with COPY on PostgreSQL; those with a key one by one, in order.

    A key that is held already keeps its job, and that job's id is returned.
    """
    using = conf.DATABASE
    if connections[using].vendor != "postgresql" or any(map(_alone, calls)):
        # Sorted, so that two such calls at once cannot wait for each other's keys.
        with transaction.atomic(using=using):
            for call in sorted(calls, key=lambda call: call.key or ""):
                call.insert()
        return [call.id for call in calls]
    _copy(calls)
    hint_on_commit([call.hint() for call in calls], calls[0].delay if calls else 0)
    return [call.id for call in calls]


def _alone(call: Call) -> bool:
    """Return whether the call needs what COPY does not do."""
    return bool(call.key or call.eta or call.expires_at or call.expires is not None)


def _copy(calls: Sequence[Call]) -> None:
    connection = connections[conf.DATABASE]
    columns = ", ".join(COLUMNS.split())
    clock = f"SELECT {dialect.spell('<soon delay>', 'postgresql')}"
    dues: dict[float, datetime] = {}
    with connection.cursor() as cursor:
        for delay in {call.delay for call in calls}:
            cursor.execute(clock, {"delay": delay or conf.REPUBLISH})
            dues[delay] = cursor.fetchone()[0]
        # Before COPY begins: the first use of an owner's model asks for its content type.
        owners = [owner_columns(call.owner) for call in calls]
        with cursor.copy(f"COPY {statements.T} ({columns}) FROM STDIN") as copy:
            for call, owner in zip(calls, owners, strict=True):
                state = "scheduled" if call.delay else "queued"
                options = dumps(call.options) if call.options else "{}"
                row = (call.id, call.task, call.args, call.kwargs, call.queue, options, None)
                copy.write_row((*row, *owner, call.max_attempts, state, dues[call.delay]))
