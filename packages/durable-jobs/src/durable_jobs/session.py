"""What a task leaves on its database session reaches nobody: such a connection is closed.

A wrapper reads the first words of each statement in a worker, so nothing is asked of the database,
and a task that changes nothing keeps its connection. It does not see what a function of the
database sets, nor what goes past Django's cursors.
"""

import logging
import re
from typing import Any

from django.db import connections
from django.db.backends.signals import connection_created

logger = logging.getLogger("durable_jobs.session")
COMMENT = re.compile(r"/\*.*?\*/|--[^\n]*", re.S)
BEGINS = re.compile(
    r"""\s*(SET\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)|CREATE\s+((LOCAL|GLOBAL)\s+)?TEMP
    |(RESET|DISCARD|LOAD|LISTEN|UNLISTEN|BEGIN|START|PREPARE|DECLARE|DO|CALL)\b)""",
    re.I | re.X,
)
WORDS = ("temp", "advisory", "set_config")  # cheaper to find than what comes next
HOLDS = re.compile(
    r"""INTO\s+TEMP|pg_temp\b|advisory_lock|advisory_unlock
    |set_config\s*\((?![^()]*,\s*'?t(rue)?'?\s*\))""",
    re.I | re.X,
)
# Of those who have Django set it anew at each cursor.
PATH = re.compile(r"\s* SET \s+ search_path \b [^;]* $", re.I | re.X)


def changes(text: str) -> bool:
    """Return whether a statement may change the session."""
    if "--" in text or "/*" in text:
        text = COMMENT.sub(" ", text)
    lower = text.lower()
    inside = any(word in lower for word in WORDS) and HOLDS.search(text)
    return bool(inside or any(map(BEGINS.match, text.split(";"))))


def watch(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    """Remember that a statement changes the session."""
    connection = context["connection"]
    text = sql if isinstance(sql, str) else _text(sql, connection)
    if changes(text) and not (hasattr(connection, "set_schema") and PATH.match(text)):
        connection.durable_jobs_changed = True
    return execute(sql, params, many, context)


def _text(sql: Any, connection: Any) -> str:
    return sql.decode() if isinstance(sql, bytes) else str(sql.as_string(connection.connection))


def start() -> None:
    """Watch this worker's connections; last of the receivers, which may set what is to stay."""
    connection_created.connect(_created, weak=False)
    for connection in connections.all(initialized_only=True):
        _created(connection)


def _created(connection: Any, **_: Any) -> None:
    connection.durable_jobs_changed = False
    # SQLite begins each transaction with a statement of its own.
    if connection.vendor != "sqlite" and watch not in connection.execute_wrappers:
        # The first: the end of a `with execute_wrapper()` takes away the last.
        connection.execute_wrappers.insert(0, watch)


def clean() -> None:
    """Close the connections of this thread that are not as Django made them."""
    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block or not connection.connection:
            continue
        off = connection.autocommit != connection.settings_dict["AUTOCOMMIT"]
        if off:
            text = "durable_jobs: a task left autocommit off; what it had not committed is lost"
            logger.warning(text)
        if off or getattr(connection, "durable_jobs_changed", False):
            connection.connection.close()  # or a pool would hand it on
            connection.close()
