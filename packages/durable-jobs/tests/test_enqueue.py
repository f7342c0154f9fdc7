"""Calls at the edge: many at once, with times; unsaved owners; values that are not JSON."""

import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from celery import current_app, shared_task, signals
from django.contrib.auth.models import Group
from django.contrib.sessions.models import Session
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from kombu import Queue

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


def test_who_logs_a_call_that_is_merged_into_a_job_hears_of_that_job():
    told = []

    def remember(headers, **_):
        told.append(headers["id"])

    signals.after_task_publish.connect(remember)
    try:
        first = tasks.noop.apply_async((1,), key="same")
        again = tasks.noop.apply_async((2,), key="same")
    finally:
        signals.after_task_publish.disconnect(remember)
    assert told == [first.id, again.id] == [first.id] * 2


REFUSED = {
    "a long key": ({"key": "k" * 201}, "a key has 1 to 200 characters, this one 201"),
    "an empty key": ({"key": ""}, "a key has 1 to 200 characters, this one 0"),
    "NUL in a key": ({"key": "a\0b"}, "a character that PostgreSQL does not store"),
    "half a character": ({"key": "\ud800"}, "a character that PostgreSQL does not store"),
    "a key that is a list": ({"key": [1]}, r"the key \[1\] is no text"),
    "no attempt": ({"max_attempts": 0}, "max_attempts is a number from 1, not 0"),
    "half an attempt": ({"max_attempts": 2.5}, "max_attempts is a number from 1, not 2.5"),
    "a long owner": ({"owner": Session(pk="k" * 256)}, "owner's key has 1 to 255 characters"),
    "a composite owner": ({"owner": Group(pk=(1, 2))}, "its primary key is composite"),
    "a binary owner": ({"owner": Group(pk=b"12")}, "its primary key is composite or binary"),
    "NUL in an owner": ({"owner": Session(pk="a\0")}, "a character that PostgreSQL does not"),
    "NUL in headers": ({"headers": {"h": "a\0b"}}, "headers and options must be JSON"),
    "an object in headers": ({"headers": {"h": object()}}, "headers and options must be JSON"),
    "no number in headers": ({"headers": {"h": float("nan")}}, "headers and options must be"),
    "a high priority": ({"priority": 300}, "a priority is a number from 0 to 255, not 300"),
    "a priority in words": ({"priority": "high"}, "a priority is a number from 0 to 255"),
    "a limit in words": ({"time_limit": "long"}, "a time limit is a number of seconds"),
    "a long queue": ({"queue": Queue("q" * 101)}, "queue's name has 0 to 100 characters"),
    "NUL in a queue": ({"queue": Queue("q\0")}, "a character that PostgreSQL does not store"),
    "the end of time": ({"eta": datetime.max.replace(tzinfo=UTC)}, "is no time that every clock"),
    "a late end": ({"expires": datetime.max.replace(tzinfo=UTC)}, "is no time that every clock"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_no_row_can_hold_is_refused_in_words_before_any_sql(options, words):
    with transaction.atomic():
        with CaptureQueriesContext(connection) as queries:
            with pytest.raises((TypeError, ValueError), match=words):
                tasks.noop.apply_async((1,), **options)
            if not {"max_attempts", "key", "owner"} & set(options):
                with pytest.raises((TypeError, ValueError), match=words):
                    tasks.noop.enqueue_many([[1], [2]], **options)
        assert not queries.captured_queries
        assert not Job.objects.exists()


@shared_task(base=JobTask, name="n" * 201)
def long_name():
    return None


def test_a_task_whose_name_is_too_long_for_a_row_is_refused_at_its_call():
    with pytest.raises(ValueError, match="a task's name has 1 to 200 characters, this one 201"):
        long_name.delay()


@shared_task(base=JobTask, bind=True, max_retries=50)
def retries_in_a_long_queue(self, name):
    raise self.retry(queue=Queue(name), countdown=60)


@pytest.mark.parametrize(("name", "words"), [("q" * 101, "queue's name has"), ("other", "Retry")])
def test_a_retry_goes_to_a_queue_that_a_row_can_name(name, words):
    job = retries_in_a_long_queue.delay(name)
    drain()
    assert job.job.state == State.SCHEDULED
    assert words in job.job.error
    assert job.job.queue in ("other", "default")


def test_keys_and_owners_that_a_row_can_hold_are_kept_as_text():
    number, unique = (
        tasks.noop.apply_async((1,), key=7),
        tasks.noop.apply_async((1,), key=UUID(int=1)),
    )
    assert (number.job.key, unique.job.key) == ("7", str(UUID(int=1)))
    owner = Session(pk="k" * 255)
    tasks.noop.apply_async((1,), owner=owner)
    assert Job.objects.for_owner(owner).count() == 1
    with pytest.raises(ValueError, match="composite"):
        Job.objects.for_owner(Group(pk=(1, 2)))
    Job.objects.cancel("because\0")
    assert {job.error for job in Job.objects.all()} == {"because\\x00"}


@shared_task(base=JobTask, max_retries=None)
def never_gives_up():
    raise OSError("not yet")


@pytest.mark.unsound
def test_a_job_without_an_end_of_its_attempts_goes_on_at_the_largest_number_a_row_can_hold():
    job = never_gives_up.delay()
    for _ in range(3):
        Job.objects.filter(pk=job.id).update(attempts=32_767, due_at=timezone.now())
        drain()
        assert (job.job.state, job.job.attempts) == (State.SCHEDULED, 32_766)
    Job.objects.filter(pk=job.id).update(state=State.RUNNING, due_at=timezone.now())
    fire_timers()
    assert job.job.state == State.QUEUED
