"""More about the notes of a bake, copied into one by `tests/test_bake.py` and run there."""

import pytest
from django.test import Client
from django.urls import reverse
from notes import tasks
from notes.models import Copy, Note
from notes.tests import FORM, made, said

from durable_jobs import Job
from durable_jobs.testing import drain

pytestmark = pytest.mark.django_db(transaction=True)


def test_note_whose_job_waits_gets_no_second_one(note: Note) -> None:
    for _ in range(3):
        tasks.ask_for_copies(note)
    assert Job.objects.count() == 1


def test_copy_has_the_text_of_the_moment_it_is_made(note: Note) -> None:
    tasks.ask_for_copies(note)
    Note.objects.update(text="Changed since")
    drain()
    assert {copy.text for copy in Copy.objects.all()} == {"Changed since"}


def test_long_work_is_cut_into_runs(note: Note, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "RUN_SECONDS", 0)
    tasks.ask_for_copies(note)
    assert drain() == 4
    assert made() == [1, 2, 3]
    assert Job.objects.get().state == Job.State.SUCCEEDED


def test_person_sees_copies_and_progress(client: Client, note: Note) -> None:
    tasks.ask_for_copies(note)
    tasks.make_copy(note.pk, 3)
    expected = {"wanted": 3, "made": [3], "job": "waiting for a worker", "failed": False}
    assert said(client, note) == expected
    Job.objects.update(state=Job.State.RUNNING, progress=33)
    assert said(client, note)["job"] == "running, 33 %"
    Job.objects.update(state=Job.State.QUEUED)
    drain()
    assert said(client, note) == {"wanted": 3, "made": [1, 2, 3], "job": "", "failed": False}


def test_page_asks_once_for_all_notes(client: Client, django_assert_num_queries) -> None:
    for _ in range(5):
        tasks.ask_for_copies(Note.objects.create(**FORM))
    said(client, Note.objects.first())
    with django_assert_num_queries(3):
        client.get(reverse("notes:state"))


@pytest.mark.parametrize("copies", [0, 1_001, -1, "many"])
def test_absurd_number_of_copies_is_refused(client: Client, copies: object) -> None:
    page = client.post(reverse("notes:index"), FORM | {"copies_wanted": copies})
    assert page.status_code == 200
    assert 'class="errorlist"' in page.content.decode()
    assert not Note.objects.exists()


def test_text_of_a_note_is_escaped(client: Client, note: Note) -> None:
    Note.objects.update(text="<script>alert(1)</script>")
    assert "<script>alert" not in client.get(reverse("notes:index")).content.decode()


def test_production_lets_only_staff_in(client: Client, admin_client: Client, settings) -> None:
    settings.DEBUG = False
    settings.SECURE_SSL_REDIRECT = False
    assert client.get(reverse("notes:index")).status_code == 302
    assert client.post(reverse("notes:index"), FORM).status_code == 302
    assert not Note.objects.exists()
    assert admin_client.get(reverse("notes:index")).status_code == 200
