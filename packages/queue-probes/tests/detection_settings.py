"""The tests' settings, without probes where WITHOUT_PROBES asks for it: what do they cost?"""

import os

from tests.settings import *  # noqa: F403
from tests.settings import CELERY_BEAT_SCHEDULE, INSTALLED_APPS, MIDDLEWARE

if "WITHOUT_PROBES" in os.environ:
    INSTALLED_APPS.remove("queue_probes")
    MIDDLEWARE.remove("queue_probes.middleware.HealthMiddleware")
    del CELERY_BEAT_SCHEDULE["queue_probes.probe"]
    ROOT_URLCONF = "durable_jobs.urls"
