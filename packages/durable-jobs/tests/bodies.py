"""Tasks that end in unusual ways, or are coroutines; for test_bodies."""

import asyncio
import threading
import time

import billiard.exceptions
from asgiref.sync import async_to_sync, sync_to_async
from celery import current_task, shared_task
from celery.exceptions import WorkerTerminate
from django.contrib.auth.models import Group
from django.db import connection

from durable_jobs import JobTask
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


@shared_task(base=JobTask, bind=True, max_retries=0, soft_time_limit=0.9, time_limit=1.4)
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


# ---- Coroutines


@shared_task(base=JobTask, bind=True, ignore_result=False)
async def told(self, x, *, y=0):
    """Return what a coroutine sees."""
    before = threading.get_ident()
    await asyncio.sleep(0)
    sides = await asyncio.gather(side(self), side(self))
    self.job.checkpoint(1, 2, "half")
    return {
        "sum": x + y,
        "request": self.request.id,
        "job": str(self.job.id),
        "current": current_task.request.id,
        "thread": before == threading.get_ident() == await sync_to_async(threading.get_ident)(),
        "backend": len({*sides, await sync_to_async(backend)()}),
    }


async def side(task):
    await asyncio.sleep(0)
    assert task.request.id
    return await sync_to_async(backend)()


def backend():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


@shared_task(base=JobTask, bind=True, atomic=True, max_retries=0)
async def group_and(self, name, ends=""):
    """Write through the ORM, in the task's transaction; nested sync and async code in between."""
    group = await Group.objects.acreate(name=name)

    def plain():
        assert connection.in_atomic_block
        Group.objects.filter(pk=group.pk).update(name=f"{name} twice")
        return async_to_sync(found)()

    async def found():
        return await Group.objects.aget(pk=group.pk)

    assert (await sync_to_async(plain)()).name == f"{name} twice"
    if ends:
        raise ValueError(ends)


@shared_task(base=JobTask, bind=True, max_retries=3)
async def retry(self, number=0):
    await effect_of(self, f"retry {number}")
    if number < 2:
        raise self.retry(kwargs={"number": number + 1}, countdown=0)


@shared_task(base=JobTask, bind=True, autoretry_for=(OSError,), retry_backoff=False,
             default_retry_delay=0, max_retries=1)  # fmt: skip
async def autoretry(self):
    await effect_of(self, f"autoretry {self.request.retries}")
    raise OSError("gone")


async def effect_of(task, note):
    await sync_to_async(effect)(task.request.id, note)


@shared_task(base=JobTask, bind=True, soft_time_limit=0.5, time_limit=20, max_retries=0)
async def overdue(self, how):
    try:
        if how == "waits":
            await asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
        elif how == "works":
            time.sleep(60)
        else:
            await sync_to_async(time.sleep)(60)
    finally:
        await effect_of(self, f"{how} cleaned up")


@shared_task(base=JobTask, max_retries=0)
async def die_awaiting(kind):
    await asyncio.sleep(0)
    raise KINDS[kind](f"of {kind}.")


@shared_task(base=JobTask, bind=True)
def looks_plain(self, kind):
    async def later():
        await effect_of(self, "later")

    def items():
        yield effect(self.request.id, "never")

    async def stream():
        yield 1

    return {"coroutine": later, "generator": items, "stream": stream}[kind]()
