"""Workflows as rows: a step enqueues the next, many jobs are followed by one."""

import pytest
from celery import shared_task
from django.contrib.auth.models import Group, User
from django.db import transaction

from durable_jobs import Job, JobTask
from durable_jobs.publisher import publisher
from durable_jobs.testing import drain
from tests import tasks
from tests.conftest import wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture
def unsent(monkeypatch):
    monkeypatch.setattr(publisher, "send", list)
    monkeypatch.setattr(publisher, "later", lambda hints, seconds: None)


@shared_task(base=JobTask, atomic=True)
def first_step(name, fail=False):
    Group.objects.create(name=name)
    second_step.delay(name)
    if fail:
        raise ValueError("after both writes")


@shared_task(base=JobTask, atomic=True)
def second_step(name):
    User.objects.create(username=name)


def test_a_steps_writes_and_the_next_step_commit_together(unsent):
    first_step.delay("paid")
    assert drain() == 2
    assert Group.objects.filter(name="paid").exists()
    assert User.objects.filter(username="paid").exists()


def test_a_step_that_fails_leaves_neither_its_writes_nor_the_next_step(unsent):
    first_step.delay("unpaid", fail=True)
    drain()
    assert not Group.objects.exists()
    assert list(Job.objects.values_list("task", flat=True)) == [first_step.name]


def fan_out(group, numbers):
    with transaction.atomic():
        tasks.square.enqueue_many([[number] for number in numbers], owner=lambda _: group)
        return tasks.total.apply_async([group.pk], owner=group)


def test_a_fan_in_runs_once_after_the_last_of_its_jobs_and_uses_up_no_attempt(unsent):
    last = fan_out(Group.objects.create(name="batch"), range(5))
    # The fan-in comes first, to be told to wait.
    Job.objects.exclude(pk=last.id).update(task="elsewhere")
    drain()
    waiting = Job.objects.get(pk=last.id)
    assert (waiting.state, waiting.attempts) == (State.SCHEDULED, 0)
    assert waiting.error == "waits for 5 jobs"
    Job.objects.filter(task="elsewhere").update(task=tasks.square.name)
    drain(everything=True)
    done = Job.objects.get(pk=last.id)
    assert (done.state, done.result, done.attempts) == (State.SUCCEEDED, 30, 1)


def test_a_fan_in_is_not_held_up_for_ever_by_a_job_that_died(unsent):
    group = Group.objects.create(name="batch")
    last = fan_out(group, ["no number", 2])
    drain(everything=True)
    assert Job.objects.filter(state=State.DEAD).count() == 1
    assert Job.objects.get(pk=last.id).result == 4


def test_a_fan_in_follows_its_jobs_through_real_workers(start_worker, control):
    last = fan_out(Group.objects.create(name="batch"), range(200))
    start_worker()
    wait_until(lambda: Job.objects.get(pk=last.id).state == State.SUCCEEDED)
    assert Job.objects.get(pk=last.id).result == sum(number**2 for number in range(200))
