"""Tasks for the tests; each effect is a row that tests can count."""

import os
import signal
import time
from datetime import timedelta

from celery import Task, shared_task
from django.contrib.auth.models import Group
from django.db import connection

from durable_jobs import JobTask, Permanent, reconciler

TABLE = "durable_jobs_test_effect"


def effect(job: object, note: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TABLE} (job, note, pid) VALUES (%s, %s, %s)",  # noqa: S608
            [str(job), note, os.getpid()],
        )


@shared_task(base=JobTask, bind=True)
def write(self, note, seconds=0):
    effect(self.request.id, f"start {note}")
    time.sleep(seconds)
    effect(self.request.id, f"end {note}")


@shared_task(base=JobTask, bind=True, atomic=True)
def write_atomic(self, note, seconds=0):
    effect(self.request.id, f"atomic {note}")
    time.sleep(seconds)


@shared_task(base=JobTask)
def noop(*args):
    return None


@shared_task(base=JobTask, ignore_result=False)
def add(x, y):
    return x + y


@shared_task(base=JobTask, bind=True)
def fail(self, note="", error="boom"):
    effect(self.request.id, f"try {self.request.retries} {note}")
    raise ValueError(error)


@shared_task(base=JobTask, bind=True)
def fail_for_good(self):
    effect(self.request.id, "try")
    raise Permanent("no such account")


@shared_task(base=JobTask, bind=True, throws=(KeyError,))
def throw(self):
    raise KeyError("expected")


@shared_task(base=JobTask, bind=True, max_retries=2)
def retry_by_hand(self, note):
    effect(self.request.id, f"try {self.request.retries}")
    raise self.retry(exc=ValueError("again"), countdown=0.1)


@shared_task(base=JobTask, bind=True, autoretry_for=(OSError,), retry_backoff=False,
             default_retry_delay=0.1, max_retries=1)  # fmt: skip
def autoretry(self):
    effect(self.request.id, f"try {self.request.retries}")
    raise OSError("gone")


@shared_task(base=JobTask, bind=True, max_attempts=3)
def poison(self):
    effect(self.request.id, "poison")
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=JobTask, bind=True, time_limit=1, max_attempts=2)
def hang(self):
    effect(self.request.id, "hang")
    time.sleep(600)


@shared_task(base=JobTask, bind=True)
def checkpoints(self, steps):
    for step in range(steps):
        self.job.checkpoint(step, steps, f"step {step}")
        effect(self.request.id, f"step {step}")
        time.sleep(0.1)


@reconciler(lambda: Group.objects.filter(name__startswith="raw"), resync=timedelta(hours=1))
@shared_task(base=JobTask)
def rename(pk):
    group = Group.objects.get(pk=pk)
    if "poison" in group.name:
        raise Permanent("cannot be renamed")
    Group.objects.filter(pk=pk).update(name=f"done {pk}")


@shared_task(base=Task)
def plain(*args):
    return None


@shared_task(base=Task, bind=True)
def plain_write(self, note):
    effect(self.request.id, f"start {note}")
