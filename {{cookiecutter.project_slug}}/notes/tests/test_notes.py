"""The notes: the page, the copies, and what happens when things go wrong in between."""

import pytest
from celery import current_app
from django.test import Client
from django.urls import reverse

from notes.models import Copy, Note
from notes.tasks import make_copy

pytestmark = pytest.mark.django_db

FORM = {"text": "Keep me", "copies_wanted": 3, "seconds_per_copy": 0}


@pytest.fixture(autouse=True)
def developing(settings) -> None:
    settings.DEBUG = True


@pytest.fixture
def note() -> Note:
    return Note.objects.create(**FORM)


def test_saved_note_asks_for_its_copies_after_the_commit(
    client: Client, monkeypatch, django_capture_on_commit_callbacks
) -> None:
    sent = []
    monkeypatch.setattr(make_copy, "delay", lambda *args: sent.append(args))
    with django_capture_on_commit_callbacks(execute=False) as callbacks:
        assert client.post(reverse("notes:index"), FORM).status_code == 302
    assert sent == []
    callbacks[0]()
    assert sent == [(Note.objects.get().pk, number) for number in (1, 2, 3)]


def test_copy_is_made_once_however_often_its_task_runs(note: Note) -> None:
    for _ in range(3):
        make_copy(note.pk, 2)
    assert [(copy.number, copy.text) for copy in Copy.objects.all()] == [(2, "Keep me")]
    assert note.missing() == [1, 3]


def test_copy_has_the_text_of_the_moment_it_is_made(note: Note) -> None:
    Note.objects.update(text="Changed since")
    make_copy(note.pk, 1)
    assert Copy.objects.get().text == "Changed since"


def test_copies_of_a_deleted_note_are_not_made(client: Client, note: Note) -> None:
    client.post(reverse("notes:delete", args=[note.pk]))
    make_copy(note.pk, 1)
    assert not Copy.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_note_is_kept_and_the_person_told_when_the_broker_is_down(
    client: Client, monkeypatch, free_port: int
) -> None:
    monkeypatch.setattr(current_app.conf, "broker_write_url", f"redis://127.0.0.1:{free_port}/0")
    # a new pool of connections, which no other test has opened
    monkeypatch.setattr(current_app.amqp, "_producer_pool", None)
    monkeypatch.setattr(current_app, "_pool", None)
    page = client.post(reverse("notes:index"), FORM, follow=True)
    assert "the broker cannot be reached" in page.content.decode()
    assert Note.objects.count() == 1


def test_missing_copies_can_be_asked_for_again(client: Client, monkeypatch, note: Note) -> None:
    make_copy(note.pk, 2)
    sent = []
    monkeypatch.setattr(make_copy, "delay", lambda *args: sent.append(args))
    client.post(reverse("notes:resume", args=[note.pk]))
    assert sent == [(note.pk, 1), (note.pk, 3)]


def test_state_names_the_copies_that_exist(client: Client, note: Note) -> None:
    make_copy(note.pk, 3)
    answer = client.get(reverse("notes:state")).json()
    assert answer == {str(note.pk): {"wanted": 3, "made": [3]}}


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
