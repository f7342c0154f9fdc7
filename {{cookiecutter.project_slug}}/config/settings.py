"""Django settings. Production is the default; `DJANGO_DEBUG=1` switches development on.

Everything that differs between machines comes from the environment, or in development from `.env`
(yours) and `.dev/env` (written by `make up` while it runs); the process environment wins over both.
"""

import logging
import os
from pathlib import Path

import django
from celery.schedules import crontab
from django.core.exceptions import ImproperlyConfigured
from hardened_celery import literal, sentry
from hardened_celery import logging as logs

BASE_DIR = Path(__file__).resolve().parent.parent
# Taken literally, whatever a value begins with; what is wrong stops here, in one line without it.
env = literal.Env()
for env_file in (BASE_DIR / ".env", BASE_DIR / ".dev" / "env"):
    if env_file.is_file():
        env.read_env(env_file)

_needed = ("CELERY_BROKER_URL", "DATABASE_URL", "DJANGO_SECRET_KEY")
if missing := [name for name in _needed if not os.environ.get(name)]:
    raise ImproperlyConfigured(
        f"{', '.join(missing)} not set. While developing, `make up` or `make shell` sets"
        " what is needed; elsewhere set it in the environment."
    )

# after the files are read: these settings look at the environment themselves
from config.celery_settings import *  # noqa: E402, F403

DEBUG = env.bool("DJANGO_DEBUG", default=False)
SECRET_KEY = env.str("DJANGO_SECRET_KEY")
ALLOWED_HOSTS = env.list(
    "DJANGO_ALLOWED_HOSTS", default=["127.0.0.1", "localhost"] if DEBUG else []
)
CSRF_TRUSTED_ORIGINS = env.list("DJANGO_CSRF_TRUSTED_ORIGINS", default=[])

# Your apps: one line for each that `manage.py startapp` makes.
LOCAL_APPS = [
    "accounts",
    "notes",  # example
]

INSTALLED_APPS = [
    *LOCAL_APPS,
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "django_migration_linter",
    "hardened_celery",
    "durable_jobs",
    "queue_probes",
]

MIDDLEWARE = [
    "queue_probes.middleware.HealthMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_structlog.middlewares.RequestMiddleware",
]

ROOT_URLCONF = "config.urls"
WSGI_APPLICATION = "config.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# A request and a worker keep their connection; a check before reuse survives a database restart.
DATABASES = {"default": {**env.db("DATABASE_URL"), "CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True}}
# Each process has a cache of its own until CACHE_URL names one for all. Never the broker's server:
# what a cache may evict there is a task.
CACHES = {"default": env.cache("CACHE_URL", default="locmemcache://")}
# `make lint` and each deploy look for what would break the release that runs meanwhile.
MIGRATION_LINTER_OPTIONS = {
    "exclude_apps": ["admin", "auth", "contenttypes", "sessions"],
    "ignore_initial_migrations": True,
    "no_cache": True,
    "warnings_as_errors": [],  # all of them
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
# Celery reconnects to the database for each task otherwise; durable_jobs checks the connection.
CELERY_DB_REUSE_MAX = 500

# The loop that makes true what the rows say; `control` has a worker of its own.
CELERY_BEAT_SCHEDULE = {
    "durable_jobs.reconcile": {
        "task": "durable_jobs.reconcile",
        "schedule": 5.0,
        # The scheduler of django-celery-beat knows `expires` as `expire_seconds`.
        "options": {"queue": "control", "expires": 5.0, "expire_seconds": 5.0},
    },
    # Only shows that beat's scheduler turns; a thread of beat sends the probes.
    "queue_probes.probe": {"task": "queue_probes.probe", "schedule": 10.0},
    # Yours: a task that runs by the clock is a row like any other.
    "accounts.clear_sessions": {
        "task": "accounts.tasks.clear_sessions",
        "schedule": crontab(hour="3", minute="17"),
    },
}
# Who hears of a queue that does not move; each of the three may be left out.
_mails = env.list("DJANGO_ADMINS", default=[])
ADMINS = _mails if django.VERSION >= (6,) else [(mail, mail) for mail in _mails]
QUEUE_PROBES = {
    "WEBHOOK": env.str("PROBES_WEBHOOK", default=""),
    "TOKEN": env.str("PROBES_TOKEN", default=None),
}
# Flower reads it by itself, and what has no colon would let in nobody, or everybody.
env.logins("FLOWER_BASIC_AUTH")
# Whom mails come from: those to people, and those about errors and queues to DJANGO_ADMINS.
DEFAULT_FROM_EMAIL = env.str("DJANGO_DEFAULT_FROM_EMAIL", default="webmaster@localhost")
SERVER_EMAIL = env.str("DJANGO_SERVER_EMAIL", default=DEFAULT_FROM_EMAIL)
# While developing mails are printed.
_mail = {**env.email_url("EMAIL_URL", default="consolemail:" if DEBUG else "smtp://localhost:25")}
# Who sends a mail, beat for one, must not hang with the mail server.
_mail["EMAIL_TIMEOUT"] = 10
if django.VERSION >= (6, 1):
    _options = {
        "host": "HOST",
        "port": "PORT",
        "username": "HOST_USER",
        "password": "HOST_PASSWORD",
        "use_tls": "USE_TLS",
        "use_ssl": "USE_SSL",
        "timeout": "TIMEOUT",
    }
    _smtp = {name: _mail.get(f"EMAIL_{key}") for name, key in _options.items()}
    _backend = _mail["EMAIL_BACKEND"]
    MAILERS = {"default": {"BACKEND": _backend, "OPTIONS": _smtp if ".smtp." in _backend else {}}}
else:
    globals().update(_mail)
# Django's own tasks API, for apps that use it: the same rows, the same workers.
TASKS = {"default": {"BACKEND": "durable_jobs.backends.JobBackend"}}

# Yours from the first migration on: it cannot be exchanged later.
AUTH_USER_MODEL = "accounts.User"
_VALIDATION = "django.contrib.auth.password_validation"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"{_VALIDATION}.UserAttributeSimilarityValidator"},
    {"NAME": f"{_VALIDATION}.MinimumLengthValidator"},
    {"NAME": f"{_VALIDATION}.CommonPasswordValidator"},
    {"NAME": f"{_VALIDATION}.NumericPasswordValidator"},
]

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
# What people upload. In production a folder that outlives releases and containers; without it an
# upload fails, for nobody may write into a release.
MEDIA_URL = "media/"
MEDIA_ROOT = env.str("DJANGO_MEDIA_ROOT", default=str(BASE_DIR / "media"))
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}
WHITENOISE_USE_FINDERS = DEBUG

if not DEBUG:
    SECURE_SSL_REDIRECT = env.bool("DJANGO_SECURE_SSL_REDIRECT", default=True)
    # Load balancers, container health checks and Prometheus speak plain HTTP to the process itself.
    SECURE_REDIRECT_EXEMPT = [r"^healthz/", r"^metrics$"]
    SECURE_HSTS_SECONDS = env.int("DJANGO_SECURE_HSTS_SECONDS", default=30 * 24 * 3600)
    # Both bind hosts that may not be this project's, and nobody can take them back for months.
    SECURE_HSTS_INCLUDE_SUBDOMAINS = env.bool("DJANGO_SECURE_HSTS_SUBDOMAINS", default=False)
    SECURE_HSTS_PRELOAD = env.bool("DJANGO_SECURE_HSTS_PRELOAD", default=False)
    # `check --deploy` asks for these two; the owner of the domain decides.
    SILENCED_SYSTEM_CHECKS = ["security.W005", "security.W021"]
    SESSION_COOKIE_SECURE = True
    CSRF_COOKIE_SECURE = True
    if env.bool("DJANGO_BEHIND_PROXY", default=False):
        # Only behind a proxy that sets or strips this header: a client could forge it otherwise.
        SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

_level = env.str("DJANGO_LOG_LEVEL", default="INFO", choices=logs.LEVELS)
LOGGING = logs.configure(json_lines=not DEBUG, level=_level)
# who calls us may number its requests; else each gets a number
DJANGO_STRUCTLOG_TRUST_UPSTREAM_REQUEST_ID = True
DJANGO_STRUCTLOG_IP_LOGGING_ENABLED = False
# one line per request, when it is finished
DJANGO_STRUCTLOG_STATUS_START_LOG_LEVEL = logging.DEBUG

sentry.init()
