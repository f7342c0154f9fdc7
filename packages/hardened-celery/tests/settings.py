"""Settings of the tests' project: as a new project has them, and hardly anything else.

Durable jobs and probes are there where they are installed: that Sentry and the logs deal with them
is tested as well.
"""

import logging
import runpy
from importlib.util import find_spec

import environ

from hardened_celery import logging as logs
from hardened_celery import sentry
from tests.wiring import TEMPLATE_SETTINGS

env = environ.Env()
DEBUG = env.bool("DJANGO_DEBUG", default=False)
SECRET_KEY = env.str("DJANGO_SECRET_KEY", default="only-for-" + "tests")
ALLOWED_HOSTS = env.list("DJANGO_ALLOWED_HOSTS", default=["127.0.0.1", "localhost"])
DATABASES = {"default": env.db("DATABASE_URL", default="sqlite://:memory:")}
ROOT_URLCONF = "tests.urls"
USE_TZ = True
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",  # refuses the hosts of scanners
    "django_structlog.middlewares.RequestMiddleware",
]
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "hardened_celery",
    *(name for name in ("durable_jobs", "queue_probes") if find_spec(name)),
]

_settings = runpy.run_path(str(TEMPLATE_SETTINGS))
globals().update({name: _settings[name] for name in _settings["__all__"]})
CELERY_DB_REUSE_MAX = 500
if "durable_jobs" in INSTALLED_APPS:
    CELERY_BEAT_SCHEDULE = {
        "durable_jobs.reconcile": {
            "task": "durable_jobs.reconcile",
            "schedule": 5.0,
            "options": {"queue": "control", "expires": 5.0},
        }
    }
if "queue_probes" in INSTALLED_APPS:
    # On a busy machine a worker without beat would report, rightly, that its queues are late.
    QUEUE_PROBES = {"THRESHOLD": 600}

LOGGING = logs.configure(json_lines=not DEBUG, level=env.str("DJANGO_LOG_LEVEL", default="INFO"))
DJANGO_STRUCTLOG_TRUST_UPSTREAM_REQUEST_ID = True
DJANGO_STRUCTLOG_IP_LOGGING_ENABLED = False
DJANGO_STRUCTLOG_STATUS_START_LOG_LEVEL = logging.DEBUG

sentry.init()
