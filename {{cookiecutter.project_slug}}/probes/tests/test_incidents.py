"""People hear of a late queue once, and once that it moves again."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import django
import pytest
from django.core import mail
from django.db import connection
from django.db.models.functions import Now
from django.test import Client

from probes import incidents
from probes.models import Queue

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
    settings.PROBES = {"QUEUES": ["mail"], "WEBHOOK": webhook.url, "THRESHOLD": 30}
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


def test_what_could_not_be_told_is_told_later(late, webhook, caplog):
    webhook.status = 500
    incidents.tell()
    assert "nobody could be told of mail" in caplog.text
    webhook.status = 200
    incidents.tell()
    incidents.tell()
    assert len(webhook.told) == 2  # the one that was refused, and the one that was not


def test_a_process_that_has_just_started_tells_nobody(late, webhook, monkeypatch):
    monkeypatch.setattr(incidents, "BEGAN", time.monotonic())
    [verdict] = incidents.tell()
    assert (verdict.state, webhook.told) == ("no_worker", [])


def test_a_token_keeps_others_out(late, settings):
    settings.PROBES = {**settings.PROBES, "TOKEN": "secret"}
    for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer geheim-ü"}):
        assert Client(headers=wrong).get("/healthz/queues").status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert Client(headers=right).get("/healthz/queues").status_code == 503


def test_a_queue_that_nobody_has_ever_looked_at_is_late(settings):
    settings.PROBES = {"QUEUES": ["new"]}
    answer = Client().get("/healthz/queues")
    assert (answer.status_code, answer.json()["queues"]["new"]["state"]) == (503, "beat_dead")
