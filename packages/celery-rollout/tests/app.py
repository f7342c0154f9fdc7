"""The Celery application of these tests, which pyproject.toml names: `celery -A tests.app ...`."""

import os
import time

import celery
from celery import shared_task

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
app = celery.Celery("tests", task_cls="durable_jobs:JobTask")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@shared_task(base=celery.Task, name="tests.sleep", ignore_result=True)
def sleep(seconds: float) -> None:
    time.sleep(seconds)
