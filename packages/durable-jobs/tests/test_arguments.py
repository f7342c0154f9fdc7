"""What reaches the body is what Celery would have sent, and what no row can hold is refused."""

from datetime import UTC, datetime, timedelta

import pytest
from celery import shared_task, signals
from django.db import connection, transaction
from django.db.models import Count
from kombu.utils.json import dumps
from pydantic import BaseModel

from durable_jobs import Job, JobTask, Unsupported
from durable_jobs.publisher import publisher
from durable_jobs.testing import drain

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")
SEEN = []


class Order(BaseModel):
    number: int


@pytest.fixture(autouse=True)
def unsent(monkeypatch):
    SEEN.clear()
    monkeypatch.setattr(publisher, "send", list)
    monkeypatch.setattr(publisher, "later", lambda hints, seconds: None)


@shared_task(base=JobTask)
def see(*args, **kwargs):
    SEEN.append((args, kwargs))


@shared_task(base=JobTask, bind=True)
def see_again(self, *args, **kwargs):
    SEEN.append((args, kwargs))
    if self.request.retries == 0:
        raise self.retry(args=["new"], kwargs={"b": 1}, countdown=0)


@shared_task(base=JobTask, bind=True, ignore_result=False)
def echo(self, *args, **kwargs):
    SEEN.append((args, kwargs))
    if self.request.retries == 0:
        raise self.retry(args=list(args), kwargs=kwargs, countdown=0)
    return [list(args), kwargs]


@shared_task(base=JobTask, pydantic=True, bind=True, ignore_result=False)
def order(self, order: Order) -> Order:
    SEEN.append(order)
    if self.request.retries == 0 and order.number == 1:
        raise self.retry(args=[Order(number=2)], countdown=0)
    return order


@pytest.fixture
def receiver():
    """Connect a receiver of `before_task_publish` for one test."""
    connected = []

    def connect(function):
        signals.before_task_publish.connect(function)
        connected.append(function)

    yield connect
    for function in connected:
        signals.before_task_publish.disconnect(function)


def test_a_change_of_the_body_before_it_is_published_reaches_the_task(receiver):
    receiver(lambda body, **_: body[1].update(tenant="acme"))
    with transaction.atomic():
        see.delay(1, x=2)
        see_again.delay()
        see.enqueue_many([[1], {"x": 2}])
    drain(everything=True)
    assert sorted(SEEN, key=str) == [
        (("new",), {"b": 1, "tenant": "acme"}),
        ((), {"tenant": "acme"}),
        ((), {"x": 2, "tenant": "acme"}),
        ((1,), {"tenant": "acme"}),
        ((1,), {"x": 2, "tenant": "acme"}),
    ]


def test_a_callback_that_a_receiver_adds_is_refused_and_not_dropped(receiver):
    receiver(lambda body, **_: body[2].update(callbacks=[see.si()]))
    with pytest.raises(Unsupported, match="callbacks"):
        see.delay()
    assert not Job.objects.exists()


def test_pydantic_models_are_arguments_results_and_arguments_of_a_retry():
    order.delay(Order(number=1))
    order.enqueue_many([[Order(number=3)], {"order": Order(number=4)}])
    drain(everything=True)
    assert sorted(seen.number for seen in SEEN) == [1, 2, 3, 4]
    assert sorted(job.result["number"] for job in Job.objects.all()) == [2, 3, 4]


ODD = ({"id": 3, "b": 1, "a": 2, "nested": {"z": 1, "y": [1e16, -0.0]}}, 1e16, -0.0, 2**70, "é\\")
NAMED = {"z": 1, "a": 4.0, "long name": 1e-7}


@pytest.mark.parametrize("many", [False, True])
def test_arguments_of_calls_and_retries_and_results_are_those_of_the_json_that_was_sent(many):
    if many:
        Job.objects.all().delete()
        echo.enqueue_many([ODD])
        sent, named = dumps(ODD), "{}"
    else:
        echo.apply_async(ODD, NAMED)
        sent, named = dumps(ODD), dumps(NAMED)
    drain(everything=True)
    assert [(dumps(args), dumps(kwargs)) for args, kwargs in SEEN] == [(sent, named)] * 2
    with connection.cursor() as cursor:
        cursor.execute("SELECT args::text, kwargs::text, result::text FROM durable_jobs_job")
        assert cursor.fetchall() == [(sent, named, f"[{sent}, {named}]")]
    job = Job.objects.get()
    assert [dumps(value) for value in (job.args, job.kwargs, job.result)] == [
        *(sent, named),
        f"[{sent}, {named}]",
    ]
    assert dumps(echo.AsyncResult(str(job.pk)).get()) == f"[{sent}, {named}]"


def test_jobs_are_found_grouped_and_saved_by_their_arguments():
    see.delay({"b": 1, "a": 2}, x=1)
    jobs = Job.objects.filter(args=[{"a": 2, "b": 1}], kwargs__x=1, args__0__a=2)
    assert [job.pk for job in jobs] == [job.pk for job in jobs.distinct().order_by("args")]
    assert (
        jobs.filter(args__contains=[{"a": 2}], kwargs__has_key="x", result=None).exists() is False
    )
    assert jobs.filter(args__contains=[{"a": 2}], kwargs__has_key="x", result__isnull=True).exists()
    assert jobs.annotate(n=Count("pk")).get().n == 1
    assert list(jobs.values_list("args__0__b", "kwargs")) == [(1, {"x": 1})]
    assert list(jobs.values("args").annotate(n=Count("pk")).values_list("n", flat=True)) == [1]
    assert dumps(list(jobs.values_list("args", flat=True))) == '[[{"b": 1, "a": 2}]]'
    job = jobs.get()
    job.args = [{"z": 1, "y": 1e16}]
    job.save()
    job.refresh_from_db()
    Job.objects.filter(pk=job.pk).update(kwargs={"z": 1, "a": 2})
    copied = Job.objects.raw("SELECT * FROM durable_jobs_job")[0]
    assert (dumps(job.args), copied.pk) == ('[{"z": 1, "y": 1e+16}]', job.pk)
    assert dumps(Job.objects.defer("args").get().kwargs) == '{"z": 1, "a": 2}'


@pytest.mark.parametrize("use_tz", [True, False])
def test_a_time_without_zone_is_utc_as_it_is_for_celery(use_tz, settings):
    settings.TIME_ZONE, settings.USE_TZ = "America/New_York", use_tz
    when = (datetime.now(UTC) + timedelta(hours=2)).replace(tzinfo=None)
    for naive in (when, when.isoformat()):
        see.apply_async(eta=naive, expires=naive)
    see.enqueue_many([[1]], eta=when, expires=when)
    with connection.cursor() as cursor:
        cursor.execute("SELECT due_at - now(), expires_at - now() FROM durable_jobs_job")
        spans = [span for row in cursor.fetchall() for span in row]
    assert len(spans) == 6
    assert all(timedelta(hours=1) < span <= timedelta(hours=2) for span in spans)
