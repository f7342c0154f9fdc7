"""The project's settings with other views, tasks and beat entries.

`FORK=broken` takes the fix for forked processes away. `FORK` in any form lets a process that is
going to fork send an event before: only then can a fork go wrong.
"""

import os
from datetime import datetime, timedelta

from celery import schedules
from celery.signals import worker_process_init

from config import sentry
from config.settings import *  # noqa: F403

ROOT_URLCONF = "tests.observed.urls"
SECURE_SSL_REDIRECT = False
CELERY_IMPORTS = ["tests.observed.tasks", "tests.observed.jobs"]
DURABLE_JOBS = {"BACKOFF_MIN": 0.2, "BACKOFF_MAX": 0.4}
# On a busy machine a worker without beat would report, rightly, that its queues are late.
QUEUE_PROBES = {"THRESHOLD": 600}


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
