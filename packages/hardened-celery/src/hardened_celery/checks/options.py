"""What the rules look at: settings, tasks that differ from them, and entries of beat.

Celery has many ways to say one thing; a rule sees one value, and the name the project gave it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from celery import Celery, Task
from django.core import checks

Messages = Iterator[checks.CheckMessage]
REDIS, RABBITMQ = {"redis", "rediss", "sentinel"}, {"amqp", "amqps", "pyamqp", "librabbitmq"}


def fault(identity: str, text: str, hint: str) -> checks.CheckMessage:
    """Return an error, for what is certain to go wrong, or a warning, as its identity begins."""
    kind = checks.Error if identity.startswith("E") else checks.Warning
    return kind(text, hint=hint, id=f"celery.{identity}")


class Owner(NamedTuple):
    """What sets options: the settings (no task), or a task that differs from them."""

    app: Celery
    task: str
    values: dict[str, Any]

    def name(self, attribute: str) -> str:
        """Return how the project writes an option."""
        if self.task or attribute not in dict(Task.from_config):
            return f"`{attribute}` of {f'the task {self.task}' if self.task else 'all tasks'}"
        return spelled(self.app, dict(Task.from_config)[attribute])


def owners(app: Celery, *attributes: str) -> Iterator[Owner]:
    """Yield the settings, then each task, but Celery's own, in which an attribute differs."""
    defaults = {attribute: default(app, attribute) for attribute in attributes}
    yield Owner(app, "", defaults)
    for name, task in sorted(app.tasks.items()):
        # Of a durable job the message is only a hint: how that is delivered does not matter.
        if getattr(task, "durable", False) and attributes != ("queue",):
            continue
        values = {attribute: getattr(task, attribute, None) for attribute in attributes}
        if values != defaults and not name.startswith("celery."):
            yield Owner(app, name, values)


def default(app: Celery, attribute: str) -> Any:
    """Return what a task has that does not set an attribute."""
    value, key = getattr(app.Task, attribute, None), dict(Task.from_config).get(attribute)
    value = app.conf[key] if value is None and key else value
    if attribute == "acks_on_timeout" and value is None:
        return default(app, "acks_on_failure_or_timeout")
    return value


def spelled(app: Celery, key: str) -> str:
    """Return the name under which the project writes a setting."""
    return f"{app.conf.prefix}{key.upper()}" if app.conf.prefix else key


def setting(app: Celery, key: str) -> str:
    return f"{spelled(app, key)} = {app.conf[key]!r}"


def transport(app: Celery) -> str:
    return str(app.connection_for_write().transport_cls)


def beat_entries(app: Celery) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield label, entry and options of what beat sends."""
    for name, entry in (app.conf.beat_schedule or {}).items():
        yield f"beat entry {name!r}", entry, entry.get("options") or {}
