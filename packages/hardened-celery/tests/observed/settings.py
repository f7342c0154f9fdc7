"""The project's settings with other views, tasks and beat entries.

`FORK=broken` takes the fix for forked processes away. `FORK` in any form lets a process that is
going to fork send an event before: only then can a fork go wrong.
"""

import os
from datetime import datetime, timedelta

from celery import schedules
from celery.signals import worker_process_init

from hardened_celery import sentry
from tests.settings import *  # noqa: F403

ROOT_URLCONF = "tests.observed.urls"
CELERY_IMPORTS = ["tests.observed.tasks"]
if "durable_jobs" in INSTALLED_APPS:  # noqa: F405
    CELERY_IMPORTS.append("tests.observed.jobs")
DURABLE_JOBS = {"BACKOFF_MIN": 0.2, "BACKOFF_MAX": 0.4}


class OftenDue(schedules.schedule):
    """Says it is due every minute, and is due every second."""

    def is_due(self, last_run_at: datetime) -> tuple[bool, float]:
        return self.now() - last_run_at > timedelta(seconds=1), 0.1


SPEAK = {"task": "tests.observed.tasks.speak", "schedule": OftenDue(60)}
CELERY_BEAT_SCHEDULE = {
    "speak": SPEAK | {"args": ["from beat"]},
    "broken": SPEAK | {"args": [object()]},
}

if os.environ.get("FORK"):
    import sentry_sdk

    sentry_sdk.capture_message("the parent")
    sentry_sdk.flush()
if os.environ.get("FORK") == "broken":
    worker_process_init.disconnect(sentry.after_fork)
    sentry.after_fork = lambda: None
