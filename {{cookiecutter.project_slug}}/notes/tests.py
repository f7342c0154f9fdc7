"""The notes: the page, the copies, and what the person hears of them."""

from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from durable_jobs import Job
from durable_jobs.testing import drain

from notes import tasks
from notes.models import Copy, Note

pytestmark = pytest.mark.django_db(transaction=True)
FORM = {"text": "Keep me", "copies_wanted": 3, "seconds_per_copy": 0}


@pytest.fixture(autouse=True)
def developing(settings) -> None:
    settings.DEBUG = True


@pytest.fixture
def note() -> Note:
    return Note.objects.create(**FORM)


def made() -> list[int]:
    return list(Copy.objects.values_list("number", flat=True))


def said(client: Client, note: Note) -> dict[str, object]:
    """Return what the page is told about a note."""
    return client.get(reverse("notes:state")).json()[str(note.pk)]


def test_saved_note_has_a_job_that_makes_its_copies(client: Client) -> None:
    assert client.post(reverse("notes:index"), FORM).status_code == 302
    job = Job.objects.get()
    assert (job.owner, job.state) == (Note.objects.get(), Job.State.QUEUED)
    assert made() == []
    assert drain() == 1
    assert made() == [1, 2, 3]


def test_note_that_is_rolled_back_leaves_no_job(client: Client, monkeypatch) -> None:
    def fail_after(note: Note) -> None:
        tasks.ask_for_copies(note)
        raise RuntimeError("before the commit")

    monkeypatch.setattr("notes.views.ask_for_copies", fail_after)
    with pytest.raises(RuntimeError):
        client.post(reverse("notes:index"), FORM)
    assert not Note.objects.exists()
    assert not Job.objects.exists()


def test_copy_is_made_once_however_often_its_job_runs(note: Note) -> None:
    tasks.make_copy(note.pk, 2)
    for _ in range(3):
        tasks.make_copies(note.pk)
        assert tasks.make_copy(note.pk, 1)
    assert made() == [1, 2, 3]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("UPDATE notes_note SET copies_wanted = 5", [1, 2, 3, 4, 5]),
        ("DELETE FROM notes_copy WHERE number = 2", [1, 2, 3]),
        ("DELETE FROM durable_jobs_job", [1, 2, 3]),
    ],
)
def test_reconciler_repairs_what_was_changed_by_sql(
    settings, note: Note, sql: str, expected: list[int]
) -> None:
    settings.DURABLE_JOBS = {"TICK": 0}
    assert drain(reconcile=True) == 1
    with connection.cursor() as cursor:
        cursor.execute(sql)
    drain(reconcile=True)
    assert made() == expected
    assert drain(reconcile=True) == 0


def test_deleted_note_takes_its_jobs_with_it(client: Client, note: Note) -> None:
    tasks.ask_for_copies(note)
    kept = Note.objects.create(**FORM)
    tasks.ask_for_copies(kept)
    client.post(reverse("notes:delete", args=[note.pk]))
    assert [job.owner for job in Job.objects.all()] == [kept]
    tasks.make_copies(note.pk)
    assert not Copy.objects.exists()


def test_person_is_told_of_an_error_that_will_be_tried_again(
    client: Client, note: Note, monkeypatch
) -> None:
    tasks.ask_for_copies(note)
    with monkeypatch.context() as broken:
        broken.setattr(tasks, "make_copy", lambda *args: 1 / 0)
        drain()
    assert Job.objects.get().due_at > timezone.now()
    Job.objects.update(due_at=timezone.now() + timedelta(seconds=61))
    assert said(client, note)["job"] in {
        f"failed, attempt 2 of 8 in {seconds} s: division by zero" for seconds in (60, 61)
    }
    drain(everything=True)
    assert made() == [1, 2, 3]


def test_person_is_told_of_an_error_for_good_and_may_try_again(client: Client, note: Note) -> None:
    Note.objects.update(text="Do not copy me")
    tasks.ask_for_copies(note)
    assert drain() == 1
    told = said(client, note)
    assert told["job"] == "failed for good: the note says that it must not be copied"
    assert told["failed"]
    assert drain(reconcile=True) == 0, "it rests before the system tries again"
    Note.objects.update(text="Copy me")
    client.post(reverse("notes:retry", args=[note.pk]))
    assert not said(client, note)["failed"]
    drain()
    assert made() == [1, 2, 3]
