"""Celery's `revoke` is a verb of rows: it outlives the worker that was told of it."""

import pytest
from celery import current_app
from django.db import connection, transaction

from durable_jobs import Job
from durable_jobs.reconcile import fire_timers
from tests import tasks
from tests.conftest import effects, open_transaction, pids, wait_until

State = Job.State
ONE = ("-c", "1", "-Q", "default")
control = current_app.control


def state_of(result):
    return Job.objects.values_list("state", flat=True).get(pk=result.id)


def is_in(state, *results):
    return lambda: {state_of(each) for each in results} == {state}


@pytest.fixture
def busy(start_worker):
    """A worker of one child, which works until `go()`: what comes meanwhile waits."""
    worker = start_worker("work", *ONE)
    tasks.work_until_told.delay()
    wait_until(lambda: effects("start busy"))
    return worker


def go():
    tasks.effect("", "go")


def test_a_revoked_job_does_not_run_after_a_restart_and_runs_when_it_is_retried(busy, start_worker):
    waits, delayed = tasks.write.delay("w"), tasks.write.apply_async(["d"], countdown=600)
    control.revoke([waits.id, delayed.id])
    wait_until(is_in(State.CANCELLED, waits, delayed))
    assert waits.state == "REVOKED"
    go()
    wait_until(lambda: effects("end busy"))
    Job.objects.filter(pk=waits.id).retry()
    fire_timers()
    wait_until(is_in(State.SUCCEEDED, waits))  # by the worker that has been told to forget it
    busy.kill()
    start_worker("next", *ONE)
    after = tasks.write.delay("after")
    wait_until(is_in(State.SUCCEEDED, after))
    assert effects("end") == ["end busy", "end w", "end after"]


def test_of_the_jobs_of_one_hint_only_the_revoked_one_is_dropped(busy):
    ids = tasks.write.enqueue_many([(number,) for number in range(6)])
    control.revoke(str(ids[0]))
    wait_until(lambda: Job.objects.get(pk=ids[0]).state == State.CANCELLED)
    go()
    rest = Job.objects.filter(pk__in=ids[1:])
    wait_until(lambda: rest.filter(state=State.SUCCEEDED).count() == 5)
    assert effects("start 0") == []


def test_a_running_job_ends_with_terminate_and_is_its_own_last_attempt_without(start_worker):
    worker = start_worker("work", "-c", "2", "-Q", "default")
    lasts, killed = tasks.work_until_told.delay("too late"), tasks.write.delay("killed", 60)
    wait_until(lambda: len(effects("start")) == 2)
    [child] = pids("start killed")
    control.revoke(lasts.id)
    control.revoke(killed.id, terminate=True)
    wait_until(is_in(State.CANCELLED, killed))
    wait_until(lambda: child not in [each.pid for each in worker.children()])
    wait_until(lambda: f"task_revoked {killed.id}" in worker.log.read_text())
    go()
    wait_until(lambda: effects("end busy"))
    wait_until(lambda: (fire_timers(), state_of(lasts) == State.CANCELLED)[1])
    assert Job.objects.get(pk=lasts.id).attempts == 1
    assert "ValueError: too late" in Job.objects.get(pk=lasts.id).error
    after = [tasks.write.delay("after") for _ in range(3)]
    wait_until(is_in(State.SUCCEEDED, *after))
    assert effects("end") == ["end busy", *["end after"] * 3]


def test_terminate_of_a_job_leaves_those_alone_that_its_child_holds_too(start_worker):
    worker = start_worker("work", *ONE)
    [child] = worker.children()
    wait_until(is_in(State.SUCCEEDED, tasks.nap.delay(0)))  # short ones are taken as a slice
    ids = tasks.nap.enqueue_many([(0,), (1,), (0,), (0,)])
    one = Job.objects.filter(pk=ids[1])
    wait_until(lambda: one.filter(state=State.RUNNING).exists())
    control.revoke(str(ids[1]), terminate=True)
    rest = Job.objects.filter(pk__in=ids).exclude(pk=ids[1])
    wait_until(lambda: (fire_timers(), rest.filter(state=State.SUCCEEDED).count() == 3)[1])
    assert one.get().state == State.CANCELLED
    assert not rest.exclude(error="").exists()
    assert [row.attempts for row in rest] == [1, 1, 1]
    assert child.pid not in [each.pid for each in worker.children()]  # it was at nothing else
    assert "task_revoked" not in worker.log.read_text()  # the hint bore the id of another one


def test_result_revoke_ends_the_process_too_and_needs_no_worker_to_cancel(start_worker):
    waits, remembered = tasks.write.delay("waits"), tasks.write.delay("remembered")
    control.revoke(remembered.id)  # nobody is told: no worker is up
    waits.revoke(terminate=True)
    assert (state_of(waits), state_of(remembered)) == (State.CANCELLED, State.QUEUED)
    worker = start_worker("work", *ONE)
    wait_until(is_in(State.SUCCEEDED, remembered))
    runs = tasks.write.delay("runs", 60)
    wait_until(lambda: effects("start runs"))
    [child] = worker.children()
    with transaction.atomic():
        runs.revoke(terminate=True)
    wait_until(lambda: child.pid not in [each.pid for each in worker.children()])
    assert state_of(runs) == State.CANCELLED


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has one lock for all")
def test_a_job_whose_row_is_locked_or_not_committed_yet_is_cancelled_later(busy):
    waits = tasks.write.delay("locked")
    with open_transaction(lambda: Job.objects.select_for_update().get(pk=waits.id)):
        control.revoke(waits.id)
        wait_until(lambda: "a revoke could not be written yet" in busy.log.read_text())
    wait_until(is_in(State.CANCELLED, waits))
    with transaction.atomic():
        late = tasks.write.delay("late")
        control.revoke(late.id)
        wait_until(lambda: f"revoked: {late.id}" in busy.log.read_text())
    after = tasks.write.delay("after")
    go()
    wait_until(is_in(State.SUCCEEDED, after))
    wait_until(is_in(State.CANCELLED, late))
    assert effects("start") == ["start busy", "start after"]


def test_jobs_are_revoked_by_their_stamps(busy):
    mine, other = (
        tasks.write.apply_async([name], stamped_headers=["order"], order=name) for name in "ab"
    )
    runs = Job.objects.get(state=State.RUNNING)
    control.revoke_by_stamped_headers({"order": ["a", "c"]}, terminate=True)
    wait_until(is_in(State.CANCELLED, mine))
    go()
    wait_until(is_in(State.SUCCEEDED, other))
    runs.refresh_from_db()
    assert (runs.state, effects("start")) == (State.SUCCEEDED, ["start busy", "start b"])
    assert other.job.options["headers"]["stamps"] == {"order": "b"}
