"""A plain task that takes its time."""

import time

import celery
from celery import shared_task


@shared_task(base=celery.Task, name="tests.sleep", ignore_result=True)
def sleep(seconds: float) -> None:
    time.sleep(seconds)
