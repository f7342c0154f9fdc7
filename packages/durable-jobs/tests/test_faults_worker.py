"""Workers that die, starve, are orphaned or are of another release than the one who called."""

import signal

import psutil
import pytest
from django.db.models.functions import Now

from durable_jobs.models import Job
from tests import release, tasks
from tests.conftest import CONTROL, EVERYTHING, FAST, WORK, effects, pids, wait_until

State = Job.State
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]


def row(result):
    return Job.objects.get(pk=result.id)


def succeeded():
    return Job.objects.filter(state=State.SUCCEEDED).count()


def test_a_job_may_take_longer_than_its_lease_and_runs_once(crew):
    crew(all=EVERYTHING)
    job = tasks.write.delay("long", seconds=2 * FAST["LEASE"])
    wait_until(lambda: row(job).state == State.SUCCEEDED)
    done = row(job)
    assert (done.finished_at - done.started_at).total_seconds() > 2 * FAST["LEASE"]
    assert (done.attempts, done.token) == (1, 1)
    assert effects("start") == ["start long"]


def test_code_that_starves_the_heartbeat_runs_twice_and_takes_effect_once(crew):
    (worker,) = crew(all=EVERYTHING)
    atomic = tasks.hold_gil_atomic.delay(FAST["LEASE"] + 5)
    other = tasks.hold_gil.delay(FAST["LEASE"] + 5)
    wait_until(lambda: row(atomic).token == row(other).token == 2)
    wait_until(lambda: succeeded() == 2)
    # The first runs wake up after the second ones have ended, and find the fence.
    wait_until(lambda: worker.log.read_text().count("had lost its lease") == 2)
    assert effects("atomic") == ["atomic 1"]
    # What is not atomic is done at least once, and the row is of the second run.
    wait_until(lambda: len(effects("held")) == 2)
    assert row(other).worker.endswith(f"/{pids('held')[0]}")
    assert (row(atomic).token, row(other).token) == (2, 2)


def test_a_child_killed_in_a_slice_takes_no_other_job_down(crew, monkeypatch):
    monkeypatch.setitem(FAST, "SLICE_SECONDS", 30)  # a slice on a slow machine too
    crew(work="-c 1 -Q default", control=CONTROL)
    tasks.write_or.enqueue_many([["warm up"]] * 20)
    wait_until(lambda: succeeded() == 20)
    calls = [[str(number)] for number in range(40)]
    calls[25] = ["killer", "kill"]
    # A second crash would end any of them.
    tasks.write_or.enqueue_many(calls, max_attempts=2)
    wait_until(lambda: Job.objects.filter(state=State.DEAD).exists())
    wait_until(lambda: Job.objects.unfinished().count() == 0)
    assert effects("start killer") == ["start killer"] * 2
    assert Job.objects.get(state=State.DEAD).attempts == 2
    assert succeeded() == 20 + 39
    ends = [note for note in effects("end") if note != "end warm up"]
    assert set(ends) == {f"end {number}" for number in range(40) if number != 25}
    # It was a slice: others went down with it, and had an attempt left.
    assert Job.objects.filter(state=State.SUCCEEDED, attempts=2).exists()


def test_a_job_that_fails_in_a_slice_costs_no_other_an_attempt(crew):
    crew(work="-c 1 -Q default")
    calls = [[str(number), "raise" if number % 10 == 5 else ""] for number in range(50)]
    tasks.write_or.enqueue_many(calls, max_attempts=1)
    wait_until(lambda: Job.objects.unfinished().count() == 0)
    assert Job.objects.filter(state=State.DEAD, error__contains="ValueError").count() == 5
    assert succeeded() == len(effects("end")) == 45
    assert not Job.objects.exclude(attempts=1).exists()


def test_children_whose_main_process_is_killed_leave_and_their_jobs_are_done_once(crew):
    (orphaned, _) = crew(work=WORK, control=CONTROL)
    children = orphaned.children()
    jobs = [tasks.write_atomic.delay(f"{number}.", seconds=1) for number in range(2)]
    wait_until(lambda: Job.objects.filter(state=State.RUNNING).count() == 2)
    orphaned.process.send_signal(signal.SIGKILL)
    assert orphaned.process.wait(10) == -signal.SIGKILL
    assert Job.objects.filter(state=State.RUNNING).count() == 2
    crew(second=WORK)
    try:
        wait_until(lambda: succeeded() == len(jobs))
        assert sorted(effects("atomic")) == ["atomic 0.", "atomic 1."]
        assert psutil.wait_procs(children, 20)[1] == []
    finally:
        for child in children:
            if child.is_running():
                child.kill()


def test_old_and_new_workers_side_by_side_lose_no_job_and_use_up_no_attempt(crew, monkeypatch):
    # The old worker may well get a job's hint several times before the new one does.
    monkeypatch.setitem(FAST, "REPUBLISH", 1)
    monkeypatch.setitem(FAST, "REPUBLISH_MAX", 1)
    monkeypatch.setenv("TEST_RELEASE", "1")
    old, _ = crew(old=WORK, control=CONTROL)
    monkeypatch.delenv("TEST_RELEASE")
    unknown = release.farewell.delay("ann")
    changed = release.greet.delay("ann", "dr")
    wait_until(lambda: "unregistered task of type 'tests.release.farewell'" in
               old.log.read_text())  # fmt: skip
    wait_until(lambda: "waits for a worker that knows its signature" in row(changed).error)
    assert (row(unknown).state, row(unknown).attempts) == (State.QUEUED, 0)
    assert (row(changed).state, row(changed).attempts) == (State.SCHEDULED, 0)
    assert effects() == []
    Job.objects.filter(pk=changed.id).update(due_at=Now())  # its minute is over
    crew(new=WORK)
    # Both take hints now; what the old one cannot do it leaves to the new one.
    wait_until(lambda: row(unknown).state == State.SUCCEEDED, 60)
    old.process.send_signal(signal.SIGTERM)
    assert old.process.wait(20) == 0
    # Had the old one taken it once more, it would wait for another minute.
    Job.objects.filter(pk=changed.id, state=State.SCHEDULED).update(due_at=Now())
    wait_until(lambda: succeeded() == 2, 60)
    assert sorted(effects()) == ["bye ann", "hello dr ann"]
    assert not Job.objects.exclude(attempts=1).exists()


def test_a_stopped_worker_finishes_what_is_short_and_hands_back_what_is_long(crew):
    (worker,) = crew(work=WORK)
    short = tasks.write.delay("short", seconds=3)
    long = tasks.write.delay("long", seconds=60)
    wait_until(lambda: set(effects("start")) == {"start short", "start long"})
    waiting = tasks.write.delay("waiting")  # not before both children work
    worker.process.send_signal(signal.SIGTERM)
    wait_until(lambda: row(short).state == State.SUCCEEDED)
    worker.process.send_signal(signal.SIGQUIT)  # the supervisor's patience is over
    assert worker.process.wait(15) == 0
    assert (row(long).state, row(long).attempts) == (State.SCHEDULED, 0)
    assert (row(waiting).state, row(waiting).attempts) == (State.QUEUED, 0)
    crew(second=WORK)
    wait_until(lambda: effects("start").count("start long") == 2, 10)
    wait_until(lambda: row(waiting).state == State.SUCCEEDED, 10)
    assert row(long).attempts == 1
