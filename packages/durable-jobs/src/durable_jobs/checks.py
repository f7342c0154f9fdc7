"""System checks: what would make durable jobs less than durable is said before it happens."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from celery import Celery, current_app
from celery.exceptions import QueueNotFound
from celery.loaders.default import Loader as UnconfiguredLoader
from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.db import connections, router

from durable_jobs.conf import DEFAULTS, conf

Message = checks.CheckMessage
# What a plain task takes for an attribute of its own, and ignores.
OURS = {"atomic", "rerun", "max_attempts", "slices"}
MAKE_DURABLE = (
    'Celery(..., task_cls="durable_jobs:JobTask") makes all tasks durable,'
    " @shared_task(base=JobTask) one."
)


@checks.register("celery", "durable_jobs")
def check_all(app_configs: Sequence[AppConfig] | None = None, **_: Any) -> list[Message]:
    """Return everything that is wrong, not only the first."""
    if wrong := list(check_types()):
        return wrong
    rules = (check_names, check_database, check_timing, check_celery)
    return [message for rule in rules for message in rule()]


def error(code: str, text: str, hint: str) -> Message:
    return checks.Error(text, hint=hint, id=f"durable_jobs.{code}")


def warning(code: str, text: str, hint: str) -> Message:
    return checks.Warning(text, hint=hint, id=f"durable_jobs.{code}")


def check_names() -> Iterator[Message]:
    for name in sorted(set(getattr(settings, "DURABLE_JOBS", {})) - set(DEFAULTS)):
        known = f"Known are {', '.join(sorted(DEFAULTS))}."
        yield error("E001", f"DURABLE_JOBS has no setting {name!r}.", known)


def check_types() -> Iterator[Message]:
    """Say what the other checks, and the app, could not read."""
    given = getattr(settings, "DURABLE_JOBS", {})
    if not isinstance(given, dict):
        yield error("E007", f"DURABLE_JOBS is {given!r}.", "It must be a dict of settings.")
        return
    for name, default in DEFAULTS.items():
        value = getattr(conf, name)
        if isinstance(default, str):
            fits, wanted = isinstance(value, str), f"a string, as {default!r}"
        else:
            number = int if isinstance(default, int) else int | float
            fits = isinstance(value, number) and not isinstance(value, bool) and value > 0
            wanted = f"a number above zero, as {default!r}; spans are seconds"
        if not fits:
            yield error("E007", f"DURABLE_JOBS[{name!r}] is {value!r}.", f"It must be {wanted}.")


def check_database() -> Iterator[Message]:
    from durable_jobs.models import Job

    alias = conf.DATABASE
    if alias not in settings.DATABASES:
        text = f"DURABLE_JOBS['DATABASE'] is {alias!r}, which DATABASES does not have."
        yield error("E002", text, "Name the database that holds the rows your tasks are about.")
        return
    written, read = router.db_for_write(Job), router.db_for_read(Job)
    if {written, read} != {alias}:
        text = f"DATABASE_ROUTERS sends jobs to {written!r} and reads them from {read!r};"
        hint = "A job commits with your rows only in their database, and a replica lags."
        yield error("E003", f"{text} DURABLE_JOBS['DATABASE'] is {alias!r}.", hint)
    vendor = connections[alias].vendor
    if vendor == "sqlite":
        text = "Jobs are kept in SQLite, where one writer at a time works."
        yield warning("W001", text, "Good for a first look. Use PostgreSQL 14 or later.")
    elif vendor != "postgresql":
        text = f"Durable jobs do not work on {vendor}: it has no UPDATE ... RETURNING."
        yield error("E004", text, "Use PostgreSQL 14 or later.")


def check_timing() -> Iterator[Message]:
    if conf.LEASE < 3 * conf.HEARTBEAT:
        text = f"LEASE ({conf.LEASE} s) is shorter than three HEARTBEATs ({conf.HEARTBEAT} s)."
        hint = "Two beats may be late without a healthy job being run a second time."
        yield error("E005", text, hint)
    if conf.REPUBLISH <= conf.TICK:
        text = f"REPUBLISH ({conf.REPUBLISH} s) must be longer than TICK ({conf.TICK} s)."
        yield error("E006", text, "Every waiting job would be published again at every pass.")


def check_celery() -> Iterator[Message]:
    app = current_app._get_current_object()
    if isinstance(app.loader, UnconfiguredLoader):
        hint = "Import it in the project's __init__.py: `.delay()` in a request would be a plain"
        hint += " message to RabbitMQ on localhost, and no job."
        yield error("E008", "No Celery app is loaded with Django.", hint)
        return
    yield from check_loop(app)
    yield from check_tasks(app)
    if (protocol := app.conf.task_protocol) != 2:
        text = f"CELERY_TASK_PROTOCOL is {protocol}: no durable task can be called."
        yield error("E011", text, "Leave it at 2, its default.")
    if not getattr(settings, "CELERY_DB_REUSE_MAX", None):
        text = "CELERY_DB_REUSE_MAX is not set: Celery reconnects to the database for each task."
        hint = "CELERY_DB_REUSE_MAX = 500, and CONN_HEALTH_CHECKS in DATABASES."
        yield warning("W003", text, hint)


def check_loop(app: Celery) -> Iterator[Message]:
    from durable_jobs.tasks import reconcile

    schedule = getattr(settings, "CELERY_BEAT_SCHEDULE", None) or app.conf.beat_schedule or {}
    entries = [entry for entry in schedule.values() if entry["task"] == reconcile.name]
    if not entries:
        text = "No entry of CELERY_BEAT_SCHEDULE runs durable_jobs.reconcile."
        hint = "Retries, delays and lost jobs wait for it: add an entry, or run"
        hint += " `manage.py reconcile --loop` as a service and silence this check."
        yield warning("W002", text, hint)
    queues = {queue_of(app, reconcile.name, dict(entry.get("options") or {})) for entry in entries}
    if (usual := app.conf.task_default_queue) in queues:
        text = f"durable_jobs.reconcile is sent to the queue of all other tasks, {usual!r}."
        hint = "It cannot repair what it waits behind: give the entry 'options':"
        hint += f" {{'queue': {conf.CONTROL_QUEUE!r}}}, and that queue a worker of its own."
        yield warning("W004", text, hint)


def queue_of(app: Celery, task: str, options: dict[str, Any]) -> str | None:
    """Return where Celery sends it; None when nobody declared that queue, which Celery refuses."""
    try:
        return str(app.amqp.router.route(options, task)["queue"].name)
    except QueueNotFound:
        return None


def check_tasks(app: Celery) -> Iterator[Message]:
    """Say what silently does nothing."""
    from durable_jobs.task import JobTask

    import_tasks(app)
    own = own_tasks(app)
    plain = {name: task for name, task in own.items() if not isinstance(task, JobTask)}
    wrong = {name: used for name, task in plain.items() if (used := used_by(name, task))}
    for name, used in wrong.items():
        text = f"The task {name} is plain Celery, which knows nothing of {' and '.join(used)}."
        yield error("E009", text, MAKE_DURABLE)
    for name, task in plain.items():
        base = own_base(task)
        meant = getattr(base, "durable", None) is False
        if issubclass(app.Task, JobTask) and base and name not in wrong and not meant:
            text = f"The task {name} is plain Celery, because its base {base.__qualname__} is."
            hint = f"class {base.__name__}(JobTask) makes it durable; durable = False leaves it."
            yield warning("W007", text, hint)
    if own and not wrong and len(plain) == len(own) and not issubclass(app.Task, JobTask):
        yield warning("W005", "No task is durable.", MAKE_DURABLE)
    for name, task in own.items():
        if name not in plain and task.rate_limit:
            text = f"The rate_limit of {name} counts messages, and one may carry"
            hint = "Give the task a queue of its own, and a worker with as few children."
            yield warning("W006", f"{text} {conf.SLICE_MAX} jobs.", hint)


def own_tasks(app: Celery) -> dict[str, Any]:
    """Return the project's tasks, neither Celery's nor ours."""
    return {
        name: task
        for name, task in sorted(app.tasks.items())
        if not name.startswith(("celery.", "durable_jobs."))
    }


def own_base(task: Any) -> type | None:
    """Return the project's class that the task is of; None for the bare `base=celery.Task`."""
    # What a decorator makes is a class of its own, with the function's name.
    classes = [c for c in type(task).__mro__ if "_decorated" not in vars(c)]
    return None if classes[0].__module__.startswith("celery.") else classes[0]


def used_by(name: str, task: Any) -> list[str]:
    """Return what a task uses that only a durable one has."""
    from durable_jobs.reconcilers import _registered as registered

    return sorted(OURS & set(vars(type(task)))) + ["@reconciler"] * (name in registered)


def import_tasks(app: Celery) -> None:
    """Import all modules with tasks, as a worker does when it starts."""
    skipped = "CELERY_SKIP_CHECKS" in os.environ
    # Else Celery runs all of Django's checks first, this one too.
    os.environ["CELERY_SKIP_CHECKS"] = "1"
    try:
        app.loader.import_default_modules()
    finally:
        if not skipped:
            del os.environ["CELERY_SKIP_CHECKS"]
    app.finalize()
