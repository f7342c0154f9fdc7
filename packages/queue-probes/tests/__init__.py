"""The tests' Django project; its Celery app is the one of each process that loads a setting."""

from tests.app import app as celery_app

__all__ = ["celery_app"]
