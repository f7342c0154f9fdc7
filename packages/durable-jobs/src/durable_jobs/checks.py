"""System checks: what would make durable jobs less than durable is said before it happens."""

import os
from collections.abc import Sequence
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
MAKE_DURABLE = 'Celery(..., task_cls="durable_jobs:JobTask")'


@checks.register("celery", "durable_jobs")
def check_all(app_configs: Sequence[AppConfig] | None = None, **_: Any) -> list[Message]:
    """Return everything that is wrong, not only the first."""
    if wrong := check_types():
        return wrong
    rules = (check_names, check_database, check_timing, check_celery)
    return [message for rule in rules for message in rule()]


def check_names() -> list[Message]:
    unknown = sorted(set(getattr(settings, "DURABLE_JOBS", {})) - set(DEFAULTS))
    return [
        checks.Error(
            f"DURABLE_JOBS has no setting {name!r}.",
            hint=f"Known are {', '.join(sorted(DEFAULTS))}.",
            id="durable_jobs.E001",
        )
        for name in unknown
    ]


def check_types() -> list[Message]:
    """Return what the other checks, and the app, could not read."""
    given = getattr(settings, "DURABLE_JOBS", {})
    if not isinstance(given, dict):
        return [wrong_type("DURABLE_JOBS", given, "a dict of settings")]
    found: list[Message] = []
    for name, default in DEFAULTS.items():
        value = getattr(conf, name)
        if isinstance(default, str):
            fits, wanted = isinstance(value, str), f"a string, as {default!r}"
        else:
            number = int if isinstance(default, int) else int | float
            fits = isinstance(value, number) and not isinstance(value, bool) and value > 0
            wanted = f"a number above zero, as {default!r}; spans are seconds"
        if not fits:
            found.append(wrong_type(f"DURABLE_JOBS[{name!r}]", value, wanted))
    return found


def wrong_type(name: str, value: Any, wanted: str) -> Message:
    return checks.Error(
        f"{name} is {value!r}.", hint=f"It must be {wanted}.", id="durable_jobs.E007"
    )


def check_database() -> list[Message]:
    from durable_jobs.models import Job

    alias = conf.DATABASE
    found: list[Message] = []
    if alias not in settings.DATABASES:
        return [
            checks.Error(
                f"DURABLE_JOBS['DATABASE'] is {alias!r}, which DATABASES does not have.",
                hint="Name the database that holds the rows your tasks are about.",
                id="durable_jobs.E002",
            )
        ]
    if {router.db_for_write(Job), router.db_for_read(Job)} != {alias}:
        found.append(
            checks.Error(
                f"DATABASE_ROUTERS sends jobs to {router.db_for_write(Job)!r} and reads them from "
                f"{router.db_for_read(Job)!r}; DURABLE_JOBS['DATABASE'] is {alias!r}.",
                hint="A job commits with your rows only in their database, and a replica lags.",
                id="durable_jobs.E003",
            )
        )
    vendor = connections[alias].vendor
    if vendor == "sqlite":
        found.append(
            checks.Warning(
                "Jobs are kept in SQLite, where one writer at a time works.",
                hint="Good for a first look. Use PostgreSQL 14 or later.",
                id="durable_jobs.W001",
            )
        )
    elif vendor != "postgresql":
        found.append(
            checks.Error(
                f"Durable jobs do not work on {vendor}: it has no UPDATE ... RETURNING.",
                hint="Use PostgreSQL 14 or later.",
                id="durable_jobs.E004",
            )
        )
    return found


def check_timing() -> list[Message]:
    found: list[Message] = []
    if conf.LEASE < 3 * conf.HEARTBEAT:
        found.append(
            checks.Error(
                f"LEASE ({conf.LEASE} s) is shorter than three HEARTBEATs ({conf.HEARTBEAT} s).",
                hint="Two beats may be late without a healthy job being run a second time.",
                id="durable_jobs.E005",
            )
        )
    if conf.REPUBLISH <= conf.TICK:
        found.append(
            checks.Error(
                f"REPUBLISH ({conf.REPUBLISH} s) must be longer than TICK ({conf.TICK} s).",
                hint="Every waiting job would be published again at every pass.",
                id="durable_jobs.E006",
            )
        )
    return found


def check_celery() -> list[Message]:
    app = current_app._get_current_object()
    if isinstance(app.loader, UnconfiguredLoader):
        return [
            checks.Error(
                "No Celery app is loaded with Django.",
                hint="Import it in the project's __init__.py: `.delay()` in a request would be a "
                "plain message to RabbitMQ on localhost, and no job.",
                id="durable_jobs.E008",
            )
        ]
    found = [*check_loop(app), *check_tasks(app)]
    if app.conf.task_protocol != 2:
        found.append(
            checks.Error(
                f"CELERY_TASK_PROTOCOL is {app.conf.task_protocol}: no durable task can be called.",
                hint="Leave it at 2, its default.",
                id="durable_jobs.E011",
            )
        )
    if not getattr(settings, "CELERY_DB_REUSE_MAX", None):
        found.append(
            checks.Warning(
                "CELERY_DB_REUSE_MAX is not set: Celery reconnects to the database for each task.",
                hint="CELERY_DB_REUSE_MAX = 500, and CONN_HEALTH_CHECKS in DATABASES.",
                id="durable_jobs.W003",
            )
        )
    return found


def check_loop(app: Celery) -> list[Message]:
    from durable_jobs.tasks import reconcile

    schedule = getattr(settings, "CELERY_BEAT_SCHEDULE", None) or app.conf.beat_schedule or {}
    entries = [entry for entry in schedule.values() if entry["task"] == reconcile.name]
    if not entries:
        return [
            checks.Warning(
                "No entry of CELERY_BEAT_SCHEDULE runs durable_jobs.reconcile.",
                hint="Retries, delays and lost jobs wait for it: add an entry, or run "
                "`manage.py reconcile --loop` as a service and silence this check.",
                id="durable_jobs.W002",
            )
        ]
    queues = {queue_of(app, reconcile.name, dict(entry.get("options") or {})) for entry in entries}
    if app.conf.task_default_queue not in queues:
        return []
    return [
        checks.Warning(
            "durable_jobs.reconcile is sent to the queue of all other tasks, "
            f"{app.conf.task_default_queue!r}.",
            hint="It cannot repair what it waits behind: give the entry 'options': "
            f"{{'queue': {conf.CONTROL_QUEUE!r}}}, and that queue a worker of its own.",
            id="durable_jobs.W004",
        )
    ]


def queue_of(app: Celery, task: str, options: dict[str, Any]) -> str | None:
    """Return where Celery sends it; None when nobody declared that queue, which Celery refuses."""
    try:
        return str(app.amqp.router.route(options, task)["queue"].name)
    except QueueNotFound:
        return None


def check_tasks(app: Celery) -> list[Message]:
    """Say what silently does nothing."""
    from durable_jobs.task import JobTask

    import_tasks(app)
    own = own_tasks(app)
    plain = {name: task for name, task in own.items() if not isinstance(task, JobTask)}
    found: list[Message] = [
        checks.Error(
            f"The task {name} is plain Celery, which knows nothing of {' and '.join(used)}.",
            hint=f"{MAKE_DURABLE} makes all tasks durable, @shared_task(base=JobTask) one.",
            id="durable_jobs.E009",
        )
        for name, task in plain.items()
        if (used := used_by(name, task))
    ]
    if own and not found and len(plain) == len(own) and not issubclass(app.Task, JobTask):
        found.append(
            checks.Warning(
                "No task is durable.",
                hint=f"{MAKE_DURABLE} makes all tasks durable, @shared_task(base=JobTask) one.",
                id="durable_jobs.W005",
            )
        )
    found += [
        checks.Warning(
            f"The rate_limit of {name} counts messages, and one may carry {conf.SLICE_MAX} jobs.",
            hint="Give the task a queue of its own, and a worker with as few children.",
            id="durable_jobs.W006",
        )
        for name, task in own.items()
        if name not in plain and task.rate_limit
    ]
    return found


def own_tasks(app: Celery) -> dict[str, Any]:
    """Return the project's tasks, neither Celery's nor ours."""
    return {
        name: task
        for name, task in sorted(app.tasks.items())
        if not name.startswith(("celery.", "durable_jobs."))
    }


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
