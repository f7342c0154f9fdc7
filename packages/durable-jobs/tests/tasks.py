"""Tasks for the tests; each effect is a row that tests can count."""

import contextlib
import ctypes
import os
import signal
import time
from datetime import timedelta

from celery import Task, shared_task
from celery.exceptions import SoftTimeLimitExceeded
from django.contrib.auth.models import Group
from django.db import connection

from durable_jobs import Job, JobTask, Permanent, reconciler

TABLE = "durable_jobs_test_effect"
CREATE_TABLE = (
    f"CREATE TABLE IF NOT EXISTS {TABLE} (id serial PRIMARY KEY, job text, note text, pid int,"
    " at timestamptz DEFAULT clock_timestamp())"
)


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


@shared_task(base=JobTask, bind=True, soft_time_limit=0.9, time_limit=1, max_attempts=2)
def hang(self):
    effect(self.request.id, "hang")
    while True:  # deaf to the soft limit: the hard one has to kill
        with contextlib.suppress(SoftTimeLimitExceeded):
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


@shared_task(base=JobTask, bind=True)
def hold_gil(self, seconds):
    """Keep every other thread of the process from running, once: the heartbeat too."""
    effect(self.request.id, "hold")
    if self.request.retries == 0:
        ctypes.PyDLL(None).sleep(seconds)
    effect(self.request.id, "held")


@shared_task(base=JobTask, bind=True, atomic=True)
def hold_gil_atomic(self, seconds):
    effect(self.request.id, f"atomic {self.request.retries}")
    if self.request.retries == 0:
        ctypes.PyDLL(None).sleep(seconds)


@shared_task(base=JobTask, bind=True)
def write_or(self, note, fault=""):
    effect(self.request.id, f"start {note}")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise ValueError(note)
    effect(self.request.id, f"end {note}")


@shared_task(base=JobTask)
def nap(seconds):
    time.sleep(seconds)


@shared_task(base=JobTask, bind=True, key="nightly", rerun=False)
def nightly(self):
    effect(self.request.id, "start nightly")
    time.sleep(1.2)
    effect(self.request.id, "end nightly")


@shared_task(base=Task, bind=True)
def plain_work(self, note, seconds=0):
    effect(self.request.id, f"plain start {note}")
    time.sleep(seconds)
    effect(self.request.id, f"plain end {note}")


@shared_task(base=JobTask, ignore_result=False, max_attempts=1)
def square(number):
    return number**2


@shared_task(base=JobTask, bind=True, ignore_result=False)
def total(self, group):
    jobs = Job.objects.for_owner(Group.objects.get(pk=group))
    self.job.wait_for(jobs, pause=0.3)
    squares = jobs.filter(task=square.name, state=Job.State.SUCCEEDED)
    return sum(squares.values_list("result", flat=True))


@shared_task(base=JobTask, bind=True, atomic=True)
def gives_up(self, group, cancel):
    effect(self.request.id, "gave up")
    jobs = Job.objects.for_owner(Group.objects.get(pk=group))
    jobs.cancel("given up") if cancel else jobs.delete()


@shared_task(base=JobTask, bind=True)
def work_until_told(self, error=""):
    effect(self.request.id, "start busy")
    told = 0
    while not told:
        time.sleep(0.05)
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT count(*) FROM {TABLE} WHERE note = 'go'")  # noqa: S608
            (told,) = cursor.fetchone()
    effect(self.request.id, "end busy")
    if error:
        raise ValueError(error)
