"""Tests, and the small Django and Celery project that they run against."""

from tests.app import app as celery_app

__all__ = ["celery_app"]
