"""What Celery promises a task, kept by durable ones, in a real worker: one worker for all of it."""

import os
import subprocess
import sys
import uuid
from datetime import timedelta, timezone

import pytest
from celery import chain, current_app, signature
from django.db import connection
from django.utils.timezone import now

from durable_jobs import Job, JobDead
from durable_jobs.publisher import publisher
from durable_jobs.reconcile import fire_timers
from tests import celery_tasks as tasks
from tests.conftest import WORK, Worker, effects, wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture(scope="module", autouse=True)
def work(django_db_setup, tmp_path_factory):
    """One worker for all tests of this module; it is idle between them."""
    log = tmp_path_factory.mktemp("celery") / "celery.log"
    worker = Worker(log, *WORK.split(), "-I", "tests.celery_tasks")
    yield worker.wait_until_ready()
    worker.kill()


def ended(*results):
    """Wait for the end of jobs and return their rows."""
    ids = [getattr(result, "id", result) for result in results]
    wait_until(lambda: Job.objects.filter(pk__in=ids, due_at=None).count() == len(ids))
    return [Job.objects.get(pk=each) for each in ids]


def of(job):
    """Return the effects of one job, in order."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT note FROM durable_jobs_test_effect WHERE job = %s ORDER BY id", [str(job.id)]
        )
        return [note for (note,) in cursor.fetchall()]


def test_retry_reject_ignore_and_limits_mean_what_they_mean_in_celery():
    quiet = tasks.retry_quietly.delay()
    other = tasks.retry_with_other_arguments.delay("first")
    once, endless = tasks.only_once.delay(), tasks.without_end.delay()
    requeued, refused = tasks.reject.delay(True), tasks.reject.delay(False)
    ignored, slow = tasks.ignore.delay(), tasks.too_slow.delay()
    kinds = {kind: tasks.flaky.delay(kind) for kind in ("os", "blocking", "key")}
    rows = ended(quiet, other, once, endless, requeued, refused, ignored, slow)
    states = [(row.state, row.attempts) for row in rows]
    assert states == [
        (State.SUCCEEDED, 3),
        (State.SUCCEEDED, 2),
        (State.DEAD, 1),
        (State.SUCCEEDED, 10),
        (State.SUCCEEDED, 1),
        (State.DEAD, 1),
        (State.SUCCEEDED, 1),
        (State.DEAD, 2),
    ]
    assert of(quiet) == [
        "quiet 0", "quiet after 0", "quiet 1", "quiet after 1", "quiet 2", "quiet after 2",
    ]  # fmt: skip
    assert of(other) == ["argument first", "argument second"]
    assert of(requeued) == ["reject True"] * 3
    assert "ValueError: no more" in rows[2].error
    assert "SoftTimeLimitExceeded" in rows[7].error
    os_error, blocking, key = ended(*kinds.values())
    assert (os_error.state, os_error.attempts) == (State.DEAD, 3)
    assert (blocking.state, blocking.attempts) == (State.DEAD, 1)
    # An exception that nobody named is tried again as well: durable is the default.
    assert (key.state, key.attempts) == (State.DEAD, 3)


def test_a_task_sees_headers_priority_queue_and_limits_of_its_call_at_every_attempt():
    options = {"headers": {"mine": "x"}, "priority": 7, "time_limit": 40, "soft_time_limit": 30}
    for task in (tasks.ask, tasks.ask_again):
        result = task.apply_async(**options)
        seen = result.get(timeout=20)
        assert seen["id"] == result.id
        assert (seen["mine"], seen["priority"], seen["queue"]) == ("x", 7, "default")
        assert seen["timelimit"] == [40, 30]
    assert seen["retries"] == 1


def test_signatures_classes_shadows_and_times_of_other_zones_are_calls_like_any_other():
    moment = now().astimezone(timezone(timedelta(hours=-7))) + timedelta(seconds=0.5)
    results = [
        tasks.ask.s(1).delay(2),
        tasks.ask.si(1).apply_async((2,), kwargs={}),
        tasks.ask.signature((1,), {"a": 2}).apply_async(),
        signature("tests.celery_tasks.ask", args=(1,)).delay(),
        tasks.ask.apply_async((1,), shadow="another name"),
        tasks.ask.apply_async((1,), eta=moment),
        tasks.ask.apply_async((1,), eta=moment.isoformat()),
        current_app.tasks["tests.greet_class"].delay("you", punctuation="?"),
    ]
    wait_until(lambda: fire_timers() is not None and results[6].ready() and results[5].ready())
    values = [result.get(timeout=20) for result in results]
    assert [value["args"] for value in values[:-1]] == [[2, 1], [1], [1], [1], [1], [1], [1]]
    assert values[2]["kwargs"] == {"a": 2}
    assert values[-1] == "hello you? 0"
    delayed = Job.objects.get(pk=results[5].id)
    assert delayed.started_at >= moment
    with pytest.raises(TypeError):
        current_app.tasks["tests.greet_class"].delay()


SENDER = """
import sys
from celery import Celery
app = Celery(broker=sys.argv[1])
app.conf.task_default_queue = "default"
name = "tests.celery_tasks.ask"
app.send_task(name, (1,), task_id=sys.argv[2], headers={"mine": "h"}, ignore_result=True)
limits = {"time_limit": 40, "priority": 7, "headers": {"mine": "h"}}
app.send_task(name + "_again", (), ignore_result=True, **limits)
app.send_task(name, (2,), task_id="no-uuid", ignore_result=True)
app.send_task(name, (3,), task_id="no-uuid-later", countdown=0.5, ignore_result=True)
"""


def test_messages_sent_by_name_from_elsewhere_become_jobs_when_a_worker_gets_them():
    given = str(uuid.uuid4())
    command = [sys.executable, "-c", SENDER, current_app.conf.broker_url, given]
    subprocess.run(command, check=True, timeout=60, env=os.environ)
    wait_until(lambda: Job.objects.filter(state=State.SUCCEEDED).count() == 4)
    row = Job.objects.get(pk=given)
    assert (row.args, row.queue, row.attempts, row.result["mine"]) == ([1], "default", 1, "h")
    again = Job.objects.get(task=tasks.ask_again.name)
    assert (again.attempts, again.result["mine"], again.result["priority"]) == (2, "h", 7)
    assert again.result["timelimit"][0] == 40
    assert sorted(job.args[0] for job in Job.objects.exclude(pk=again.pk)) == [1, 2, 3]


def test_cancel_and_revoke_stop_what_waits_and_fence_what_runs(work):
    runs = [tasks.slowly.delay("runs", 1.5), tasks.slowly_atomic.delay("atomic", 1.5)]
    wait_until(
        lambda: len(effects("start")) == 1 and Job.objects.filter(state="running").count() == 2
    )
    waits = tasks.slowly.delay("waits", 0)
    delayed = tasks.slowly.apply_async(("delayed", 0), countdown=0.5)
    Job.objects.filter(pk=runs[0].id).cancel()
    for result in (runs[1], waits, delayed):
        result.revoke()
    assert {result.state for result in (*runs, waits, delayed)} == {"REVOKED"}
    after = tasks.slowly.delay("after", 0)
    ended(after)
    wait_until(lambda: not Job.objects.exclude(state=State.CANCELLED).exclude(pk=after.id).exists())
    assert effects("end") == ["end after"]
    assert effects("start") == ["start runs", "start after"]
    assert Job.objects.filter(state=State.CANCELLED).count() == 4
    log = work.log.read_text
    wait_until(lambda: all(f"{run.id}] attempt 1 had lost its lease" in log() for run in runs[1:]))


def test_a_job_that_expires_while_it_is_queued_never_runs(monkeypatch):
    with monkeypatch.context() as lost:
        lost.setattr(publisher, "send", list)
        late = tasks.record.apply_async(("late",), expires=0.3)
        in_time = tasks.record.apply_async(("in time",), expires=now() + timedelta(seconds=60))
    wait_until(lambda: now() > late.job.expires_at)
    Job.objects.update(due_at=now())
    fire_timers()
    rows = ended(late, in_time)
    assert [row.state for row in rows] == [State.CANCELLED, State.SUCCEEDED]
    assert effects() == ["record ['in time']"]


def test_results_of_dead_jobs_are_raised_with_the_error_of_their_last_attempt():
    result = tasks.only_once.delay()
    with pytest.raises(JobDead, match="ValueError: no more"):
        result.get(timeout=20)
    assert (result.state, result.failed(), result.ready()) == ("FAILURE", True, True)
    assert "only_once" in result.traceback


def test_a_durable_task_ends_a_chain_follows_a_plain_task_and_is_given_its_result(work):
    chained = chain(
        tasks.plain_add.s(1, 2), tasks.plain_add.s(3), tasks.record.s("chain")
    ).apply_async()
    tasks.plain_add.apply_async((3, 4), link=tasks.record.s("link"))
    chain(tasks.record.si("alone")).apply_async()
    wait_until(lambda: len(effects("record")) == 3)
    assert sorted(effects()) == ["record ['alone']", "record [6, 'chain']", "record [7, 'link']"]
    assert Job.objects.with_id(chained.id).get().args == [6, "chain"]
    # By name nothing can be known at the call: the worker that comes to it says so.
    unknown = current_app.signature(tasks.record.name, args=(1,))
    chain(tasks.plain_add.s(1, 2), unknown, tasks.plain_add.si(1, 1)).apply_async()
    wait_until(lambda: "does not take chain" in work.log.read_text())
