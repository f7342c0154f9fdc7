"""The loop as a periodic task: plain Celery, on a queue that what it heals cannot block."""

from importlib.util import find_spec

import celery
import django
from celery import shared_task

from durable_jobs.reconcile import loop

if django.VERSION >= (6,) or find_spec("django_tasks"):
    # A worker must know the task that runs Django's tasks.
    import durable_jobs.backends  # noqa: F401


@shared_task(base=celery.Task, name="durable_jobs.reconcile", ignore_result=True, acks_late=False)
def reconcile() -> str:
    """Run one pass; beat sends it each tick, and a late one expires instead of piling up."""
    return str(loop.run_once())
