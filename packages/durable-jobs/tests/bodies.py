"""Tasks that end in unusual ways, or are coroutines; for test_bodies."""

import asyncio
import os
import time

import billiard.exceptions
from asgiref.sync import async_to_sync, sync_to_async
from celery import Task, shared_task
from celery.exceptions import WorkerTerminate
from django.contrib.auth.models import Group
from django.db import connection

from durable_jobs import Job, JobTask
from tests.tasks import effect


class Own(BaseException):
    """What a library derives from BaseException."""


KINDS = {
    "cancelled": asyncio.CancelledError,
    "generator": GeneratorExit,
    "exit": SystemExit,
    "interrupt": KeyboardInterrupt,
    "own": Own,
    "memory": MemoryError,
    "terminate": WorkerTerminate,
    "terminated": billiard.exceptions.Terminated,
    "lost": billiard.exceptions.WorkerLostError,
    "limit": billiard.exceptions.TimeLimitExceeded,
}


@shared_task(base=JobTask, bind=True, max_retries=0)
def die(self, kind):
    raise KINDS[kind](f"of {kind}.")


@shared_task(base=JobTask, max_retries=1)
def die_twice(kind):
    raise KINDS[kind](f"of {kind}.")


class DiesAfter(JobTask):
    abstract = True

    def on_success(self, retval, *_):
        raise KINDS[retval]("after the body")


@shared_task(base=DiesAfter, max_retries=0)
def die_after(kind):
    return kind


@shared_task(base=JobTask, bind=True, max_retries=0, soft_time_limit=0.9, time_limit=1)
def deaf(self):
    """Go on for a while after the hard limit, as code does that catches everything."""
    effect(self.request.id, f"deaf {self.request.retries}")
    until = time.monotonic() + 20
    while self.request.retries == 0 and time.monotonic() < until:
        try:
            effect(self.request.id, "deaf 0")
            time.sleep(0.01)
        except BaseException:  # noqa: S110
            pass
