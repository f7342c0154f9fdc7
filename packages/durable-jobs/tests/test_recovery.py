"""A worker or its child ends, freezes or is told to stop: what becomes of its jobs, and when."""

import os
import signal
import socket
import time

import psutil
import pytest
from django.db import transaction
from django.db.models import Q

from durable_jobs.models import Job
from durable_jobs.publisher import publisher
from tests import tasks
from tests.conftest import (
    CONTROL,
    EVERYTHING,
    FAST,
    WORK,
    effects,
    holder,
    now,
    pids,
    wait_until,
)

State = Job.State
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]


def state_of(result):
    return Job.objects.get(pk=result.id).state


def test_a_job_whose_worker_is_killed_runs_again_within_lease_and_tick(crew):
    *workers, _ = crew(work=WORK, second=WORK, control=CONTROL)
    job = tasks.write.delay("x", seconds=2)
    wait_until(lambda: effects("start") == ["start x"])
    holder(workers, pids()[0]).kill()
    held = Job.objects.get()
    assert (held.state, held.token) == (State.RUNNING, 1)
    assert (held.due_at - now()).total_seconds() <= FAST["LEASE"]
    wait_until(lambda: len(effects("start")) == 2)
    started = Job.objects.get(pk=job.id).started_at
    assert 0 <= (started - held.due_at).total_seconds() < FAST["TICK"] + 4
    wait_until(lambda: state_of(job) == State.SUCCEEDED)
    assert effects("end") == ["end x"]
    assert Job.objects.get().token == 2


def test_a_job_whose_child_is_killed_runs_again_within_ten_seconds(crew):
    # No loop runs here: the main process alone gives the job to the next child.
    crew(work=WORK)
    job = tasks.write.delay("x", seconds=1)
    wait_until(lambda: pids("start"))
    os.kill(pids("start")[0], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: len(pids("start")) == 2, 10)
    assert time.monotonic() - killed < 10
    assert len(set(pids("start"))) == 2
    wait_until(lambda: state_of(job) == State.SUCCEEDED)
    assert effects("end") == ["end x"]


def test_a_worker_stopped_cold_hands_its_job_back_at_once_and_the_attempt_does_not_count(crew):
    (work,) = crew(work=WORK)
    job = tasks.write.delay("x", seconds=60)
    wait_until(lambda: effects("start"))
    work.process.send_signal(signal.SIGQUIT)
    assert work.process.wait(10) == 0
    row = Job.objects.get(pk=job.id)
    assert (row.state, row.attempts) == (State.SCHEDULED, 0)
    crew(second=WORK)
    wait_until(lambda: len(effects("start")) == 2, 5)


def test_a_worker_that_is_asked_to_stop_finishes_its_job(crew):
    (work,) = crew(work=WORK)
    job = tasks.write.delay("x", seconds=1)
    wait_until(lambda: effects("start"))
    work.process.send_signal(signal.SIGTERM)
    assert work.process.wait(10) == 0
    assert effects("end") == ["end x"]
    assert state_of(job) == State.SUCCEEDED


@pytest.mark.parametrize("kind", ["refused", "frozen"])
def test_a_broker_in_trouble_costs_no_call_more_than_50_milliseconds(kind, jobs_db, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        port = frozen.getsockname()[1]
        if kind == "refused":
            frozen.close()
        monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"redis://127.0.0.1:{port}/0")
        slowest = 0.0
        for number in range(200):
            begin = time.perf_counter()
            with transaction.atomic():
                tasks.noop.delay(number)
            slowest = max(slowest, time.perf_counter() - begin)
        wait_until(lambda: publisher.failures > 0)
    assert slowest < 0.05
    assert Job.objects.filter(state=State.QUEUED).count() == 200


def test_a_task_that_kills_its_process_ends_dead_while_others_go_on(crew):
    crew(all=EVERYTHING)
    killer = tasks.poison.delay()
    good = [tasks.write.delay(str(number)) for number in range(10)]
    wait_until(lambda: state_of(killer) == State.DEAD, 60)
    assert len(effects("poison")) == 3
    assert len(set(pids("poison"))) == 3
    wait_until(lambda: Job.objects.filter(state=State.SUCCEEDED).count() == len(good))
    assert len(effects("end")) == 10
    # The main process says so, or the loop, whichever is first with so short a lease.
    error = Job.objects.get(pk=killer.id).error
    assert "WorkerLostError" in error or "lost with its worker" in error


def test_a_job_past_its_hard_time_limit_fails_the_attempt_and_says_so(crew, monkeypatch):
    monkeypatch.setitem(FAST, "LEASE", 60)  # the main process says so, not the loop
    crew(all=EVERYTHING)
    job = tasks.hang.delay()
    wait_until(lambda: state_of(job) == State.DEAD, 40)
    row = Job.objects.get(pk=job.id)
    assert "hard time limit (1" in row.error
    assert (row.attempts, len(effects("hang"))) == (2, 2)


def test_atomic_jobs_take_effect_exactly_once_though_workers_are_killed(crew):
    total = 12
    crew(control=CONTROL)
    for number in range(total):
        tasks.write_atomic.delay(f"{number}.", seconds=1)
    for round_ in range(2):
        (work,) = crew(**{f"victim{round_}": WORK})
        names = [f"/{child.pid}" for child in work.children()]
        held = Job.objects.filter(state=State.RUNNING).filter(
            Q(worker__endswith=names[0]) | Q(worker__endswith=names[1])
        )
        wait_until(held.exists)
        work.kill()
        assert held.exists()
    crew(survivor=WORK)
    wait_until(lambda: Job.objects.filter(state=State.SUCCEEDED).count() == total, 60)
    assert Job.objects.filter(attempts__gt=1).exists()
    assert sorted(effects("atomic")) == sorted(f"atomic {number}." for number in range(total))


def test_a_frozen_worker_that_wakes_late_can_write_nothing(crew):
    work, _ = crew(frozen="-c 1 -Q default", control=CONTROL)
    job = tasks.write_atomic.delay("x", seconds=1)
    wait_until(lambda: state_of(job) == State.RUNNING)
    processes = [psutil.Process(work.process.pid), *work.children()]
    for process in processes:
        process.suspend()
    wait_until(lambda: all(p.status() == psutil.STATUS_STOPPED for p in processes))
    crew(second=WORK)
    wait_until(lambda: state_of(job) == State.SUCCEEDED)
    for process in processes:
        process.resume()
    wait_until(lambda: "had lost its lease" in work.log.read_text())
    assert effects("atomic") == ["atomic x"]
    row = Job.objects.get(pk=job.id)
    assert (row.token, row.state) == (2, State.SUCCEEDED)


def test_a_cancelled_running_job_stops_at_its_next_checkpoint(crew):
    (work,) = crew(work=WORK)
    job = tasks.checkpoints.delay(100)
    wait_until(lambda: len(effects("step")) > 2)
    assert Job.objects.filter(pk=job.id).cancel() == 1
    wait_until(lambda: "was cancelled or given" in work.log.read_text(), 5)
    assert len(effects("step")) < 60
    assert state_of(job) == State.CANCELLED


def test_what_a_cancelled_atomic_job_wrote_is_rolled_back(crew):
    (work,) = crew(work=WORK)
    job = tasks.write_atomic.delay("x", seconds=1)
    wait_until(lambda: state_of(job) == State.RUNNING)
    assert Job.objects.filter(pk=job.id).cancel() == 1
    wait_until(lambda: "had lost its lease" in work.log.read_text())
    assert effects("atomic") == []
    assert state_of(job) == State.CANCELLED


def test_duplicate_hints_run_a_job_once(crew):
    from durable_jobs.publisher import Hint

    with transaction.atomic():
        job = tasks.write.delay("x")
    row = Job.objects.get()
    for _ in range(50):
        publisher.publish([Hint(row.id, row.task, row.queue, {}, "[]", "{}")])
    crew(work=WORK)
    wait_until(lambda: state_of(job) == State.SUCCEEDED)
    publisher.publish([Hint(row.id, row.task, row.queue, {}, "[]", "{}")])
    sentinel = tasks.write.delay("sentinel")
    wait_until(lambda: state_of(sentinel) == State.SUCCEEDED)
    assert effects("start x") == ["start x"]


def test_a_slow_job_of_a_slice_does_not_hold_up_the_others(crew):
    crew(work="-c 3 -Q default")
    tasks.write.enqueue_many([["slow", 5]] + [[str(number)] for number in range(40)])
    wait_until(lambda: len(effects("end")) == 40, 5)
    assert "end slow" not in effects("end")
    wait_until(lambda: len(effects("end")) == 41)
    assert len(effects("start")) == 41
