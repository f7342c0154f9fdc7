"""A user's transaction that stays open holds a row, or a key: nobody else waits for it long."""

import time
from datetime import timedelta
from uuid import UUID

import pytest
from django.contrib.auth.models import Group
from django.db import connection

from durable_jobs.heartbeat import heartbeat
from durable_jobs.models import Job
from durable_jobs.reconcile import loop
from durable_jobs.reconcilers import enqueue_for
from durable_jobs.slices import claim
from tests import tasks
from tests.conftest import (
    CONTROL,
    FAST,
    WORK,
    effects,
    now,
    open_transaction,
    wait_until,
)

State = Job.State
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.faults,
    pytest.mark.skipif(connection.vendor != "postgresql", reason="needs locks on rows"),
]


def test_a_lease_whose_row_is_locked_is_renewed_soon_after(jobs_db, broker):
    job = tasks.noop.delay()
    row = Job.objects.filter(pk=job.id)
    with heartbeat.by_hand():
        (mine,) = claim(tasks.noop, [UUID(job.id)])
        before = row.get().due_at
        with open_transaction(lambda: list(row.select_for_update())):
            heartbeat.next_renewal = 0
            heartbeat._renew()
            assert heartbeat.next_renewal - time.monotonic() < FAST["HEARTBEAT"] / 2
            assert row.get().due_at == before
        heartbeat.next_renewal = 0
        heartbeat._renew()
        heartbeat.drop(mine)
    assert row.get().due_at > before
    assert not mine.lost


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b"])
def test_a_message_no_database_takes_costs_no_other_run_its_lease(jobs_db, broker, text):
    ids = [UUID(tasks.noop.delay().id) for _ in range(2)]
    with heartbeat.by_hand():
        first, second = claim(tasks.noop, ids)
        first.message, second.progress = text, 50
        before = Job.objects.get(pk=second.id).due_at
        heartbeat.next_renewal = 0
        heartbeat._renew()
        heartbeat.drop(first)
        heartbeat.drop(second)
    row = Job.objects.get(pk=second.id)
    assert row.progress == 50
    assert row.due_at > before
    assert not first.lost


def test_a_reconciler_waits_for_no_open_transaction(jobs_db, broker, caplog):
    groups = [Group.objects.create(name=f"raw {number}") for number in range(40)]
    with open_transaction(lambda: enqueue_for(tasks.rename, groups[20])):
        for _ in range(10):  # on a busy machine one pass has not the time for all the others
            begin = time.monotonic()
            loop.run_once()
            assert time.monotonic() - begin < 5
            if Job.objects.count() == 39:
                break
        assert Job.objects.count() == 39
        assert "1 jobs of tests.tasks.rename wait for the next pass" in caplog.text
    assert Job.objects.count() == 40
    assert loop.run_once().inserted == 0


def test_beat_waits_for_no_open_transaction(crew, monkeypatch):
    monkeypatch.setenv("TEST_PERIODIC", "1")
    with open_transaction(tasks.nightly.delay):
        control, _ = crew(control=CONTROL, work=WORK)
        wait_until(lambda: "Sending due task nightly" in control.log.read_text())
        for number in range(3):  # each by a pass of the loop, which beat sends
            job = tasks.write.apply_async([f"timer {number}"], eta=now() + timedelta(seconds=0.1))
            wait_until(lambda job=job: job.job.state == State.SUCCEEDED, 15)
        assert effects("start nightly") == []
        assert "canceling statement due to lock timeout" in control.log.read_text()
    wait_until(lambda: effects("end nightly"))
