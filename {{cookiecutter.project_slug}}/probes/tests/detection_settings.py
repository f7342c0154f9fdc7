"""The project's settings, and a task for the load."""

from config.settings import *  # noqa: F403

CELERY_IMPORTS = ["probes.tests.slow"]
