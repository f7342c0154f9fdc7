"""potatoq on PostgreSQL: rows in the caller's transaction, its own worker."""

from body import tell
from django.db import connection
from potatoq import group, shared_task

TABLES = ["potatoq_jobs"]


@shared_task(ignore_result=True)
def noop(number):
    return None


@shared_task(ignore_result=True)
def start():
    tell("body")


def prepare():
    noop.delay(0)  # it makes its tables on first use


def send(number):
    noop.delay(number)


def send_start():
    start.delay()


def send_many(count):
    group(noop.s(number) for number in range(count)).apply_async()


def left():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM potatoq_jobs")
        return cursor.fetchone()[0]
