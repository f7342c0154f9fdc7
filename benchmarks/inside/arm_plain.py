"""Plain Celery as its users are told to use it: acks_late, prefetch 1, sent after the commit.

In the same project with the same settings as ours: what differs is the base class of the task.
"""

import django

django.setup()

import stages  # noqa: E402
from body import tell  # noqa: E402
from celery import shared_task  # noqa: E402
from celery.contrib.django.task import DjangoTask  # noqa: E402
from config.celery import app  # noqa: E402

TABLES = []
stages.switch_on(durable=False)


@shared_task(base=DjangoTask)
def noop(number):
    return None


@shared_task(base=DjangoTask)
def start():
    tell("body")


def send(number):
    noop.delay_on_commit(number)


def send_start():
    start.delay_on_commit()


def send_many(count):
    for number in range(count):
        noop.delay(number)


def left():
    with app.pool.acquire(block=True) as connection:
        broker = connection.default_channel.client
        return broker.llen("default") + broker.hlen("unacked")
