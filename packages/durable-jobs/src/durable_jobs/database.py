"""The jobs' database: runs a statement by its name, in the words of PostgreSQL or of SQLite."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any
from uuid import UUID

from django.db import InterfaceError, NotSupportedError, OperationalError, connections, transaction
from django.db.models.functions import Now

from durable_jobs import postgresql, sqlite
from durable_jobs.conf import conf

SPANS = ("lease", "republish", "republish_max", "backoff_min", "backoff_max")
Rows = list[tuple[Any, ...]]


class LockedError(OperationalError):
    """Somebody holds the row, or the key, in an open transaction."""


def words() -> ModuleType:
    """Return the module that holds the statements for the jobs' database."""
    vendor = connections[conf.DATABASE].vendor
    known = {"postgresql": postgresql, "sqlite": sqlite}
    if vendor not in known:
        raise NotSupportedError(
            f"Durable jobs do not work on {vendor}: use PostgreSQL 14 or later."
        )
    return known[vendor]


def run(name: str, **params: Any) -> Rows:
    """Run the statement of that name, with the app's spans as parameters too; return its rows."""
    ours = words()
    statement = getattr(ours, name)
    params |= {span: getattr(conf, span.upper()) for span in SPANS}
    with connections[conf.DATABASE].cursor() as cursor:
        cursor.execute(statement, ours.adapted(statement, params))
        return cursor.fetchall() if cursor.description else []


def run_anew(name: str, **params: Any) -> Rows:
    rows: Rows = anew(partial(run, name, **params))
    return rows


def anew(work: Callable[[], Any]) -> Any:
    """Do it, outside a transaction once more should the connection turn out to be dead.

    Nobody checks connections outside request and task, and CELERY_DB_REUSE_MAX keeps some that the
    database may have closed meanwhile. Only for what changes nothing the second time: fenced
    statements, and inserts that mind a conflict.
    """
    connection = connections[conf.DATABASE]
    connection.ensure_connection()
    first, in_transaction = connection.connection, not connection.autocommit
    try:
        return work()
    except (OperationalError, InterfaceError):
        # After a transaction of `work` Django has connected anew already.
        same = connection.connection is first
        if in_transaction or (same and connection.is_usable()):
            raise
        connection.close()
        return work()


def uuid(value: UUID | str) -> UUID:
    """Return the id as a UUID; SQLite knows them as text."""
    return value if isinstance(value, UUID) else UUID(value)


def ago(seconds: float) -> Any:
    """Return the instant that long ago, by the database's clock, for the ORM."""
    return Now() - timedelta(seconds=seconds)


@contextmanager
def brief_locks(seconds: float) -> Iterator[None]:
    """Raise LockedError rather than wait longer for a lock, in a transaction; on PostgreSQL only.

    In a transaction of the caller's it changes nothing.
    """
    connection = connections[conf.DATABASE]
    if connection.vendor != "postgresql" or connection.in_atomic_block:
        yield
        return
    try:
        with transaction.atomic(using=conf.DATABASE):
            run("LOCK_TIMEOUT", wait=f"{seconds}s")
            yield
    except OperationalError as error:
        if getattr(error.__cause__, "sqlstate", None) != "55P03":
            raise
        raise LockedError(str(error)) from error
