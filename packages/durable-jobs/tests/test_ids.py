"""The id given to a call is its result's and its request's, and finds the job."""

from uuid import UUID, uuid4

import pytest
from celery import shared_task, signals
from celery.result import AsyncResult
from django.core.management import call_command
from django.db import connection, transaction

from durable_jobs import Job, JobTask
from durable_jobs.publisher import hint_headers, publisher
from durable_jobs.testing import drain
from tests import tasks
from tests.conftest import wait_until

pytestmark = pytest.mark.usefixtures("jobs_db")
SENT, SEEN = [], []


@pytest.fixture
def sent(monkeypatch):
    SENT.clear()
    SEEN.clear()
    monkeypatch.setattr(publisher, "send", SENT.extend)
    monkeypatch.setattr(publisher, "later", lambda hints, seconds: None)


@shared_task(base=JobTask, bind=True, ignore_result=False)
def see(self, again=False):
    SEEN.append((self.request.id, self.request.root_id, self.request.correlation_id))
    if again and self.request.retries == 0:
        raise self.retry(args=[True], countdown=0)
    return self.request.id


GIVEN = [uuid4().hex, str(uuid4()), "import-42", "Ünïcode id " * 20, uuid4()]


@pytest.mark.parametrize("given", GIVEN, ids=range(len(GIVEN)))
def test_the_id_given_is_the_results_and_the_requests_and_finds_the_job(given, sent, capsys):
    told = []
    remember = lambda task_id, **_: told.append(task_id)  # noqa: E731
    signals.task_prerun.connect(remember)
    result = see.apply_async((True,), task_id=given)
    headers = hint_headers(SENT)
    drain(everything=True)
    signals.task_prerun.disconnect(remember)
    text = str(given)
    assert result.id == headers["id"] == headers["root_id"] == text
    assert [(text, text, text)] * 2 == SEEN
    assert told == [text, text]
    assert result.get() == text
    assert see.AsyncResult(text).job.pk == UUID(headers["durable_jobs"][0])
    assert result.job.pk.version == 7
    call_command("jobs", "show", text)
    assert str(result.job.pk) in capsys.readouterr().out


def test_a_second_call_with_an_id_runs_too_and_leaves_the_transaction_alone(sent):
    with transaction.atomic():
        for again in (False, False):
            see.apply_async((again,), task_id="import-42")
        tasks.noop.delay()
    drain()
    assert [seen[0] for seen in SEEN] == ["import-42"] * 2
    jobs = Job.objects.with_id("import-42").order_by("created_at", "pk")
    assert jobs.count() == 2
    assert see.AsyncResult("import-42").job.state == Job.State.SUCCEEDED


def test_a_call_that_is_merged_by_its_key_has_the_id_of_the_job_there_is(sent):
    first = see.apply_async(task_id="one", key="same")
    again = see.apply_async(task_id="two", key="same")
    assert again.job.pk == first.job.pk
    assert not Job.objects.with_id("two").exists()


def test_revoke_finds_the_job_by_the_id_given_and_through_the_index(sent):
    see.apply_async(task_id="import-42").revoke()
    assert Job.objects.get().state == Job.State.CANCELLED
    with connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        plan = Job.objects.with_id(str(uuid4())).explain()
        cursor.execute("SET enable_seqscan = on")
    assert "durable_job_given_id" in plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("wrong", ["i" * 256, "a\0b", 42])
def test_an_id_that_no_row_can_hold_is_refused(wrong, sent):
    with pytest.raises((TypeError, ValueError), match="id"):
        see.apply_async(task_id=wrong)
    assert not Job.objects.exists()


def test_a_worker_names_the_job_by_the_id_given(start_worker):
    worker = start_worker()
    result = tasks.add.apply_async((1, 2), task_id="import-42")
    assert result.get(timeout=30) == 3
    wait_until(lambda: "[import-42] succeeded" in worker.log.read_text())
    assert "[import-42] received" in worker.log.read_text()
    assert isinstance(result, AsyncResult)
