"""Each verb of the protocol, on PostgreSQL and on SQLite: the same calls lead to the same rows."""

from datetime import timedelta

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connections, transaction
from django.db.backends.sqlite3.base import DatabaseWrapper
from django.utils.timezone import now

from durable_jobs import Job, attempt, transitions
from durable_jobs.attempt import Attempt, State
from durable_jobs.enqueue import Call
from durable_jobs.ids import uuid7
from durable_jobs.publisher import publisher
from tests import tasks

pytestmark = pytest.mark.usefixtures("both")
LATE = timedelta(seconds=-1)


@pytest.fixture(params=["postgresql", "sqlite"])
def both(request, transactional_db, tmp_path):
    """Run the test on each: in a file of SQLite's, the jobs' table stands alone."""
    if request.param == "postgresql":
        yield
        return
    usual = connections["default"]
    place = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "jobs.sqlite3")}
    options = {"OPTIONS": {"transaction_mode": "IMMEDIATE"}}
    file = DatabaseWrapper({**usual.settings_dict, **place, **options}, alias="default")
    connections["default"] = file
    try:
        with file.schema_editor() as editor:
            editor.create_model(ContentType)
            editor.create_model(Job)
        yield
    finally:
        connections["default"] = usual
        file.close()


@pytest.fixture(autouse=True)
def sent(monkeypatch):
    """The hints that were sent at once."""
    hints = []
    monkeypatch.setattr(publisher, "send", hints.extend)
    monkeypatch.setattr(publisher, "later", lambda *_: None)
    return hints


def new(arguments="[1]", **how):
    how = {"max_attempts": 8, **how}
    return Call(tasks.noop.name, id=uuid7(), args=arguments, queue="default", **how).insert()


def row(job):
    return Job.objects.get(pk=job)


def take(*jobs, **how):
    return transitions.claim(tasks.noop, jobs, **how)


def one(job, **how):
    (mine,) = take(job, **{"alone": True, **how})
    return mine


def seconds(job):
    """Return how far away the job's timer is."""
    return (row(job).due_at - now()).total_seconds()


def move(job, **columns):
    Job.objects.filter(pk=job).update(**columns)


def stale(mine):
    return Attempt(mine.task, mine.id, mine.token - 1, mine.attempts)


def test_a_call_is_queued_and_one_with_a_delay_is_scheduled(sent):
    plain, delayed, timed = new(), new(delay=30), new(eta=now() + timedelta(seconds=90))
    assert [row(job).state for job in (plain, delayed, timed)] == [
        State.QUEUED,
        State.SCHEDULED,
        State.SCHEDULED,
    ]
    assert 25 < seconds(delayed) <= 31
    assert 85 < seconds(timed) <= 91
    assert [hint.id for hint in sent] == [plain]


def test_a_call_that_is_rolled_back_leaves_nothing(sent):
    with transaction.atomic():
        new()
        transaction.set_rollback(True)
    assert (Job.objects.count(), sent) == (0, [])


def test_many_calls_are_rows_in_their_order():
    ids = tasks.noop.enqueue_many([[number] for number in range(20)], countdown=30)
    assert [job.args for job in Job.objects.order_by("pk")] == [[n] for n in range(20)]
    assert list(Job.objects.order_by("pk").values_list("pk", flat=True)) == ids
    assert set(Job.objects.values_list("state", flat=True)) == {State.SCHEDULED}


def test_a_key_that_is_called_again_keeps_one_job_with_the_new_arguments():
    first = new("[1]", key="k", delay=60)
    assert new("[2]", key="k", delay=30) == first
    assert row(first).args == [2]
    assert seconds(first) <= 31
    assert new("[3]", key="k", rerun=False) == first
    assert row(first).args == [2]
    assert new("[4]", key="other") != first


def test_a_key_that_is_called_while_it_runs_runs_once_more(sent):
    job = new("[1]", key="k")
    mine = one(job)
    assert new("[2]", key="k") == job
    assert row(job).dirty
    assert transitions.finish([mine]) == {job}
    assert (row(job).state, row(job).attempts, row(job).args) == (State.QUEUED, 0, [2])
    assert sent[-1].id == job
    again = one(job)
    assert (again.args, again.token) == ([2], 2)
    assert transitions.finish([again]) == {job}
    assert row(job).state == State.SUCCEEDED


def test_a_call_without_rerun_takes_the_place_of_one_that_has_expired():
    job = new("[1]", key="k", expires=-1)
    assert new("[2]", key="k", rerun=False) == job
    assert (row(job).args, row(job).expires_at) == ([2], None)


def test_a_message_is_adopted_once():
    call = Call(tasks.noop.name, 8, uuid7(), queue="default")
    transitions.adopt(call.row())
    transitions.adopt(call.row())
    assert Job.objects.count() == 1


def test_a_claim_is_an_attempt_under_a_new_token_and_nobody_else_gets_the_job():
    job = new('["a"]')
    mine = one(job)
    assert (mine.id, mine.token, mine.attempts, mine.max_attempts) == (job, 1, 1, 8)
    assert (mine.args, mine.kwargs) == (["a"], {})
    assert take(job, alone=True) == []
    claimed = row(job)
    assert (claimed.state, claimed.worker) == (State.RUNNING, attempt.holder())
    assert 0 < seconds(job) <= 3  # the lease


def test_a_claim_leaves_what_is_not_due_has_expired_or_is_of_another_task():
    later, expired = new(delay=60), new(expires=-1)
    other = Call("other", 8, uuid7(), queue="default").insert()
    assert take(later, expired, other, alone=True) == []
    move(later, due_at=now() + LATE)
    assert one(later).id == later


@pytest.mark.unsound
def test_a_job_that_failed_before_is_claimed_alone():
    fresh, failed = new(), new()
    move(failed, attempts=1)
    assert [mine.id for mine in take(fresh, failed)] == [fresh]
    assert one(failed).attempts == 2


def test_a_renewal_moves_the_lease_and_writes_the_progress():
    jobs = [new(), new()]
    runs = take(*jobs)
    for number, mine in enumerate(runs):
        mine.progress, mine.message = 10 + number, f"step {number}"
        move(mine.id, due_at=now())
    assert transitions.renew([*runs, stale(runs[0])]) == set(jobs)
    assert [(row(job).progress, row(job).message) for job in jobs] == [
        (10, "step 0"),
        (11, "step 1"),
    ]
    assert all(2 < seconds(job) <= 3 for job in jobs)
    assert transitions.still_mine(runs) == set(jobs)
    assert transitions.still_mine([stale(runs[0])]) == set()


@pytest.mark.parametrize("wait", [False, True])
def test_an_end_is_written_under_the_token_only(wait):
    jobs = [new(), new()]
    runs = take(*jobs)
    assert transitions.finish([stale(mine) for mine in runs], wait=wait) == set()
    assert transitions.finish(runs, {"n": 1}, wait=wait) == set(jobs)
    assert {(row(job).state, row(job).progress) for job in jobs} == {(State.SUCCEEDED, 100)}
    assert row(jobs[0]).result == {"n": 1}
    assert row(jobs[0]).finished_at is not None
    assert transitions.finish(runs, wait=wait) == set()


def test_a_failure_is_tried_again_until_the_attempts_are_used_up():
    job = new(max_attempts=2)
    assert transitions.fail(one(job), "first", 30, final=False) == State.SCHEDULED
    assert 25 < seconds(job) <= 31
    assert (row(job).error, row(job).attempts) == ("first", 1)
    move(job, due_at=now() + LATE)
    mine = one(job)
    assert transitions.fail(stale(mine), "late", 30, final=True) is None
    assert transitions.fail(mine, "second", 30, final=False) == State.DEAD
    assert (row(job).error, row(job).due_at) == ("second", None)


def test_a_failure_is_final_or_comes_again_as_the_body_asked():
    final, asked = new(), new(max_attempts=1)
    assert transitions.fail(one(final), "e", 1, final=True) == State.DEAD
    mine = one(asked)
    wish = mine.asked
    wish.args, wish.kwargs, wish.queue, wish.limit = "[7]", '{"x": 8}', "low", 3
    when = now() + timedelta(seconds=100)
    assert transitions.fail(mine, "e", 1, final=False, eta=when) == State.SCHEDULED
    found = row(asked)
    assert (found.args, found.kwargs, found.queue) == ([7], {"x": 8}, "low")
    assert (found.max_attempts, 95 < seconds(asked) <= 101) == (3, True)


def test_a_failure_for_good_of_what_was_called_meanwhile_runs_the_new_call(sent):
    job = new("[1]", key="k", max_attempts=1)
    mine = one(job)
    new("[2]", key="k", max_attempts=1)
    mine.asked.args = "[3]"
    assert transitions.fail(mine, "e", 1, final=True) == State.QUEUED
    assert (row(job).args, row(job).attempts) == ([2], 0)
    assert sent[-1].id == job


@pytest.mark.unsound
def test_a_job_without_end_is_tried_for_ever():
    job = new(max_attempts=32_767)
    move(job, attempts=32_766)
    assert transitions.fail(one(job), "e", 1, final=False) == State.SCHEDULED


def test_a_release_uses_up_no_attempt():
    job = new()
    mine = one(job)
    assert not transitions.release([stale(mine)])
    assert transitions.release([mine], 30, "too early")
    found = row(job)
    assert (found.state, found.attempts, found.error) == (State.SCHEDULED, 0, "too early")
    assert 25 < seconds(job) <= 31


@pytest.mark.unsound
def test_a_dead_child_fails_what_it_held_at_once_first_and_slower_then():
    jobs = [new() for _ in range(3)]
    runs = take(*jobs)
    move(jobs[2], worker="host/other/1")
    found = transitions.lose(attempt.holder(), "it was killed")
    assert {hint.id for hint in found} == set(jobs[:2])
    assert seconds(jobs[0]) <= 0
    assert (row(jobs[0]).state, row(jobs[0]).error) == (State.SCHEDULED, "it was killed")
    assert row(jobs[2]).state == State.RUNNING
    mine = one(jobs[0])
    assert (mine.attempts, runs[0].attempts) == (2, 1)
    transitions.lose(attempt.holder(), "again")
    assert seconds(jobs[0]) > 0.05  # BACKOFF_MIN of the tests
    move(jobs[0], attempts=7, due_at=now() + LATE)
    one(jobs[0])
    (dead,) = transitions.lose(attempt.holder(), "the last one")
    assert (dead.id, dead.state) == (jobs[0], State.DEAD)


def test_a_worker_that_stops_gives_back_what_its_children_hold_and_no_other():
    jobs = [new() for _ in range(3)]
    take(*jobs)
    move(jobs[1], worker=f"{attempt.boot()}/12345")
    move(jobs[2], worker=f"{attempt.boot()}x/12345")
    assert {hint.id for hint in transitions.release_boot()} == set(jobs[:2])
    assert [row(job).attempts for job in jobs] == [0, 0, 1]
    assert [row(job).state for job in jobs] == [State.SCHEDULED] * 2 + [State.RUNNING]


@pytest.mark.unsound
def test_the_loop_acts_on_every_timer_that_fired_and_on_no_other(sent):
    due, lost, spent, expired, waiting = new(delay=30), new(), new(), new(expires=-1), new()
    take(lost, spent)
    move(spent, attempts=8)
    sent.clear()
    Job.objects.exclude(pk=waiting).update(due_at=now() + LATE)
    found = {hint.id: hint.state for hint in transitions.fire(100)}
    assert found == {
        due: State.QUEUED,
        lost: State.QUEUED,
        spent: State.DEAD,
        expired: State.CANCELLED,
    }
    assert {hint.id for hint in sent} == {due, lost}
    assert row(lost).error == f"lost with its worker {attempt.holder()}"
    assert row(expired).error == "expired before it started"
    assert 2 < seconds(lost) <= 3  # REPUBLISH of the tests
    assert transitions.fire(100) == []


def test_the_loop_sends_a_lost_hint_again_at_doubled_intervals():
    job = new()
    move(job, due_at=now() + LATE, queued_at=now() - timedelta(seconds=5))
    assert [hint.id for hint in transitions.fire(100)] == [job]
    assert 4.5 < seconds(job) <= 6  # as long as it has waited, up to REPUBLISH_MAX
    move(job, due_at=now() + LATE, queued_at=now() - timedelta(seconds=500))
    transitions.fire(100)
    assert 5 < seconds(job) <= 6.1


def test_the_loop_takes_so_many_the_most_overdue_first():
    jobs = [new() for _ in range(5)]
    for number, job in enumerate(jobs):
        move(job, due_at=now() - timedelta(seconds=10 - number))
    assert {hint.id for hint in transitions.fire(2)} == set(jobs[:2])


def test_an_operator_cancels_what_is_unfinished_and_fences_what_runs():
    waits, runs, done = new(), new(), new()
    mine = one(runs)
    transitions.finish([one(done)])
    assert Job.objects.all().cancel("enough") == 2
    assert {row(job).state for job in (waits, runs)} == {State.CANCELLED}
    assert transitions.finish([mine]) == set()
    assert (row(runs).error, row(done).state) == ("enough", State.SUCCEEDED)


def test_an_operator_retries_what_is_over_once_for_each_key():
    jobs = [new(key="k") for _ in range(1)]
    Job.objects.all().cancel()
    jobs.append(new(key="k"))
    Job.objects.all().cancel()
    jobs.append(new(key="other"))
    Job.objects.all().cancel()
    taken = new(key="other")
    assert Job.objects.all().retry(0) == 1
    assert [row(job).state for job in jobs] == [State.CANCELLED, State.SCHEDULED, State.CANCELLED]
    assert row(taken).state == State.QUEUED


def test_an_operator_ends_the_pause_of_what_backs_off():
    job = new()
    transitions.fail(one(job), "e", 1000, final=False)
    assert Job.objects.all().retry(0) == 1
    assert (seconds(job) <= 0, row(job).attempts) == (True, 1)


def test_retries_are_spread():
    ids = [new() for _ in range(20)]
    Job.objects.all().cancel()
    assert Job.objects.all().retry(1000) == 20
    pauses = [seconds(job) for job in ids]
    assert all(-1 <= pause <= 1001 for pause in pauses)
    assert max(pauses) - min(pauses) > 100


def test_what_waits_can_be_hastened():
    job, runs = new(delay=1000), new()
    one(runs)
    assert transitions.hasten(Job.objects.all()) == 1
    assert seconds(job) <= 0


def test_finished_jobs_are_pruned_after_their_retention_dead_ones_later():
    old, dead, live = new(), new(), new()
    transitions.finish([one(old)])
    transitions.fail(one(dead), "e", 1, final=True)
    Job.objects.filter(due_at=None).update(finished_at=now() - timedelta(days=30))
    assert Job.objects.prune() == 1
    Job.objects.filter(due_at=None).update(finished_at=now() - timedelta(days=100))
    assert Job.objects.prune() == 1
    assert [job.pk for job in Job.objects.all()] == [live]
