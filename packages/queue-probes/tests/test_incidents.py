"""People hear of a late queue once, and once that it moves again."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import django
import pytest
from celery import current_app
from django.core import mail
from django.db import connection
from django.db.models.functions import Now
from django.test import Client

from queue_probes import incidents
from queue_probes.conf import queues
from queue_probes.models import Queue
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def webhook():
    """Return a real HTTP server: its `url`, what it was `told`, and the `status` it answers."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.told.append(json.loads(body))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        server.told, server.status = [], 200
        server.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def late(settings, monkeypatch, webhook):
    """One queue that beat has just looked at, whose probe has been on its way for too long."""
    monkeypatch.setattr(incidents, "BEGAN", 0.0)
    settings.QUEUE_PROBES = {"QUEUES": ["mail"], "WEBHOOK": webhook.url, "THRESHOLD": 30}
    settings.ADMINS = ["a@b.c"] if django.VERSION >= (6,) else [("Ops", "a@b.c")]
    row = Queue.objects.create(name="mail")
    Queue.objects.update(seen_at=Now(), outstanding_since=ago(31))
    return row


def ago(seconds):
    return Now() - timedelta(seconds=seconds)


def test_one_mail_and_one_post_though_many_look_at_once(late, webhook):
    def look(_):
        try:
            incidents.tell()
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(24)))
    assert [message.subject for message in mail.outbox] == ["[Django] queue mail does not move"]
    assert "no worker serves it" in mail.outbox[0].body
    [post] = webhook.told
    assert (post["queue"], post["state"], post["threshold"]) == ("mail", "no_worker", 30)
    assert post["text"] == "queue mail does not move: no worker serves it"


def test_the_recovery_is_told_once_as_well(late, webhook):
    incidents.tell()
    Queue.objects.update(outstanding_since=None)
    for _ in range(3):
        incidents.tell()
    assert [message.subject for message in mail.outbox] == [
        "[Django] queue mail does not move",
        "[Django] queue mail moves again",
    ]
    assert [post["state"] for post in webhook.told] == ["no_worker", "ok"]


def test_another_reason_for_the_same_incident_is_no_news(late, webhook):
    incidents.tell()
    Queue.objects.update(seen_at=ago(100))
    incidents.tell()
    assert [post["state"] for post in webhook.told] == ["no_worker"]


def test_one_way_that_fails_neither_keeps_the_other_from_telling_nor_has_it_tell_again(
    late, webhook, settings
):
    webhook.status = 500
    for _ in range(5):
        incidents.tell()
    gc.collect()  # a socket left open would say so here
    assert (len(mail.outbox), len(webhook.told)) == (1, 1)
    Queue.objects.update(outstanding_since=None)
    settings.ADMINS = []
    webhook.status = 200
    incidents.tell()
    assert [post["state"] for post in webhook.told] == ["no_worker", "ok"]


def test_what_somebody_was_telling_when_it_died_is_told_by_another(late, webhook):
    claimed = {"alarm": "no_worker", "alarm_before": "", "told": False}
    Queue.objects.update(**claimed, alarmed_at=ago(30))
    incidents.tell()
    assert webhook.told == []  # it may still be at it
    Queue.objects.update(alarmed_at=ago(61))
    incidents.tell()
    incidents.tell()
    assert [post["state"] for post in webhook.told] == ["no_worker"]


def test_a_mail_server_that_hangs_holds_up_no_answer(late, webhook, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(incidents, "mail_admins", lambda *_: hangs.wait(30))
    for _ in range(6):
        begin = time.monotonic()
        assert Client().get("/healthz/queues").json()["queues"]["mail"]["state"] == "no_worker"
        assert Client().get("/healthz/ready").status_code == 200
        assert time.monotonic() - begin < 2
    hangs.set()
    wait_until(lambda: Queue.objects.get().told, 10)
    wait_until(lambda: not incidents.teller.lock.locked(), 10)
    assert [post["state"] for post in webhook.told] == ["no_worker"]


def test_a_process_that_could_start_no_thread_tells_when_it_can(late, webhook):
    before = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        incidents.teller.look()
    finally:
        threading.stack_size(before)
    incidents.teller.look()
    wait_until(lambda: webhook.told, 10)
    wait_until(lambda: not incidents.teller.lock.locked(), 10)


def test_what_could_not_be_told_is_told_later(late, webhook, caplog, settings):
    settings.ADMINS = []
    webhook.status = 500
    incidents.tell()
    assert "nobody could be told of mail" in caplog.text
    webhook.status = 200
    incidents.tell()
    incidents.tell()
    assert len(webhook.told) == 2  # the one that was refused, and the one that was not


def test_a_process_that_has_just_started_tells_nobody(late, webhook, monkeypatch):
    monkeypatch.setattr(incidents, "BEGAN", time.monotonic())
    incidents.tell()
    assert (incidents.news(), webhook.told) == ([], [])


def test_a_token_keeps_others_out(late, settings):
    settings.QUEUE_PROBES = {**settings.QUEUE_PROBES, "TOKEN": "secret"}
    for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer geheim-ü"}):
        assert Client(headers=wrong).get("/healthz/queues").status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert Client(headers=right).get("/healthz/queues").status_code == 503


def test_a_queue_that_nobody_has_ever_looked_at_is_late_and_told(settings, webhook, monkeypatch):
    monkeypatch.setattr(incidents, "BEGAN", 0.0)
    settings.QUEUE_PROBES = {"QUEUES": ["new"], "WEBHOOK": webhook.url}
    for _ in range(3):
        incidents.tell()
    assert [post["state"] for post in webhook.told] == ["beat_dead"]
    answer = Client().get("/healthz/queues")
    assert (answer.status_code, answer.json()["queues"]["new"]["state"]) == (503, "beat_dead")


def test_a_queue_that_a_process_made_on_the_fly_is_not_probed(settings, monkeypatch):
    settings.QUEUE_PROBES = {}
    before = queues()
    known = current_app.amqp.queues
    monkeypatch.setattr(known, "create_missing", True)
    monkeypatch.delitem(known, "fly", raising=False)
    known["fly"]
    assert queues() == before
