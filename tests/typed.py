"""Settings for `make lint`: what the types of models and users depend on."""

SECRET_KEY = "types"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "durable_jobs",
    "hardened_celery",
    "queue_probes",
]
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "none"}}
USE_TZ = True
