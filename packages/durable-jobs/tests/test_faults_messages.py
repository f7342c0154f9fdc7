"""Plain messages, all there is of their jobs, while the database is away or will not have them."""

import math
import time

import pytest
from celery import current_app
from celery.signals import task_failure
from django.db import connection

from durable_jobs import slices
from durable_jobs.models import Job
from tests import tasks
from tests.conftest import effects, terminate_connections, wait_until
from tests.test_faults_database import own_server, restart  # noqa: F401 - a fixture

State = Job.State
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.faults,
    pytest.mark.skipif(connection.vendor != "postgresql", reason="needs a server to stop"),
]
# One worker of each pool, with a queue of its own.
POOLS = {
    "default": "-c 1 -Q default",
    "high": "-c 1 -P threads -Q high",
    "low": "-P solo -Q low",
}


def send(note, queue):
    """Send what a process without this task's code sends."""
    with current_app.connection_for_write() as connected:
        current_app.send_task(tasks.write.name, [note], queue=queue, connection=connected)


def ended(note, times):
    return lambda: len(effects(f"end {note}")) == times * len(POOLS)


def test_plain_messages_find_the_database_again_when_connections_were_cut(crew):
    workers = crew(**POOLS)
    for queue in POOLS:
        send("first", queue)
    wait_until(ended("first", 1))
    assert terminate_connections() >= len(POOLS)
    for queue in POOLS:
        for _ in range(3):
            send("plain", queue)
            tasks.write.apply_async(["job"], queue=queue)
    wait_until(ended("plain", 3))
    wait_until(ended("job", 3))
    assert not any("no row can be made" in worker.log.read_text() for worker in workers)


def test_plain_messages_wait_in_the_broker_while_the_database_is_away(own_server, crew):  # noqa: F811
    workers = crew(**POOLS)
    for queue in POOLS:
        send("first", queue)
    wait_until(ended("first", 1))
    own_server.send(9)
    wait_until(lambda: not own_server.running)
    connection.close()
    for queue in POOLS:
        for _ in range(3):
            send("plain", queue)
    wait_until(lambda: all("no row can be made" in worker.log.read_text() for worker in workers))
    time.sleep(1)  # an outage takes its time
    wait_until(lambda: restart(own_server))
    wait_until(ended("plain", 3), 60)
    for queue in POOLS:
        tasks.write.apply_async(["job"], queue=queue)
    wait_until(ended("job", 1))


def test_messages_that_can_never_be_rows_fail_and_hold_up_no_other(crew, broker):
    workers = crew(**POOLS)
    for queue in POOLS:
        send("a\x00b", queue)
        send(math.nan, queue)
        send("good", queue)
    wait_until(ended("good", 1))
    for worker in workers:
        assert worker.log.read_text().count("can never be a row and has failed") == 2
    assert Job.objects.count() == len(POOLS)
    assert [broker.llen(queue) for queue in POOLS] == [0, 0, 0]
    wait_until(lambda: broker.hlen("unacked") == 0)  # all have been acknowledged


def trace(argument):
    """Return what the worker hears of a plain message."""
    task = current_app.tasks[tasks.write.name]
    message = "9d0b5c1e-0000-4000-8000-000000000001"
    _, info, *_ = slices.trace(task, None, message, [argument], {}, {"delivery_info": {}})
    return info.exception


def test_a_message_that_can_never_be_a_row_is_a_failed_task_to_whoever_listens(jobs_db, caplog):
    seen = []

    def listen(sender, task_id, exception, **_):
        seen.append((sender.name, task_id, type(exception).__name__))

    task_failure.connect(listen)
    try:
        trace("a\x00b")
    finally:
        task_failure.disconnect(listen)
    assert seen == [(tasks.write.name, "9d0b5c1e-0000-4000-8000-000000000001", "ValueError")]
    assert f"of {tasks.write.name} can never be a row" in caplog.text


def test_a_message_goes_back_while_the_table_is_not_there(jobs_db):
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE durable_jobs_job RENAME TO away")
        try:
            assert trace("x").exc.requeue
        finally:
            cursor.execute("ALTER TABLE away RENAME TO durable_jobs_job")
