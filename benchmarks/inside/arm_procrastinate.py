"""procrastinate: rows in the caller's transaction, its own worker."""

from body import tell
from django.db import connection
from procrastinate.contrib.django import app

TABLES = ["procrastinate_jobs"]


@app.task(name="bench.noop")
def noop(number):
    return None


@app.task(name="bench.start")
def start():
    tell("body")


def send(number):
    noop.defer(number=number)


def send_start():
    start.defer()


def send_many(count):
    noop.batch_defer(*({"number": number} for number in range(count)))


def left():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')")
        return cursor.fetchone()[0]
