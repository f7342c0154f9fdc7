"""Names: settings that Celery does not read, queues and tasks that do not exist."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from celery import Celery
from celery.app.defaults import _TO_NEW_KEY, DEFAULTS
from django.conf import settings

from hardened_celery.checks.options import Messages, beat_entries, fault, owners, setting, spelled

# Libraries read these from Celery's configuration; add those of yours.
OTHER_NAMES = re.compile(r"db_reuse_max|redbeat_.*")


def names(app: Celery) -> Messages:
    """Every setting with Celery's prefix is one that Celery reads."""
    if not (prefix := app.conf.prefix):
        return
    valid = {spelled(app, key) for key in DEFAULTS}
    mine = {name for name in dir(settings) if name.startswith((prefix, "CELERYD_", "CELERYBEAT_"))}
    for name in sorted(mine - valid):
        new = spelled(app, _TO_NEW_KEY[name]) if name in _TO_NEW_KEY else None
        if new and new not in mine:
            # So it is in 5.7; earlier versions ignored all old names where a prefix is used.
            text = f"{name} is an old name, which Celery reads until something sets the new one."
            yield fault("W001", text, f"Write {new}.")
        elif not OTHER_NAMES.fullmatch(name.removeprefix(prefix).lower()):
            close = difflib.get_close_matches(name, valid, n=1, cutoff=0.8)
            hint = f"Did you mean {close[0]}?" if close else "Remove it; it may be a task's option."
            hint = f"Remove it: {new} is set." if new else hint
            yield fault("E001", f"{name} does nothing: Celery reads no such setting.", hint)


def queues(app: Celery) -> Messages:
    """Every queue that something is sent to is declared."""
    key = spelled(app, "task_queues")
    if app.conf.task_create_missing_queues:
        text = f"{setting(app, 'task_create_missing_queues')}: a typing error in a queue's name"
        hint = f"Set it to False and declare every queue in {key}."
        yield fault("W002", f"{text} makes a new queue, which no worker serves.", hint)
        return
    declared = sorted(app.amqp.queues)
    for place, queue in named_queues(app):
        name = getattr(queue, "name", queue)
        if name and name not in declared:
            text = f"{place} names the queue {name!r}, which is not declared: sending to it fails."
            yield fault("E002", text, f"Add it to {key}, or write one of {', '.join(declared)}.")


def named_queues(app: Celery) -> Iterator[tuple[str, Any]]:
    """Yield every place that names a queue, and the queue."""
    yield spelled(app, "task_default_queue"), app.conf.task_default_queue
    for owner in owners(app, "queue"):
        yield owner.name("queue"), owner.values["queue"]
    for label, _entry, options in beat_entries(app):
        yield f"The {label}", options.get("queue")
    tables = app.conf.task_routes or ()
    for table in tables if isinstance(tables, (list, tuple)) else [tables]:
        for pattern, route in table.items() if isinstance(table, dict) else ():
            queue = route.get("queue") if isinstance(route, dict) else route
            yield f"{spelled(app, 'task_routes')} for {pattern!r}", queue


def beat(app: Celery) -> Messages:
    """Every beat entry names a task that exists, with arguments that it takes."""
    for label, entry, _options in beat_entries(app):
        name = entry.get("task")
        if not (task := app.tasks.get(name)):
            close = difflib.get_close_matches(str(name), app.tasks, n=1)
            hint = f"Write {close[0]!r}." if close else "Is its module imported by the workers?"
            yield fault("E003", f"The {label} names the task {name!r}, which does not exist.", hint)
        elif task.typing:
            try:
                task.__header__(*(entry.get("args") or ()), **(entry.get("kwargs") or {}))
            except TypeError as reason:
                text = f"The {label} does not fit its task: {reason}."
                yield fault("E004", text, f"Change its args or kwargs to what {name} takes.")
