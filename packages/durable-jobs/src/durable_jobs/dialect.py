"""Runs a statement in the database's own words, on the connection of the calling thread."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID

from django.db import InterfaceError, NotSupportedError, OperationalError, connections
from django.db.models.expressions import RawSQL
from django.db.models.functions import Now
from kombu.utils.json import loads

from durable_jobs.conf import conf

_NOW = {
    "postgresql": "statement_timestamp()",
    "sqlite": "strftime('%%Y-%%m-%%d %%H:%%M:%%f','now')",
}
# The pace after a loss: at once, then BACKOFF_MIN doubled with each further one.
_LOST = "<least>(%(backoff_max)s, %(backoff_min)s * (1 << <least>(attempts - 2, 20)))"
_WORDS = {
    "postgresql": {
        "<skip locked>": "FOR UPDATE SKIP LOCKED",
        "<skip locked of j>": "FOR UPDATE OF j SKIP LOCKED",
        # An array is read once and first, and costs the planner less than a join.
        "<those>": "= ANY(ARRAY(",
        "</those>": "))",
        "<in ids>": "= ANY(%(ids)s)",
        "<in pairs>": "id = ANY(%(ids)s) AND token"
        " = (%(tokens)s::int[])[array_position(%(ids)s, id)]",
        "<pairs with progress>": "SELECT * FROM unnest(%(ids)s::uuid[], %(tokens)s::int[],"
        " %(progress)s::int[], %(messages)s::text[]) AS p (id, token, progress, message)",
        "<lost delay>": f"<now> + CASE WHEN attempts > 1 THEN {_LOST} ELSE 0 END * interval '1s'",
        "<doubled>": "<now> + LEAST(GREATEST(%(republish)s * interval '1s', <now> - queued_at),"
        " %(republish_max)s * interval '1s')",
        "<least>": "LEAST",
        "<greatest>": "GREATEST",
    },
    "sqlite": {
        # An upsert finds its index by the index's own words, in their order.
        "key IS NOT NULL AND due_at IS NOT NULL": "due_at IS NOT NULL AND key IS NOT NULL",
        "<skip locked>": "",
        "<skip locked of j>": "",
        "<those>": "IN (",
        "</those>": ")",
        "<in ids>": "IN (SELECT value FROM json_each(%(ids)s))",
        "<in pairs>": "(id, token) IN (SELECT i.value, t.value FROM json_each(%(ids)s) i"
        " JOIN json_each(%(tokens)s) t ON t.key = i.key)",
        "<pairs with progress>": "SELECT i.value AS id, t.value AS token, p.value AS progress,"
        " m.value AS message FROM json_each(%(ids)s) i"
        " JOIN json_each(%(tokens)s) t ON t.key = i.key"
        " JOIN json_each(%(progress)s) p ON p.key = i.key"
        " JOIN json_each(%(messages)s) m ON m.key = i.key",
        "<lost delay>": f"<later CASE WHEN attempts > 1 THEN {_LOST} ELSE 0 END>",
        "<doubled>": "<later MIN(MAX(%(republish)s, (julianday(<now>) - julianday(queued_at))"
        " * 86400), %(republish_max)s)>",
        "<least>": "MIN",
        "<greatest>": "MAX",
    },
}
SPANS = ("lease", "republish", "republish_max", "backoff_min", "backoff_max")
_SOON = {
    "postgresql": r"(<now> + %(\1)s::float8 * interval '1s')",
    "sqlite": r"<later %(\1)s>",
}
_LATER = r"strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now', (\1) || ' seconds')"
_SPREAD = {
    "postgresql": "statement_timestamp() + random() * %s * interval '1s'",
    "sqlite": "strftime('%%Y-%%m-%%d %%H:%%M:%%f', 'now',"
    " ((abs(random()) %% 1000000) / 1000000.0 * %s) || ' seconds')",
}
_INSTANT = {"postgresql": "%({})s::timestamptz", "sqlite": "%({})s"}


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


@cache
def spell(statement: str, vendor: str) -> str:
    """Return the statement in the words of `vendor`."""
    if vendor not in _WORDS:
        raise NotSupportedError(
            f"Durable jobs do not work on {vendor}: use PostgreSQL 14 or later."
        )
    instant = _INSTANT[vendor].format
    statement = re.sub(
        r"<soon (\w+) %\((\w+)\)s>",
        lambda found: f"COALESCE({instant(found[2])}, <soon {found[1]}>)",
        statement,
    )
    before = ""
    while statement != before:
        before = statement
        for word, spelling in {**_WORDS[vendor], "<now>": _NOW[vendor]}.items():
            statement = statement.replace(word, spelling)
        statement = re.sub(r"<soon (\w+)>", _SOON[vendor], statement)
    return re.sub(r"<later (.+?)>", _LATER, statement)


def run(statement: str, using: str | None = None, **params: Any) -> list[tuple[Any, ...]]:
    """Run it with the app's spans as parameters too; return the rows it returns, if any."""
    connection = connections[using or conf.DATABASE]
    vendor = connection.vendor
    for name in SPANS:
        params[name] = getattr(conf, name.upper())
    if vendor == "sqlite":
        # Only what it uses: with DEBUG on, Django has SQLite quote them all.
        used = {name for name in params if f"%({name})s" in spell(statement, vendor)}
        params = {name: _plain(params[name]) for name in used}
    with connection.cursor() as cursor:
        cursor.execute(spell(statement, vendor), params)
        return cursor.fetchall() if cursor.description else []


def run_anew(statement: str, **params: Any) -> list[tuple[Any, ...]]:
    """Run it, outside a transaction once more should the connection turn out to be dead.

    CELERY_DB_REUSE_MAX keeps connections that the database may have closed meanwhile. For fenced
    statements only: what was carried out and not answered matches no row the second time.
    """
    connection = connections[conf.DATABASE]
    try:
        return run(statement, **params)
    except (OperationalError, InterfaceError):
        if connection.in_atomic_block or connection.is_usable():
            raise
        connection.close()
        return run(statement, **params)


def hints(statement: str, **params: Any) -> list[Hint]:
    """Run a statement that returns hints."""
    return [
        Hint(uuid(job), task, queue, decode(options), *rest)
        for job, task, queue, options, *rest in run_anew(statement, **params)
    ]


def decode(text: str) -> Any:
    """Return what was encoded; a caller's own `__type__`, which says nothing to Kombu, as it is."""
    try:
        return loads(text)
    except Exception:  # whatever a registered decoder makes of it
        return json.loads(text)


def uuid(value: UUID | str) -> UUID:
    """Return the id as a UUID; SQLite knows them as text."""
    return value if isinstance(value, UUID) else UUID(value)


def _plain(value: Any) -> Any:
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return json.dumps([_plain(item) for item in value])
    return value


def ago(seconds: float) -> Any:
    """Return the instant that long ago, by the database's clock, for the ORM."""
    return Now() - timedelta(seconds=seconds)


def spread(seconds: float) -> Any:
    """Return a random instant of the next `seconds`, another one for each row, for the ORM."""
    return RawSQL(_SPREAD[connections[conf.DATABASE].vendor], [seconds])  # noqa: S611 - ours
