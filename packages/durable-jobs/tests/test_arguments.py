"""What reaches the body is what Celery would have sent, and what no row can hold is refused."""

import pytest
from celery import shared_task, signals
from django.db import transaction
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
