"""Tasks that use what Celery offers a task; for test_celery, test_eager, test_canvas."""

import time

from celery import Task, current_app, shared_task
from celery.exceptions import Ignore, Reject

from durable_jobs import JobTask
from tests.tasks import effect


def seen(request):
    """Return what a task sees of its call."""
    info = request.delivery_info or {}
    found = {name: getattr(request, name, None) for name in ("id", "retries", "mine", "timelimit")}
    return {**found, "priority": info.get("priority"), "queue": info.get("routing_key")}


@shared_task(base=JobTask, bind=True, ignore_result=False)
def ask(self, *args, **kwargs):
    return {"args": args, "kwargs": kwargs, **seen(self.request)}


@shared_task(base=JobTask, bind=True, ignore_result=False, max_retries=3)
def ask_again(self):
    if not self.request.retries:
        raise self.retry(countdown=0.1)
    return seen(self.request)


@shared_task(base=JobTask, bind=True, max_retries=2)
def retry_quietly(self):
    effect(self.request.id, f"quiet {self.request.retries}")
    if self.request.retries < 2:
        self.retry(countdown=0.1, throw=False)
    effect(self.request.id, f"quiet after {self.request.retries}")


@shared_task(base=JobTask, bind=True, max_retries=5)
def retry_with_other_arguments(self, text):
    effect(self.request.id, f"argument {text}")
    if text == "first":
        raise self.retry(args=["second"], countdown=0.1)


@shared_task(base=JobTask, bind=True, max_retries=0)
def only_once(self):
    effect(self.request.id, "only once")
    raise self.retry(exc=ValueError("no more"))


@shared_task(base=JobTask, bind=True, max_retries=None)
def without_end(self):
    effect(self.request.id, "without end")
    if self.request.retries < 9:
        raise self.retry(countdown=0.05)


@shared_task(base=JobTask, bind=True)
def reject(self, requeue):
    effect(self.request.id, f"reject {requeue}")
    if self.job.token < 3:
        raise Reject("not here", requeue=requeue)


@shared_task(base=JobTask, bind=True)
def ignore(self):
    effect(self.request.id, "ignore")
    raise Ignore()


@shared_task(base=JobTask, bind=True, soft_time_limit=0.3, time_limit=10, max_attempts=2)
def too_slow(self):
    effect(self.request.id, "too slow")
    time.sleep(5)


@shared_task(base=JobTask, bind=True, autoretry_for=(OSError,),
             dont_autoretry_for=(BlockingIOError,),
             retry_backoff=1, retry_backoff_max=1, retry_jitter=True, max_retries=2)  # fmt: skip
def flaky(self, kind):
    effect(self.request.id, f"flaky {kind} {self.request.retries}")
    raise {"os": OSError, "blocking": BlockingIOError, "key": KeyError}[kind]("x")


@shared_task(base=JobTask, bind=True)
def slowly(self, note, seconds):
    effect(self.request.id, f"start {note}")
    time.sleep(seconds)
    self.job.checkpoint(1, 2)
    effect(self.request.id, f"end {note}")


@shared_task(base=JobTask, bind=True, atomic=True)
def slowly_atomic(self, note, seconds):
    effect(self.request.id, f"start {note}")
    time.sleep(seconds)


class Greet(JobTask):
    """A task as a class: no decorator, no function, no signature for Celery to check."""

    name = "tests.greet_class"
    ignore_result = False
    max_attempts = 3

    def run(self, name, punctuation="!"):
        return f"hello {name}{punctuation} {self.request.retries}"


current_app.register_task(Greet())


@shared_task(base=Task, ignore_result=True)
def plain_add(x, y):
    return x + y


@shared_task(base=JobTask, bind=True)
def record(self, *values):
    effect(self.request.id, f"record {list(values)}")
