"""What one hint sets in motion: its jobs, and in a backlog those enqueued right after it."""

import time
from uuid import uuid4

import pytest
from celery import current_app
from celery.app.trace import build_tracer
from celery.exceptions import Reject
from django.db import OperationalError, connection
from django.db.models.functions import Now
from kombu.utils.json import dumps

from durable_jobs import Job, database, postgresql, slices
from durable_jobs.publisher import Hint, hint_headers, publisher
from tests import tasks
from tests.conftest import wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture(autouse=True)
def sent(monkeypatch):
    hints = []
    monkeypatch.setattr(publisher, "send", hints.extend)
    return hints


@pytest.fixture(autouse=True)
def busy(monkeypatch, jobs_db):
    """A worker in the middle of a backlog of fast jobs."""
    monkeypatch.setattr(slices.recent, "ended", time.monotonic())
    slices.recent.along.clear()
    for task in (tasks.noop, tasks.fail, tasks.write):
        monkeypatch.setitem(slices.usual_seconds, task.name, 0.001)
    yield
    # The heartbeat thread keeps its connection until it has been idle for a beat.
    wait_until(lambda: others() == 0, 10)


def others():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return cursor.fetchone()[0]


def hint(result, retries=0, task=tasks.noop, **headers):
    deliver([result.id], task, retries=retries, **headers)


def deliver(ids, task, **headers):
    """Deliver one hint, as a worker gets it."""
    task = current_app.tasks[task.name]
    tracer = build_tracer(task.name, task, eager=True, app=current_app)
    request = {
        "id": ids[0],
        "is_eager": True,
        "timelimit": [300, 270],
        **headers,
        "delivery_info": {"routing_key": "default"},
    }
    slices.recent.ended = time.monotonic()
    slices.Slice(task, tracer, request, ids).work()


def states():
    return list(Job.objects.order_by("pk").values_list("state", flat=True))


def test_a_hint_in_a_backlog_brings_the_jobs_enqueued_after_it_along():
    jobs = [tasks.noop.delay(number) for number in range(5)]
    hint(jobs[1])
    assert states() == [State.QUEUED, *4 * [State.SUCCEEDED]]


def test_jobs_of_other_tasks_and_queues_are_left_to_their_own_hints():
    first = tasks.noop.delay()
    tasks.write.delay("other task")
    tasks.noop.apply_async(queue="low")
    hint(first)
    assert states() == [State.SUCCEEDED, State.QUEUED, State.QUEUED]


def test_jobs_with_other_time_limits_are_left_to_their_own_hints():
    first = tasks.noop.apply_async(time_limit=9, soft_time_limit=8)
    tasks.noop.apply_async(time_limit=20, soft_time_limit=10)
    tasks.noop.apply_async(time_limit=9, soft_time_limit=8)
    hint(first, timelimit=[9, 8])
    assert states() == [State.SUCCEEDED, State.QUEUED, State.SUCCEEDED]


def test_jobs_of_one_message_do_not_share_its_time_limit(sent):
    jobs = tasks.write.enqueue_many([["x", 0.02]] * 50, time_limit=1, soft_time_limit=0.8)
    # Together a second: what a quarter of the limit has no room for goes to others.
    deliver([str(job) for job in jobs], tasks.write, timelimit=[1, 0.8])
    done = Job.objects.filter(state=State.SUCCEEDED).count()
    assert 2 <= done <= 20
    assert Job.objects.filter(attempts=0).count() == 50 - done
    assert {hint.id for hint in sent} >= set(
        Job.objects.filter(attempts=0).values_list("pk", flat=True)
    )


def test_arguments_that_look_like_kombus_own_types_come_back_as_they_were():
    odd = {"__type__": "no such type", "__value__": 1}
    job = tasks.noop.delay(odd)
    assert (
        "no such type" in hint_headers([Hint(job.id, "t", "q", {}, dumps([odd]), "{}")])["argsrepr"]
    )
    hint(job)
    assert states() == [State.SUCCEEDED]


def test_a_hint_that_finds_no_database_ends_quietly_and_a_plain_message_goes_back(monkeypatch):
    def down(*_args, **_params):
        raise OperationalError("down")

    job = tasks.noop.delay()
    task = current_app.tasks[tasks.noop.name]
    monkeypatch.setattr(database, "run", down)
    request = {"durable_jobs": [job.id], "delivery_info": {}}
    assert slices.trace(task, None, job.id, (), {}, request)[2:] == (0.0, slices.NOTHING)
    failed, reason, *_ = slices.trace(task, None, str(uuid4()), (), {}, {"delivery_info": {}})
    assert failed
    raised = reason.exception.exc
    assert (type(raised), raised.requeue) == (Reject, True)
    monkeypatch.undo()
    assert states() == [State.QUEUED]


def test_an_idle_worker_takes_only_the_job_of_the_hint(monkeypatch):
    first, _second = tasks.noop.delay(), tasks.noop.delay()
    monkeypatch.setattr(slices, "BUSY_SECONDS", 0)
    hint(first)
    assert states() == [State.SUCCEEDED, State.QUEUED]


@pytest.mark.unsound
def test_a_job_that_failed_before_takes_none_along_and_is_not_taken_along():
    first, failed, _third = (tasks.noop.delay() for _ in range(3))
    Job.objects.filter(pk=failed.id).update(attempts=1)
    hint(first)
    assert states() == [State.SUCCEEDED, State.QUEUED, State.SUCCEEDED]
    fourth = tasks.noop.delay()
    hint(failed, retries=1)
    assert Job.objects.get(pk=failed.id).state == State.SUCCEEDED
    assert Job.objects.get(pk=fourth.id).state == State.QUEUED


def test_the_hint_of_a_job_taken_along_costs_no_query(django_assert_num_queries):
    first, second = tasks.noop.delay(), tasks.noop.delay()
    hint(first)
    with django_assert_num_queries(0):
        hint(second)


def test_only_one_hint_of_a_job_taken_along_is_dropped():
    jobs = [tasks.fail.delay() for _ in range(2)]
    hint(jobs[0], task=tasks.fail)
    assert states() == 2 * [State.SCHEDULED]
    Job.objects.update(state=State.QUEUED, due_at=Now(), attempts=0)
    hint(jobs[1], task=tasks.fail)
    assert states() == 2 * [State.QUEUED]
    hint(jobs[1], task=tasks.fail)
    assert states() == [State.QUEUED, State.SCHEDULED]


def test_a_claim_looks_at_no_more_rows_than_it_was_told_to(monkeypatch):
    tasks.noop.enqueue_many([[]] * 3000)
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    first = Job.objects.order_by("pk")[0].pk
    # All the rows after the first one are of another task: there is nothing to find among them.
    Job.objects.exclude(pk=first).update(task="other")
    explained = f"EXPLAIN (ANALYZE, FORMAT JSON) {postgresql.CLAIM_ALONG}"
    monkeypatch.setattr(postgresql, "CLAIM_ALONG", explained)
    plan = database.run(
        "CLAIM_ALONG",
        ids=[first],
        task=tasks.noop.name,
        alone=False,
        worker="w",
        after=first,
        along=50,
        queue="default",
        limits=None,
    )[0][0]
    read = [node for node in nodes(plan[0]["Plan"]) if node["Node Type"].startswith("Index")]
    assert read
    assert not [node for node in nodes(plan[0]["Plan"]) if node["Node Type"] == "Seq Scan"]
    assert max(node["Actual Rows"] for node in read) <= 50


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def test_a_claim_survives_that_the_database_has_closed_the_connection():
    job = tasks.noop.delay()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()
    other = connection.copy()
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_until(lambda: not running(cursor, pid))
    other.close()
    hint(job)
    assert states() == [State.SUCCEEDED]
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone() != (pid,)


def running(cursor, pid):
    cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid])
    return cursor.fetchone()[0]
