"""Django system checks for Celery: `manage.py check --tag celery`, and a part of plain `check`.

They find settings that Celery does not know, queues and tasks that do not exist, secrets in code,
and combinations of valid settings that lose tasks, run them forever or twice, or block who sends
them. Copy this file into any project and add the class below to INSTALLED_APPS. For Celery 5.7.

An error is certain to go wrong; a warning may be meant so, then name its id in
SILENCED_SYSTEM_CHECKS. Not seen: options given to `apply_async` or on a command line, and schedules
that are kept in a database.
"""

import ast
import difflib
import os
import re
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery, Task, current_app
from celery.app.defaults import _TO_NEW_KEY, DEFAULTS
from celery.loaders.default import Loader as UnconfiguredLoader
from django.conf import settings
from django.core import checks

Messages = Iterator[checks.CheckMessage]

# Libraries read these from Celery's configuration; add those of yours.
OTHER_NAMES = re.compile(r"db_reuse_max|redbeat_.*")
REDIS, RABBITMQ = {"redis", "rediss", "sentinel"}, {"amqp", "amqps", "pyamqp", "librabbitmq"}
REDIS_VISIBILITY_TIMEOUT = 3600  # kombu's default
RETRY_BACKOFF_MAX = 600  # Celery's default
PICKLE = {"pickle", "application/x-python-serialize"}
URL_WITH_PASSWORD = re.compile(
    r"(redis|rediss|sentinel|amqps?|pyamqp)://(?!guest:guest@localhost)[^:/@\s]*:[^@/\s%{<$]+@"
)


def check_celery(**_options: Any) -> list[checks.CheckMessage]:
    """Return every fault of the current Celery app."""
    app = current_app._get_current_object()
    if isinstance(app.loader, UnconfiguredLoader):
        hint = "Import it in the project's __init__.py; shared_task uses RabbitMQ on localhost now."
        return [fault("W011", "No Celery app is loaded with Django.", hint)]
    import_tasks(app)
    return [message for rule in RULES for message in rule(app)]


def import_tasks(app: Celery) -> None:
    """Import all modules with tasks."""
    skipped = "CELERY_SKIP_CHECKS" in os.environ
    # Else Celery runs all of Django's checks first, this one too.
    os.environ["CELERY_SKIP_CHECKS"] = "1"
    try:
        app.loader.import_default_modules()
    finally:
        if not skipped:
            del os.environ["CELERY_SKIP_CHECKS"]
    app.finalize()


def check_debug(**_options: Any) -> list[checks.CheckMessage]:
    """Return an error when DEBUG is on where the project is deployed."""
    hint = "Set it to False: error pages show settings and arguments."
    return [fault("E016", "DEBUG is True in a deployment.", hint)] if settings.DEBUG else []


def fault(identity: str, text: str, hint: str) -> checks.CheckMessage:
    """Return an error, for what is certain to go wrong, or a warning, as its identity begins."""
    kind = checks.Error if identity.startswith("E") else checks.Warning
    return kind(text, hint=hint, id=f"celery.{identity}")


# --- What the rules look at -----------------------------------------------------------------------


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
    """Return a setting's name and value."""
    return f"{spelled(app, key)} = {app.conf[key]!r}"


def transport(app: Celery) -> str:
    """Return the scheme of the broker's URL."""
    return str(app.connection_for_write().transport_cls)


def beat_entries(app: Celery) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield label, entry and options of what beat sends."""
    for name, entry in (app.conf.beat_schedule or {}).items():
        yield f"beat entry {name!r}", entry, entry.get("options") or {}


def literals() -> Iterator[tuple[str, str]]:
    """Yield place and text of the strings in the files beside the settings; no docstrings."""
    module = sys.modules.get(os.environ.get("DJANGO_SETTINGS_MODULE", ""))
    folder = Path(module.__file__).parent if module and module.__file__ else None
    for path in sorted(folder.glob("*.py")) if folder else []:
        for node in ast.walk(ast.parse(path.read_bytes())):
            for child in () if isinstance(node, ast.Expr) else ast.iter_child_nodes(node):
                if isinstance(child, ast.Constant) and isinstance(child.value, str):
                    yield f"{path.parent.name}/{path.name}:{child.lineno}", child.value


# --- Names ----------------------------------------------------------------------------------------


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


# --- Delivery -------------------------------------------------------------------------------------


def visibility(app: Celery) -> Messages:
    """No message is delivered again while its task still runs or waits."""
    if transport(app) not in REDIS:
        return
    options = app.conf.broker_transport_options
    timeout = options.get("visibility_timeout") or REDIS_VISIBILITY_TIMEOUT
    name = f"the visibility_timeout in {spelled(app, 'broker_transport_options')}"
    for owner in owners(app, "time_limit", "acks_late"):
        limit = (owner.values["time_limit"] or 0) + app.conf.worker_soft_shutdown_timeout
        if owner.values["acks_late"] and limit >= timeout:
            text = f"{owner.name('time_limit')} allows {limit:g} s, {name} is {timeout:g} s:"
            hint = f"Set {name} to {2 * limit + 300:g}, in all processes, or the limit lower."
            yield fault("E005", f"{text} a task runs a second time while it still runs.", hint)
    for place, countdown in countdowns(app):
        if countdown and countdown >= timeout:
            text = f"{place} is {countdown:g} s, {name} is {timeout:g} s: what waits is delivered"
            hint = "Make the delay less, or store when it is due and let beat look for it."
            yield fault("E006", f"{text} again before, and runs more than once.", hint)


def countdowns(app: Celery) -> Iterator[tuple[str, float | None]]:
    """Yield every place that delays tasks, and the seconds."""
    for owner in owners(app, "default_retry_delay"):
        yield owner.name("default_retry_delay"), owner.values["default_retry_delay"]
    for owner in owners(app, "retry_backoff", "retry_backoff_max"):
        if owner.values["retry_backoff"]:
            longest = owner.values["retry_backoff_max"] or RETRY_BACKOFF_MAX
            yield owner.name("retry_backoff_max"), longest
    for label, _entry, options in beat_entries(app):
        yield f"`countdown` of the {label}", options.get("countdown")


def endless(app: Celery) -> Messages:
    """A task that fails each time comes to an end."""
    for owner in owners(app, "retry_on_worker_lost", "max_retries"):
        if owner.values["retry_on_worker_lost"] and owner.values["max_retries"] is None:
            text = f"{owner.name('max_retries')} is None, and it is retried when its process dies:"
            hint = "Give it a number, or set retry_on_worker_lost and reject_on_worker_lost False."
            yield fault("E007", f"{text} a task that kills its process does so forever.", hint)
    for owner in owners(app, "acks_late", "acks_on_timeout"):
        if owner.values["acks_late"] and owner.values["acks_on_timeout"] is False:
            text = f"{owner.name('acks_on_timeout')} is False: a task that takes longer than its"
            hint = "Remove it, also as acks_on_failure_or_timeout; True is the default."
            yield fault("E009", f"{text} time limit is started again forever.", hint)


def lost(app: Celery) -> Messages:
    """A task survives the death of its process, and its process survives the task."""
    remapped = os.environ.get("REMAP_SIGTERM") == "SIGQUIT"
    for owner in owners(app, "acks_late", "reject_on_worker_lost", "retry_on_worker_lost"):
        late, reject, retry = owner.values.values()
        acks, retries = owner.name("acks_late"), owner.name("retry_on_worker_lost")
        hint = f"Set {retries} to True, and reject_on_worker_lost for when that cannot be sent."
        if not late and remapped:
            text = f"{acks} is {late}, and REMAP_SIGTERM is SIGQUIT: what runs when a worker stops"
            hint = f"Set {acks} to True, or remove REMAP_SIGTERM from the environment."
            yield fault("E008", f"{text} is lost.", hint)
        elif not late and not owner.task:
            text = f"{acks} is {late}: what runs when a worker is killed is lost."
            yield fault("W004", text, f"Set {acks} to True; tasks then may run twice.")
        elif late and not reject and not retry:
            text = f"{acks} is True, and yet a task is lost when its process is killed."
            yield fault("W005", text, hint)
        elif late and not retry:
            text = f"{owner.name('reject_on_worker_lost')} is True, and {retries} is not:"
            yield fault("W003", f"{text} a task that kills its process does so forever.", hint)


def waiting(app: Celery) -> Messages:
    """No task holds a process, or other tasks, forever."""
    if not app.conf.task_time_limit:
        text = f"{setting(app, 'task_time_limit')}: each task that hangs takes a process with it."
        yield fault("W006", text, "Set it, to 300 say; a task may have a time_limit of its own.")
    if app.conf.task_acks_late and app.conf.worker_prefetch_multiplier != 1:
        text = f"{setting(app, 'worker_prefetch_multiplier')}: tasks wait behind a long one,"
        yield fault("W009", f"{text} though other processes are idle.", "Set it to 1.")


# --- Broker, results, content ---------------------------------------------------------------------


def blocking(app: Celery) -> Messages:
    """Sending a task ends soon, whatever the broker does."""
    options, scheme = app.conf.broker_transport_options, transport(app)
    wanted = {"socket_timeout", "socket_connect_timeout"} if scheme in REDIS else set()
    if scheme in RABBITMQ and options.get("confirm_publish"):
        wanted = {"read_timeout"}
    if missing := sorted(name for name in wanted if not options.get(name)):
        text = f"{spelled(app, 'broker_transport_options')} has no {' and no '.join(missing)}:"
        hint = "Set it: to 2 seconds, say, where a person waits, and to 10 in workers."
        yield fault("W007", f"{text} a broker that freezes blocks `.delay()` forever.", hint)
    policy = app.conf.task_publish_retry_policy
    if app.conf.task_publish_retry and policy.get("max_retries") is None:
        text = f"{spelled(app, 'task_publish_retry_policy')} has max_retries=None: a broker"
        yield fault("E017", f"{text} that freezes blocks `.delay()` forever.", "Write 1, say.")


def results(app: Celery) -> Messages:
    """Sending a task does not wait long for the result backend."""
    policy = app.conf.result_backend_transport_options.get("retry_policy") or {}
    on_redis = str(app.conf.result_backend).partition(":")[0] in REDIS
    if on_redis and policy.get("max_retries") is None:
        text = f"{spelled(app, 'result_backend_transport_options')} has no retry_policy with"
        text += " max_retries: `.delay()` takes 19 s, then fails, when the result backend is down."
        hint = 'Add "retry_policy": {"max_retries": 3, "interval_step": 0.1, "interval_max": 0.5}.'
        yield fault("W008", text, hint)


def broker(app: Celery) -> Messages:
    """The broker keeps tasks, and is who it says it is."""
    connection = app.connection_for_write()
    scheme = str(connection.transport_cls)
    if scheme in {"filesystem", "sqla", "sqlalchemy", "memory"}:
        text = f"A broker of the kind {scheme}:// loses what a worker runs when it is killed."
        yield fault("E011", text, "Use redis:// or amqp://, and memory:// in tests only.")
    options = connection.ssl if isinstance(connection.ssl, dict) else {}
    reqs = options.get("ssl_cert_reqs", options.get("cert_reqs", ssl.CERT_REQUIRED))
    # kombu ignores anything but a dict for Redis, and connects without TLS
    if reqs in (None, "none", ssl.CERT_NONE) or (scheme == "rediss" and not options):
        text = f"The certificate of the broker ({scheme}://) is not verified."
        hint = 'to {"ssl_cert_reqs": ssl.CERT_REQUIRED}, and nothing about it in the URL.'
        yield fault("E012", text, f"Set {spelled(app, 'broker_use_ssl')} {hint}")


def pickle(app: Celery) -> Messages:
    """Whoever reaches the broker or the result backend cannot run code."""
    keys = "accept_content", "result_accept_content", "result_serializer", "event_serializer"
    places = [(spelled(app, key), app.conf[key]) for key in keys]
    for owner in owners(app, "serializer"):
        places.append((owner.name("serializer"), owner.values["serializer"]))
    for place, value in places:
        if PICKLE.intersection([value] if isinstance(value, str) else value or ()):
            text = f"{place} allows pickle: who can write to the broker can run code in workers."
            yield fault("E010", text, 'Write "json", and send ids instead of objects.')


def eager(app: Celery) -> Messages:
    """Tasks reach a worker."""
    if app.conf.task_always_eager:
        name = spelled(app, "task_always_eager")
        identity = "W010" if settings.DEBUG else "E013"
        text = f"{name} is on: tasks run in the process that sends them, and no worker gets any."
        yield fault(identity, text, f"Set it to False (or the environment variable {name} to 0).")


def secrets(app: Celery) -> Messages:
    """Neither passwords nor the key of this deployment are in the code."""
    key, texts = settings.SECRET_KEY, list(literals())
    for place, text in texts:
        if URL_WITH_PASSWORD.match(text):
            hint = 'Read it from the environment: os.environ["CELERY_BROKER_URL"].'
            yield fault("E014", f"{place} has the URL of a broker with a password in it.", hint)
    found = [place for place, text in texts if text == key]
    if not settings.DEBUG and (found or key.startswith("django-insecure-")):
        text = f"SECRET_KEY is in the code ({found[0] if found else 'generated by startproject'})"
        hint = "Read it from the environment, without a default."
        yield fault("E015", f"{text} and DEBUG is off: it lets anybody sign in.", hint)


RULES = [names, queues, beat, visibility, endless, lost, waiting, blocking, results, broker]
RULES += [pickle, eager, secrets]
