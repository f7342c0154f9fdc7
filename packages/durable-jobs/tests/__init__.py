"""A small Django project of the tests' own; see settings.py and celery.py."""

from tests.celery import app as celery_app

__all__ = ["celery_app"]
