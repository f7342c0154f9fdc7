"""Wiring only: settings, the Celery app, URLs. `@shared_task` finds the app through this import."""

from config.celery import app as celery_app

__all__ = ["celery_app"]
