"""The loop's statement, the reconcilers, pruning, checks and commands."""

import threading
from datetime import timedelta
from io import StringIO
from unittest.mock import patch

import pytest
from django.contrib.auth.models import Group
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.db.models.functions import Now

from durable_jobs import Job, attempt, checks, reconcilers, transitions
from durable_jobs.attempt import Attempt
from durable_jobs.publisher import publisher
from durable_jobs.reconcile import fire_timers, unknown_tasks
from durable_jobs.testing import drain
from tests import tasks

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture(autouse=True)
def sent(monkeypatch):
    hints = []
    monkeypatch.setattr(publisher, "send", hints.extend)
    return hints


def claim(job, worker="w/1/1"):
    with patch.object(attempt, "holder", lambda: worker):
        found = transitions.claim(tasks.noop, [job], alone=True)
    return found[0].token if found else None


def finish(job, token):
    return transitions.finish([Attempt(tasks.noop, job, token, 1)], wait=True)


def new_job(**fields):
    job = Job.objects.create(task=tasks.noop.name, queue="default", due_at=Now(), **fields)
    return job.pk


def test_a_job_is_claimed_once_until_its_lease_ends():
    job = new_job()
    assert (claim(job), claim(job)) == (1, None)
    Job.objects.update(due_at=Now())
    assert fire_timers() == {State.QUEUED: 1}
    assert claim(job) == 2


def test_a_stale_token_finishes_fails_and_renews_nothing():
    job = new_job()
    stale = claim(job)
    Job.objects.update(due_at=Now())
    fire_timers()
    token = claim(job)
    before = Job.objects.values().get()
    late = Attempt(tasks.noop, job, stale, 1, progress=9, message="stale")
    assert finish(job, stale) == set()
    assert transitions.renew([late]) == transitions.still_mine([late]) == set()
    assert transitions.fail(late, "stale", 1, final=True) is None
    assert not transitions.release([late])
    assert Job.objects.values().get() == before
    assert finish(job, token) == {job}
    assert Job.objects.get().state == State.SUCCEEDED


def test_a_row_in_an_open_transaction_is_skipped_not_waited_for():
    job, other = new_job(), new_job()
    held, done = threading.Event(), threading.Event()

    def hold():
        with transaction.atomic():
            list(Job.objects.select_for_update().filter(pk=job))
            held.set()
            done.wait(10)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with connection.cursor() as cursor:
        cursor.execute("SET statement_timeout = '2s'")
    try:
        assert claim(job) is None
        assert fire_timers() == {State.QUEUED: 1}
        assert claim(other) == 1
    finally:
        done.set()
        thread.join()
        with connection.cursor() as cursor:
            cursor.execute("RESET statement_timeout")
    assert claim(job) == 1


def test_two_passes_at_once_act_on_each_row_once(sent):
    for _ in range(300):
        new_job()
    threads = [
        threading.Thread(target=lambda: (fire_timers(), connection.close())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == len({hint.id for hint in sent}) == 300


def test_a_job_that_lost_its_last_worker_is_dead():
    job = new_job(max_attempts=1)
    claim(job)
    Job.objects.update(due_at=Now())
    assert fire_timers() == {State.DEAD: 1}
    row = Job.objects.get()
    assert (row.due_at, row.error) == (None, "lost with its worker w/1/1")


def test_hints_of_a_waiting_job_are_sent_at_doubling_intervals():
    new_job()
    for waited, pause in ((1, 3), (4, 4), (100, 6)):
        Job.objects.update(due_at=Now(), queued_at=Now() - timedelta(seconds=waited))
        fire_timers()
        row = Job.objects.annotate(pause=models_pause()).get()
        assert row.pause.total_seconds() == pytest.approx(pause, abs=0.5)


def models_pause():
    from django.db.models import F

    return F("due_at") - Now()


def test_a_reconciler_inserts_one_job_for_each_object_and_none_twice():
    for number in range(3):
        Group.objects.create(name=f"raw {number}")
    assert reconcilers.run_all() == 3
    assert reconcilers.run_all() == 0
    assert drain() == 3
    assert Group.objects.filter(name__startswith="done").count() == 3
    assert reconcilers.run_all() == 0


def test_a_dead_job_rests_its_object_for_the_resync_time_and_then_it_is_tried_again():
    Group.objects.create(name="raw poison")
    assert reconcilers.run_all() == 1
    drain(everything=True)
    assert Job.objects.get().state == State.DEAD
    assert reconcilers.run_all() == 0
    Job.objects.update(finished_at=Now() - timedelta(hours=2))
    assert reconcilers.run_all() == 1


def test_a_failing_reconciler_does_not_hold_up_the_others(monkeypatch, caplog):
    broken = reconcilers.Reconciler(tasks.noop, lambda: 1 / 0, timedelta(hours=1))
    monkeypatch.setitem(reconcilers._registered, "a.broken", broken)
    Group.objects.create(name="raw 1")
    assert reconcilers.run_all() == 1
    assert "a.broken" in caplog.text


@pytest.mark.unsound
def test_pruning_keeps_the_dead_longer_and_never_touches_live_jobs():
    new_job()
    for state, days in (("succeeded", 8), ("succeeded", 6), ("dead", 8), ("dead", 91)):
        finished = Now() - timedelta(days=days)
        job = new_job()
        Job.objects.filter(pk=job).update(state=state, due_at=None, finished_at=finished)
    assert Job.objects.prune(batch=1) == 2
    assert sorted(Job.objects.values_list("state", flat=True)) == [
        "dead",
        "queued",
        "succeeded",
    ]


def test_jobs_of_unknown_tasks_are_reported_after_a_day():
    Job.objects.filter(pk=new_job()).update(task="gone.task", created_at=Now() - timedelta(days=2))
    assert unknown_tasks() == {"gone.task": 1}


def test_checks_name_what_is_wrong(settings):
    assert checks.check_all() == []
    settings.DURABLE_JOBS = {"LEASE": 3, "HEARTBEAT": 2, "TICK": 60, "TYPO": 1}
    settings.CELERY_DB_REUSE_MAX = None
    settings.CELERY_BEAT_SCHEDULE = {"x": {"task": "y"}}
    found = {message.id for message in checks.check_all()}
    assert found == {f"durable_jobs.{code}" for code in ("E001", "E005", "E006", "W002", "W003")}


def command(*words, **options):
    out = StringIO()
    call_command(*words, stdout=out, **options)
    return out.getvalue()


def test_the_jobs_command_lists_shows_retries_cancels_and_counts():
    dead = tasks.fail_for_good.delay()
    drain()
    live = tasks.noop.delay(1)
    listed = command("jobs", "list")
    assert dead.id in listed
    assert "no such account" in listed
    assert "no such account" in command("jobs", "show", dead.id)
    assert "1 job will run again" in command("jobs", "retry", "--state", "dead")
    assert "1 job cancelled" in command("jobs", "cancel", live.id)
    stats = command("jobs", "stats")
    assert "scheduled  1" in stats
    assert "most overdue timer" in stats
    with pytest.raises(CommandError):
        command("jobs", "cancel")


def test_the_reconcile_command_does_one_pass():
    new_job()
    assert "1 queued" in command("reconcile")
