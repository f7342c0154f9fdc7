"""Calls at the edge: many at once, with times; unsaved owners; values that are not JSON."""

import time
from datetime import timedelta

import pytest
from celery import current_app, shared_task
from django.contrib.auth.models import Group
from django.db import transaction
from django.utils import timezone

from durable_jobs import Job, JobTask
from durable_jobs.publisher import EMPTY_BODY, publisher
from durable_jobs.reconcile import fire_timers
from durable_jobs.testing import drain
from tests import tasks

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")
RUNS = []


@pytest.fixture(autouse=True)
def unsent(monkeypatch):
    RUNS.clear()
    monkeypatch.setattr(publisher, "send", list)
    monkeypatch.setattr(publisher, "later", lambda hints, seconds: None)


@shared_task(base=JobTask, ignore_result=False)
def returns_an_object(json=False):
    RUNS.append(1)
    return 1 if json else object()


@shared_task(base=JobTask, bind=True)
def reports(self):
    for step in range(30):
        self.job.checkpoint(step, 30)
        time.sleep(0.05)


def test_a_value_that_is_not_json_ends_the_job_and_does_not_repeat_it():
    job = returns_an_object.delay()
    drain(everything=True)
    assert len(RUNS) == 1
    assert job.job.state == State.DEAD
    assert "it returned what is not JSON" in job.job.error


def test_enqueue_many_knows_the_times_that_apply_async_knows():
    later = timezone.now() + timedelta(hours=1)
    for options in ({"eta": later}, {"countdown": 10}):
        tasks.noop.enqueue_many([[1], [2]], **options)
    assert {job.state for job in Job.objects.all()} == {State.SCHEDULED}
    assert Job.objects.filter(due_at=later).count() == 2
    tasks.noop.enqueue_many([[1], [2]], expires=60)
    assert Job.objects.filter(expires_at__gt=timezone.now()).count() == 2


def test_enqueue_many_in_eager_mode_runs_every_call():
    current_app.conf.task_always_eager = True
    try:
        returns_an_object.enqueue_many([[True], [True], [True]])
    finally:
        current_app.conf.task_always_eager = False
    assert (len(RUNS), Job.objects.count()) == (3, 0)


def test_enqueue_many_asks_for_the_type_of_an_owner_before_it_copies(db):
    # What a new process does first: the content type is not known yet.
    from django.contrib.contenttypes.models import ContentType

    group = Group.objects.create(name="owner")
    ContentType.objects.clear_cache()
    tasks.noop.enqueue_many([[1], [2]], owner=lambda _: group)
    assert Job.objects.for_owner(group).count() == 2


def test_an_owner_that_is_not_saved_is_refused():
    with pytest.raises(ValueError, match="is not saved"):
        tasks.noop.apply_async([1], owner=Group(name="new"))


def test_a_job_may_report_its_progress_in_a_test_of_an_open_transaction():
    with transaction.atomic():
        job = reports.delay()
        drain()
        assert job.job.state == State.SUCCEEDED


def test_a_worker_that_knows_the_task_as_a_plain_one_does_not_run_its_hints():
    def any_task():
        return None

    with pytest.raises(TypeError, match="wake-up of a durable job"):
        any_task(**EMPTY_BODY[1])


def test_tasks_share_no_keys():
    first = tasks.noop.apply_async((1,), key="same")
    other = tasks.fail.apply_async(key="same")
    again = tasks.noop.apply_async((2,), key="same")
    assert again.id == first.id != other.id
    assert Job.objects.unfinished().filter(key="same").count() == 2
    assert again.job.args == [2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key": "k" * 201}, "a key has 1 to 200 characters, this one 201"),
        ({"key": ""}, "a key has 1 to 200 characters, this one 0"),
        ({"max_attempts": 0}, "max_attempts is a number from 1, not 0"),
    ],
)
def test_a_key_or_a_budget_that_cannot_be_is_refused_at_the_call(options, words):
    with pytest.raises(ValueError, match=words):
        tasks.noop.apply_async((1,), **options)
    assert not Job.objects.exists()


@shared_task(base=JobTask, max_retries=None)
def never_gives_up():
    raise OSError("not yet")


def test_a_job_without_an_end_of_its_attempts_goes_on_at_the_largest_number_a_row_can_hold():
    job = never_gives_up.delay()
    for _ in range(3):
        Job.objects.filter(pk=job.id).update(attempts=32_767, due_at=timezone.now())
        drain()
        assert (job.job.state, job.job.attempts) == (State.SCHEDULED, 32_766)
    Job.objects.filter(pk=job.id).update(state=State.RUNNING, due_at=timezone.now())
    fire_timers()
    assert job.job.state == State.QUEUED
