"""django-celery-outbox: rows in the caller's transaction, a relay process, Celery's own worker."""

import os

from body import tell
from django.db import connection, transaction
from django_celery_outbox import OutboxCelery

app = OutboxCelery("bench", broker=os.environ["BENCH_BROKER_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 3},
    task_default_queue="default",
)

TABLES = ["celery_outbox"]


@app.task(name="bench.noop")
def noop(number):
    return None


@app.task(name="bench.start")
def start():
    tell("body")


def send(number):
    noop.delay(number)


def send_start():
    with transaction.atomic():  # it warns of calls outside
        start.delay()


def send_many(count):
    for number in range(count):
        noop.delay(number)


def left():
    with app.pool.acquire(block=True) as pooled:
        broker = pooled.default_channel.client
        waiting = broker.llen("default") + broker.hlen("unacked")
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM celery_outbox")
        return waiting + cursor.fetchone()[0]
