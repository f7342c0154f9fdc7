"""System checks: what would make durable jobs less than durable is said before it happens."""

from collections.abc import Sequence
from typing import Any

from celery import current_app
from django.apps import AppConfig
from django.conf import settings
from django.core import checks
from django.db import connections, router

from durable_jobs.conf import DEFAULTS, conf

Message = checks.CheckMessage


@checks.register("celery", "durable_jobs")
def check_all(app_configs: Sequence[AppConfig] | None = None, **_: Any) -> list[Message]:
    """Return everything that is wrong, not only the first."""
    return [*check_names(), *check_database(), *check_timing(), *check_celery()]


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
    from durable_jobs.tasks import reconcile

    found: list[Message] = []
    schedule = getattr(settings, "CELERY_BEAT_SCHEDULE", None) or current_app.conf.beat_schedule
    if not any(entry["task"] == reconcile.name for entry in (schedule or {}).values()):
        found.append(
            checks.Warning(
                "No entry of CELERY_BEAT_SCHEDULE runs durable_jobs.reconcile.",
                hint="Retries, delays and lost jobs wait for it: add an entry, or run "
                "`manage.py reconcile --loop` as a service and silence this check.",
                id="durable_jobs.W002",
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
