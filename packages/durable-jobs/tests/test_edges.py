"""Unusual calls, bodies and values: each ends, and says why."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta

import pytest
from asgiref.sync import async_to_sync
from celery import current_app, shared_task
from celery.exceptions import Ignore
from django.contrib.auth.models import Group
from django.db import transaction
from django.utils import timezone

from durable_jobs import Job, JobTask
from durable_jobs.publisher import publisher
from durable_jobs.reconcile import fire_timers
from durable_jobs.testing import drain
from tests import tasks
from tests.conftest import WORK, effects, wait_until
from tests.tasks import effect

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture(autouse=True)
def unsent(monkeypatch):
    monkeypatch.setattr(publisher, "send", lambda _: None)
    monkeypatch.setattr(publisher, "later", lambda *_: None)


@shared_task(base=JobTask, bind=True, max_retries=5)
def poll(self, attempt=0):
    effect(self.request.id, f"poll {attempt}")
    if attempt < 2:
        raise self.retry(kwargs={"attempt": attempt + 1}, countdown=0)


@shared_task(base=JobTask, bind=True, autoretry_for=(OSError,), max_retries=3)
def pay(self):
    effect(self.request.id, "pay")
    raise OSError("gone")


@shared_task(base=JobTask, bind=True)
def elsewhere(self, **options):
    if self.request.retries == 0:
        raise self.retry(countdown=0, **options)


@shared_task(base=JobTask, bind=True)
def retries_with_a_model(self, group=None):
    raise self.retry(args=[Group(pk=1)], countdown=0)


@shared_task(base=JobTask, bind=True, atomic=True)
def ignored(self):
    effect(self.request.id, "ignored")
    raise Ignore


class CallsRun(JobTask):
    abstract = True

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


@shared_task(base=CallsRun, bind=True)
def own_call(self):
    effect(self.request.id, "own")


class BadHook(JobTask):
    abstract = True

    def before_start(self, *_):
        raise ValueError("bad hook")


@shared_task(base=BadHook, bind=True)
def hooked(self):
    effect(self.request.id, "hooked")


@shared_task(base=JobTask, bind=True, ignore_result=False)
def returns(self, kind):
    effect(self.request.id, "returns")
    values = {"nan": float("nan"), "nul": "a\0b", "surrogate": "\ud800x"}
    return values.get(kind) or {"day": date(2026, 1, 2), "text": "\\u0000 \U0001f600"}


@shared_task(base=JobTask, bind=True, max_attempts=1)
def raises(self, text):
    raise ValueError(text)


@shared_task(base=JobTask, bind=True)
def keys(self):
    async def awaited():
        await asyncio.sleep(0)
        return self.job.idempotency_key

    effect(self.request.id, self.job.idempotency_key)
    effect(self.request.id, async_to_sync(awaited)())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: self.job.idempotency_key).result()


@shared_task(base=JobTask, bind=True)
def waits(self, group):
    self.job.wait_for(Job.objects.for_owner(Group.objects.get(pk=group)), pause=0.01)
    effect(self.request.id, "waited")


@shared_task(base=JobTask, bind=True, key="once", rerun=False)
def once(self, number):
    effect(self.request.id, str(number))


@shared_task(base=JobTask, bind=True, atomic=True)
def bad_hook_on_commit(self):
    effect(self.request.id, "committed")
    transaction.on_commit(lambda: 1 / 0)


@shared_task(base=JobTask, bind=True)
def leaves_autocommit_off(self):
    effect(self.request.id, "kept")
    transaction.set_autocommit(False)
    effect(self.request.id, "not kept")


def expire(job):
    Job.objects.filter(pk=job.id).update(expires_at=timezone.now() - timedelta(seconds=1))


def row(job):
    return Job.objects.get(pk=getattr(job, "id", job))


def test_a_retry_may_name_what_was_positional():
    job = poll.delay(0)
    wait_until(lambda: drain() == 0)
    assert effects("poll") == ["poll 0", "poll 1", "poll 2"]
    assert (row(job).state, row(job).args, row(job).kwargs) == (State.SUCCEEDED, [2], {})


def test_a_retry_with_what_is_no_json_is_a_failed_attempt_that_says_so():
    job = retries_with_a_model.delay()
    drain()
    assert row(job).state == State.SCHEDULED
    assert "pass group.pk" in row(job).error


@pytest.mark.parametrize(("limit", "made"), [(1, 1), (2, 2), (6, 6), (None, 4)])
def test_the_attempts_of_a_call_are_those_of_its_retries(limit, made):
    job = pay.apply_async(max_attempts=limit)
    drain(everything=True)
    assert (row(job).state, effects("pay")) == (State.DEAD, ["pay"] * made)


def test_a_retry_may_change_the_queue_and_says_that_it_keeps_the_rest(caplog):
    job = elsewhere.delay()
    Job.objects.filter(pk=job.id).update(kwargs={"queue": "high", "priority": 3})
    drain()
    assert row(job).queue == "high"
    assert "keeps the call's priority" in caplog.text


def test_a_time_without_a_zone_is_local_for_retries_as_for_calls(settings):
    settings.TIME_ZONE = "Asia/Tokyo"
    timezone.get_default_timezone.cache_clear()
    soon = timezone.make_naive(timezone.now() + timedelta(minutes=5))
    try:
        job = elsewhere.delay()
        Job.objects.filter(pk=job.id).update(kwargs={"eta": soon.isoformat()})
        called = tasks.noop.apply_async(eta=soon)
        drain()
    finally:
        timezone.get_default_timezone.cache_clear()
    assert row(job).due_at == row(called).due_at


@pytest.mark.parametrize("options", [{"countdown": 1.7e12}, {"expires": 1.7e12}])
def test_times_in_milliseconds_are_refused_at_the_call(options):
    with pytest.raises(ValueError, match="it is in seconds"):
        tasks.noop.apply_async([1], **options)


@pytest.mark.parametrize("value", [float("nan"), "a\0b", "\ud800", {"a": ["\0"]}])
def test_arguments_that_postgresql_does_not_store_are_refused_and_the_transaction_lives(value):
    with transaction.atomic():
        with pytest.raises(TypeError, match="arguments must be JSON"):
            tasks.noop.delay(value)
        tasks.noop.delay("\\u0000 \U0001f600")
    drain()
    assert Job.objects.get().args == ["\\u0000 \U0001f600"]


@pytest.mark.parametrize("kind", ["nan", "nul", "surrogate"])
def test_a_result_that_cannot_be_kept_ends_the_job_at_once(kind):
    job = returns.delay(kind)
    drain(everything=True)
    assert (row(job).state, effects("returns")) == (State.DEAD, ["returns"])
    assert "it returned what is not JSON" in row(job).error


def test_a_result_comes_back_as_it_was_unless_the_call_wants_none():
    kept, dropped = returns.delay("value"), returns.apply_async(["nan"], ignore_result=True)
    (many,) = returns.enqueue_many([["nan"]], ignore_result=True)
    drain()
    assert kept.get(timeout=1) == {"day": date(2026, 1, 2), "text": "\\u0000 \U0001f600"}
    assert {row(job).state for job in (dropped, many)} == {State.SUCCEEDED}
    assert row(dropped).result is None


def test_an_error_keeps_its_class_whatever_its_text():
    odd, long = raises.delay("\\"), raises.delay("x" * 9000)
    Job.objects.filter(pk=odd.id).update(args=["odd"])
    drain()
    assert "ValueError: odd" in row(odd).error
    assert row(long).error.startswith("Traceback")
    assert "ValueError: xxx" in row(long).error
    assert len(row(long).error) <= 8000


def test_text_that_postgresql_does_not_store_is_spelled_out():
    from durable_jobs.values import describe

    error = describe(ValueError("a\0b \ud800"))
    assert r"ValueError: a\x00b \ud800" in error
    assert error.encode()


def test_ignore_in_an_atomic_task_commits_what_was_written():
    job = ignored.delay()
    drain()
    assert (row(job).state, effects()) == (State.SUCCEEDED, ["ignored"])


def test_a_body_that_is_never_reached_fails_and_says_why():
    own, hook = own_call.delay(), hooked.apply_async(max_attempts=2)
    drain(everything=True)
    assert (row(own).state, row(own).attempts) == (State.DEAD, 1)
    assert "call super().__call__(*args, **kwargs)" in row(own).error
    assert (row(hook).state, row(hook).attempts) == (State.DEAD, 2)
    assert "ValueError: bad hook" in row(hook).error


def test_the_idempotency_key_is_the_jobs_in_coroutines_and_refused_in_foreign_threads():
    first, second = keys.apply_async(max_attempts=1), keys.apply_async(max_attempts=1)
    drain()
    assert effects() == [f"job-{job.id}" for job in (first, first, second, second)]
    assert "hand it over" in row(first).error


def test_direct_calls_have_different_idempotency_keys():
    @shared_task(base=JobTask, bind=True)
    def told(self):
        assert self.job.idempotency_key == self.job.idempotency_key
        return self.job.idempotency_key

    assert told() != told()


def test_two_jobs_that_wait_for_all_jobs_of_an_owner_do_not_wait_for_each_other():
    owner = Group.objects.create(name="owner")
    for _ in range(2):
        waits.apply_async([owner.pk], owner=owner)
    drain(everything=True, limit=20)
    assert effects() == ["waited", "waited"]


@pytest.mark.parametrize("cancel", [True, False])
@pytest.mark.faults
def test_an_atomic_task_may_cancel_or_delete_its_own_job(crew, cancel, monkeypatch):
    monkeypatch.undo()
    crew(work=WORK)
    owner = Group.objects.create(name="owner")
    tasks.gives_up.apply_async([owner.pk, cancel], owner=owner)
    wait_until(lambda: effects() == ["gave up"], 10)
    wait_until(lambda: not Job.objects.unfinished().exists(), 10)
    found = list(Job.objects.values_list("state", "error"))
    assert found == ([(State.CANCELLED, "given up")] if cancel else [])


def test_what_raises_after_the_commit_is_logged(caplog):
    job = bad_hook_on_commit.delay()
    drain()
    assert (row(job).state, effects()) == (State.SUCCEEDED, ["committed"])
    assert "ZeroDivisionError" in caplog.text


def test_a_task_that_leaves_autocommit_off_ends_and_the_next_one_too():
    jobs = [leaves_autocommit_off.delay(), tasks.noop.delay(1)]
    drain()
    assert {row(job).state for job in jobs} == {State.SUCCEEDED}
    assert effects() == ["kept"]


def test_a_delayed_call_without_autocommit_is_taken():
    transaction.set_autocommit(False)
    try:
        tasks.noop.apply_async([1], countdown=60)
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert Job.objects.get().state == State.SCHEDULED


def test_a_job_that_expired_after_it_had_failed_runs_when_it_is_tried_again():
    job = tasks.fail_for_good.apply_async(expires=60)
    drain()
    expire(job)
    assert Job.objects.filter(pk=job.id).retry() == 1
    fire_timers()
    drain()
    assert (row(job).state, row(job).token) == (State.DEAD, 2)


def test_a_job_that_expires_while_it_backs_off_keeps_its_error():
    job = tasks.fail.apply_async(expires=60)
    drain()
    expire(job)
    Job.objects.update(due_at=timezone.now())
    fire_timers()
    assert row(job).state == State.CANCELLED
    assert "expired before its next attempt" in row(job).error
    assert "ValueError: boom" in row(job).error


def test_drain_cancels_what_has_expired():
    job = tasks.noop.apply_async([1], expires=-1)
    assert drain() == 0
    assert (row(job).state, row(job).error) == (State.CANCELLED, "expired before it started")


def test_an_expired_job_does_not_swallow_the_next_call_of_its_key():
    first = once.apply_async([1], expires=60)
    assert once.delay(2).id == first.id
    assert row(first).args == [1]
    expire(first)
    assert once.delay(3).id == first.id
    fire_timers()
    drain()
    assert (row(first).state, effects()) == (State.SUCCEEDED, ["3"])


def test_a_call_may_name_an_exchange_and_its_routing_key():
    job = tasks.noop.apply_async([1], exchange="high", routing_key="high")
    assert row(job).queue == "high"


def test_events_of_what_was_sent_hold_nothing():
    current_app.conf.task_send_sent_event = True
    try:
        tasks.noop.delay("x")
        tasks.noop.enqueue_many([["x"]])
    finally:
        current_app.conf.task_send_sent_event = False
    assert Job.objects.count() == 2
    assert not current_app.amqp._event_dispatcher._outbound_buffer


BACKEND = """
import django; django.setup()
from tests import tasks
from celery import current_app
print(type(current_app.backend).__name__)
tasks.add.delay(1, 2)
tasks.add.enqueue_many([[1, 2]])
"""


@pytest.mark.parametrize("backend", ["rpc://", "redis://127.0.0.1:1/0"])
def test_no_call_asks_a_result_backend_which_may_be_down(project_environment, backend):
    environment = {**project_environment, "CELERY_RESULT_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", BACKEND], env=environment, capture_output=True, text=True
    )
    kind = "RPCBackend" if backend == "rpc://" else "RedisBackend"
    assert done.returncode == 0, done.stderr
    assert kind in done.stdout.splitlines()
    assert Job.objects.count() == 2
