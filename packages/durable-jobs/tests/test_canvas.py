"""A durable task in a canvas: it works, or the caller is told before anything was sent."""

import uuid

import pytest
from celery import chain, chord, current_app, group, signals

from durable_jobs import Job, Unsupported
from durable_jobs.publisher import publisher
from durable_jobs.testing import drain
from tests import celery_tasks as tasks

plain, record = tasks.plain_add, tasks.record
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture
def sent(monkeypatch, broker):
    """Return the names of the messages that callers have sent, and keep hints from the broker."""
    names = []

    def remember(sender, **_):
        names.append(sender)

    monkeypatch.setattr(publisher, "send", lambda hints: list(hints))
    signals.before_task_publish.connect(remember)
    yield names
    signals.before_task_publish.disconnect(remember)


REFUSED = {
    "first of a chain": lambda: chain(record.si(1), plain.si(1, 1)),
    "middle of a chain": lambda: chain(plain.si(1, 1), record.s(), plain.si(1, 1)),
    "middle, written with |": lambda: plain.s(1, 1) | record.s() | record.s(),
    "a chain in a chain": lambda: plain.s(1, 1) | chain(record.s(), plain.si(2, 2)),
    "in a group": lambda: group(record.si(1), plain.si(1, 1)),
    "in a group, by generator": lambda: group(record.si(number) for number in range(3)),
    "end of a chain in a group": lambda: group([plain.s(1, 1) | record.s()]),
    "in the header of a chord": lambda: chord([plain.si(1, 1), record.si(1)], plain.si(1, 1)),
    "link": lambda: record.si(1).set(link=[plain.si(1, 1)]),
    "link_error": lambda: record.si(1).on_error(plain.si(1, 1)),
    "link_error of a chain": lambda: chain(
        plain.s(1, 1), record.s(), link_error=[plain.si(1, 1)]
    ).set(link_error=[plain.si(1, 1)]),
    "a copy that was stored": lambda: current_app.signature(
        dict(plain.s(1, 1) | record.s() | record.s())
    ),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_a_canvas_that_could_lose_a_job_is_built_and_refused_when_it_is_called(build, sent):
    canvas = build()
    with pytest.raises(Unsupported, match="does not take"):
        canvas.apply_async()
    assert (Job.objects.count(), sent) == (0, [])


@pytest.mark.parametrize("name", ["map", "starmap"])
def test_map_and_chunks_are_refused_because_one_message_would_hold_all_calls(name):
    with pytest.raises(Unsupported, match="enqueue_many"):
        getattr(record, name)([1, 2])
    with pytest.raises(Unsupported, match="enqueue_many"):
        record.chunks([(1,), (2,)], 1)


def test_a_task_does_not_replace_itself(monkeypatch):
    job = record.delay(1)
    monkeypatch.setattr(record, "run", lambda *_: record.replace(plain.si(1, 1)))
    drain()
    assert "does not take replace()" in job.job.error


def test_canvases_of_plain_tasks_stay_as_they_are(sent):
    chain(plain.s(1, 1), plain.s(2)).apply_async()
    group(plain.s(1, 1), plain.s(2, 2)).skew()
    assert plain.map([(1, 2)]).name == "celery.map"
    assert sent == [plain.name]


def test_a_signature_can_be_cloned_stored_frozen_and_called(sent):
    signature = record.s(2).set(priority=3)
    stored = current_app.signature(dict(signature.clone((1,))))
    given = str(uuid.uuid4())
    assert stored.freeze(given).id == given
    assert stored.freeze().id == given
    assert stored.delay().id == given
    row = Job.objects.get()
    assert (row.task_id, row.args, row.options["priority"]) == (given, [1, 2], 3)
