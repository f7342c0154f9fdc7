"""The project's settings, and a task for the load; without probes for comparison."""

import os

from config.settings import *  # noqa: F403
from config.settings import CELERY_BEAT_SCHEDULE, INSTALLED_APPS, MIDDLEWARE

CELERY_IMPORTS = ["tests.slow"]
if "WITHOUT_PROBES" in os.environ:
    INSTALLED_APPS.remove("queue_probes")
    MIDDLEWARE.remove("queue_probes.middleware.HealthMiddleware")
    del CELERY_BEAT_SCHEDULE["queue_probes.probe"]
    ROOT_URLCONF = "durable_jobs.urls"
