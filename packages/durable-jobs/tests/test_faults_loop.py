"""The loop without beat, many loops at once, a loop beside a backlog, and what only it starts."""

import re
import signal
from datetime import timedelta

import pytest
from django.contrib.auth.models import Group
from django.db import connection
from django.db.models import Max, Min
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from durable_jobs.models import Job
from durable_jobs.publisher import publisher
from durable_jobs.reconcile import BATCH, fire_timers
from tests import tasks
from tests.conftest import (
    CONTROL,
    EVERYTHING,
    FAST,
    WORK,
    effects,
    end,
    now,
    wait_until,
)

State = Job.State
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]


def succeeded():
    return Job.objects.filter(state=State.SUCCEEDED).count()


def make(count, **fields):
    fields = {"task": tasks.noop.name, "queue": "default", "due_at": Now(), **fields}
    Job.objects.bulk_create([Job(**fields) for _ in range(count)])


def soon(seconds):
    """Return a time for `eta`: unlike `countdown`, the loop alone acts on it."""
    return now() + timedelta(seconds=seconds)


def test_three_loops_without_beat_heal_everything_and_act_on_no_row_twice(
    broker, crew, start_loop, monkeypatch
):
    monkeypatch.setitem(FAST, "REPUBLISH", 60)  # what is published once is not due again
    monkeypatch.setitem(FAST, "REPUBLISH_MAX", 60)  # on a busy machine either
    monkeypatch.setitem(FAST, "SLICE_MAX", 1)  # workers leave to the loops what is due meanwhile
    loops = [start_loop(f"loop{number}") for number in range(3)]
    crew(work="-c 2 -Q default")
    # Waiting for their time, lost with a worker, lost with a message; due one after the other.
    faults = [
        {"state": State.SCHEDULED},
        {"state": State.RUNNING, "attempts": 1, "worker": "host/boot/1"},
        {"state": State.QUEUED},
    ]
    Job.objects.bulk_create(
        Job(task=tasks.noop.name, queue="default", due_at=due, **faults[number % 3])
        for number in range(1500)
        for due in [Now() + timedelta(milliseconds=1000 + 2 * number)]
    )
    wait_until(lambda: succeeded() == 1500, 60)
    moved = [sum(map(int, re.findall(r"(\d+) queued", loop.log.read_text()))) for loop in loops]
    assert sum(moved) == 1500
    assert all(moved)
    assert not Job.objects.exclude(token=1).exists()
    assert all(loop.process.poll() is None for loop in loops)


def test_a_pass_takes_a_thousand_rows_at_a_time(jobs_db, broker):
    make(2 * BATCH + 500)
    with CaptureQueriesContext(connection) as queries:
        assert fire_timers() == {State.QUEUED: 2 * BATCH + 500}
    limits = [query["sql"] for query in queries if f"LIMIT {BATCH}" in query["sql"]]
    assert len(limits) == 3
    assert fire_timers().total() == 0
    assert publisher.flush(10)


def test_a_killed_beat_is_noticed_in_the_timers_and_a_loop_takes_over(crew, start_loop):
    control, _ = crew(control=CONTROL, work=WORK)
    first = tasks.write.apply_async(["first"], eta=soon(0.5))
    wait_until(lambda: Job.objects.get(pk=first.id).state == State.SUCCEEDED)
    end([control.process])
    late = tasks.write.apply_async(["late"], eta=soon(0.1))
    # The one figure to alert on: how late the most overdue timer is.
    wait_until(lambda: Job.objects.overdue(3 * FAST["TICK"]).exists())
    assert Job.objects.get(pk=late.id).state == State.SCHEDULED
    start_loop()
    wait_until(lambda: Job.objects.get(pk=late.id).state == State.SUCCEEDED)
    assert effects("end") == ["end first", "end late"]
    assert not Job.objects.overdue(3 * FAST["TICK"]).exists()


def test_a_loop_with_a_span_of_life_does_its_work_and_ends(start_loop):
    make(3, state=State.SCHEDULED)
    loop = start_loop(seconds=2)
    assert loop.process.wait(60) == 0
    assert "3 queued" in loop.log.read_text()


def test_thousands_of_jobs_behind_a_busy_worker_do_not_delay_the_loop(broker, crew):
    crew(control=CONTROL, stuck="-c 1 -Q default", free="-c 1 -Q high")
    tasks.write.delay("stuck", seconds=600)
    wait_until(lambda: effects("start stuck"))
    tasks.noop.enqueue_many([[number] for number in range(5000)])
    assert publisher.flush(10)
    lateness = []
    for number in range(5):
        job = tasks.write.apply_async([str(number)], eta=soon(0.5), queue="high")
        due = Job.objects.get(pk=job.id).due_at
        wait_until(lambda job=job: Job.objects.get(pk=job.id).state == State.SUCCEEDED)
        lateness.append((Job.objects.get(pk=job.id).started_at - due).total_seconds())
    assert Job.objects.filter(state=State.QUEUED).count() == 5000
    assert max(lateness) < FAST["TICK"] + 3


def test_dead_jobs_are_retried_at_the_pace_the_operator_asked_for(crew):
    crew(control=CONTROL, work=WORK)
    dead = {"state": State.DEAD, "due_at": None, "finished_at": Now(), "attempts": 8}
    make(100, **dead, error="boom")
    assert Job.objects.filter(state=State.DEAD).retry(spread=5) == 100
    assert Job.objects.filter(state=State.SCHEDULED, attempts=0).count() == 100
    wait_until(lambda: succeeded() == 100)
    times = Job.objects.aggregate(first=Min("started_at"), last=Max("started_at"))
    assert (times["last"] - times["first"]).total_seconds() > 3
    # None waited longer than a pass of the loop, so they did not all start at the end.
    middle = times["first"] + (times["last"] - times["first"]) / 2
    assert 20 < Job.objects.filter(started_at__lt=middle).count() < 80


def test_a_periodic_job_with_two_beats_never_overlaps(crew, monkeypatch):
    monkeypatch.setenv("TEST_PERIODIC", "1")
    beats = {f"beat{n}": f"-B -s {{folder}}/beat{n} -c 1 -Q control" for n in range(2)}
    workers = crew(**beats, work="-c 3 -Q default")
    begin = now()
    wait_until(lambda: len(effects("end nightly")) >= 3)
    for beat in workers[:2]:
        assert "Sending due task nightly" in beat.log.read_text()
        beat.process.send_signal(signal.SIGTERM)
    for beat in workers[:2]:  # one that still ends may make a call
        beat.process.wait(30)
    wait_until(lambda: Job.objects.unfinished().count() == 0)
    order = [note.split()[0] for note in effects()]
    assert order == ["start", "end"] * (len(order) // 2)
    # Both called far more often than it ran; one row for each run.
    calls = (now() - begin).total_seconds() / 0.3 * 2
    assert Job.objects.count() == len(order) // 2 < calls / 2


def test_objects_that_were_changed_behind_its_back_are_brought_in_order_again(crew):
    crew(all=EVERYTHING)
    names = [f"raw {number}" for number in range(30)]
    with connection.cursor() as cursor:  # no signal, no call
        cursor.execute("INSERT INTO auth_group (name) SELECT unnest(%s::text[])", [names])
    wait_until(lambda: Group.objects.filter(name__startswith="done").count() == 30)
    wait_until(lambda: succeeded() == 30)
    # A backup is restored: the objects are as they were, their jobs are gone.
    with connection.cursor() as cursor:
        cursor.execute("UPDATE auth_group SET name = 'raw ' || id")
        cursor.execute("DELETE FROM durable_jobs_job")
    wait_until(lambda: Group.objects.filter(name__startswith="done").count() == 30)
    wait_until(lambda: succeeded() == Job.objects.count() == 30)


def test_pruning_goes_in_batches_and_leaves_dead_and_living_jobs(jobs_db):
    long_ago = {"due_at": None, "finished_at": Now() - timedelta(days=30)}
    make(2500, state=State.SUCCEEDED, **long_ago)
    make(50, state=State.DEAD, **long_ago)
    make(50)
    with CaptureQueriesContext(connection) as queries:
        assert Job.objects.prune(batch=1000) == 2500
    deletes = [query for query in queries if query["sql"].startswith("DELETE")]
    assert len(deletes) == 3
    assert Job.objects.filter(state=State.DEAD).count() == 50
    assert Job.objects.unfinished().count() == 50
