"""When hints are sent; that they may be lost is shown in test_recovery.py."""

import threading
import time
from collections import deque
from uuid import uuid4

import pytest
from django.db import transaction

import durable_jobs
from durable_jobs import Job
from durable_jobs.publisher import HORIZON_SECONDS, Hint, Publisher, groups, publisher
from tests import tasks
from tests.conftest import wait_until

State = Job.State


@pytest.fixture
def published(monkeypatch):
    """What a publisher of its own publishes, with the time of each."""
    mine = Publisher()
    out = []
    monkeypatch.setattr(
        mine, "publish", lambda hints: out.extend((hint, time.monotonic()) for hint in hints)
    )
    mine.out = out
    return mine


def a_hint(task="t", **fields):
    return Hint(uuid4(), task, "default", {}, "[]", "{}", **fields)


def test_delayed_hints_are_sent_in_the_order_of_their_time_and_never_early(published):
    start = time.monotonic()
    late, soon = a_hint(), a_hint()
    published.later([late], 0.4)
    published.later([soon], 0.1)
    wait_until(lambda: len(published.out) == 2, 5)
    (first, first_at), (second, second_at) = published.out
    assert (first, second) == (soon, late)
    assert first_at >= start + 0.1
    assert second_at >= start + 0.4


def test_a_delayed_hint_does_not_hold_up_those_that_are_due_now(published):
    published.later([a_hint()], 30)
    now = a_hint()
    published.send([now])
    wait_until(lambda: published.out, 5)
    assert [hint for hint, _ in published.out] == [now]
    assert published.flush(1)


def test_long_delays_are_left_to_the_loop(published):
    published.later([a_hint()], HORIZON_SECONDS + 1)
    assert published.timers == []
    assert published.thread is None


def test_hints_of_one_task_share_messages_and_failed_jobs_travel_alone():
    fresh = [a_hint() for _ in range(10)]
    failed = [a_hint(attempts=1) for _ in range(2)]
    other = [a_hint("other")]
    sizes = sorted(len(group) for group in groups([*fresh, *failed, *other]))
    assert sizes == [1, 1, 1, 5, 5]


def test_a_short_countdown_is_kept_to_the_moment_without_the_loop(start_worker):
    start_worker()
    tasks.noop.delay()  # what a first job costs in a new process is not measured
    wait_until(lambda: Job.objects.filter(state=State.SUCCEEDED).count() == 1)
    with transaction.atomic():
        job = tasks.noop.apply_async(countdown=1)
    wait_until(lambda: Job.objects.get(pk=job.id).state == State.SUCCEEDED, 10)
    row = Job.objects.get(pk=job.id)
    waited = (row.started_at - row.created_at).total_seconds()
    assert 1 <= waited < 2
    assert row.attempts == 1


def test_a_failed_attempt_is_tried_again_in_time_without_the_loop(start_worker):
    start_worker()
    job = tasks.autoretry.delay()  # a second attempt after 0.1 s, then it is dead
    wait_until(lambda: Job.objects.get(pk=job.id).state == State.DEAD, 10)
    assert Job.objects.get(pk=job.id).token == 2


def test_a_thread_that_cannot_start_is_tried_again_with_the_next_hint(published, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        published.send([a_hint()])
        assert (published.thread, published.out) == (None, [])
    published.send([a_hint()])
    wait_until(lambda: len(published.out) == 2, 5)


def test_a_full_queue_keeps_the_newest_when_the_broker_refuses_them(published, monkeypatch):
    published.hints = deque(maxlen=3)
    old, new = [a_hint(str(number)) for number in range(3)], a_hint("new")
    published.hints.append(new)
    monkeypatch.setattr("durable_jobs.publisher.PAUSES", (0,))
    published._failed(old, OSError("refused"))
    assert [hint.task for hint in published.hints] == ["1", "2", "new"]


@pytest.mark.django_db(transaction=True)
def test_a_connection_that_was_closed_costs_no_hint(broker):
    publisher.send([a_hint()])
    assert publisher.flush()
    publisher.producer.connection.close()
    publisher.send([a_hint(), a_hint("another")])
    wait_until(lambda: publisher.idle.is_set() and not publisher.failures, 5)
    if broker is not None:  # only Redis can be asked
        wait_until(lambda: broker.llen("default") == 3, 5)


def test_flush_returns_when_all_hints_are_sent(jobs_db, broker):
    durable_jobs.flush(5)
    ids = tasks.noop.enqueue_many([[number] for number in range(50)])
    assert durable_jobs.flush(10)
    if broker:  # Redis or Valkey
        assert broker.llen("default") >= 1
    assert len(ids) == 50
