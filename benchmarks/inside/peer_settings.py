"""Django settings of the other libraries: a bare project, with a database connection like ours."""

import logging
import os
from urllib.parse import unquote, urlsplit

import structlog

_database = urlsplit(os.environ["DATABASE_URL"])
SECRET_KEY = "bench"  # noqa: S105
USE_TZ = True
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    *os.environ["ARM_APPS"].split(),
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _database.path[1:],
        "USER": _database.username,
        "PASSWORD": unquote(_database.password or ""),
        "HOST": _database.hostname,
        "PORT": _database.port,
        "CONN_MAX_AGE": 60,
        "CONN_HEALTH_CHECKS": True,
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
CELERY_DB_REUSE_MAX = 500
CELERY_OUTBOX_APP = "arm_outbox.app"
PROCRASTINATE_IMPORT_PATHS = ["arm_procrastinate"]
POTATOQ = {"include": ["arm_potatoq"]}
LOGGING = {"version": 1, "disable_existing_loggers": False, "root": {"level": "WARNING"}}
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
