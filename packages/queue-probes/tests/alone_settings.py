"""The fast settings, in a project that has no durable jobs."""

from tests.fast_settings import *  # noqa: F403
from tests.fast_settings import INSTALLED_APPS

INSTALLED_APPS.remove("durable_jobs")
