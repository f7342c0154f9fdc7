"""Notes through outages: a broker of our own that is really stopped, and real workers."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.test import Client
from django.urls import reverse
from notes.models import Copy, Note
from notes.tasks import ask_for_copies
from notes.tests import FORM

from devstack import processes, valkey
from durable_jobs import Job
from durable_jobs.publisher import publisher

from .conftest import running_worker, wait_until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def broker(
    tmp_path: Path, monkeypatch, project_environment: dict[str, str]
) -> Iterator[processes.Process]:
    """A broker of this test alone, which this process and its workers use."""
    process, url = valkey.process(tmp_path / "valkey")
    project_environment["CELERY_BROKER_URL"] = url
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", url)
    publisher.reset()  # it remembers the broker of the test before
    process.start()
    processes.wait_until_ready([process])
    yield process
    processes.stop([process])
    publisher.reset()


def test_note_saved_while_the_broker_is_down_gets_its_copies_once_it_is_back(
    client: Client, tmp_path: Path, broker, project_environment: dict[str, str]
) -> None:
    with running_worker(tmp_path / "worker.log", project_environment, "-c", "1", "-Q", "default"):
        processes.stop([broker])
        began = time.monotonic()
        page = client.post(reverse("notes:index"), FORM)
        assert (page.status_code, time.monotonic() - began < 1) == (302, True)
        wait_until(lambda: publisher.failures, what="the broker is missed")
        (state,) = client.get(reverse("notes:state")).json().values()
        assert (state["made"], state["job"]) == ([], "waiting for a worker")
        broker.start()
        wait_until(lambda: Copy.objects.count() == 3, 60, "the copies are made")
        wait_until(lambda: Job.objects.get().state == Job.State.SUCCEEDED)


def test_running_job_of_a_deleted_note_ends_and_leaves_nothing(
    client: Client, tmp_path: Path, broker, project_environment: dict[str, str]
) -> None:
    options = "-c", "1", "-Q", "default"
    with running_worker(tmp_path / "worker.log", project_environment, *options) as worker:
        note = Note.objects.create(**FORM | {"copies_wanted": 100, "seconds_per_copy": 0.2})
        ask_for_copies(note)
        wait_until(Copy.objects.exists, what="a copy is made")
        client.post(reverse("notes:delete", args=[note.pk]))
        after = Note.objects.create(**FORM)
        ask_for_copies(after)
        wait_until(lambda: Copy.objects.count() == 3, 10, "the worker is free again")
        assert "Traceback" not in worker.read_text()
    assert {job.owner for job in Job.objects.all()} == {after}
