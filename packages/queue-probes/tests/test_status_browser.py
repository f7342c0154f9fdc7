"""The status page in a real browser: what is seen, at which width, and that Retry retries."""

import math
import os
import re
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.test import Client
from django.utils import timezone
from pytest_django.live_server_helper import LiveServer

from queue_probes.models import JobSample, Node, Queue, Sample
from tests import browser as browsers

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(not browsers.found(), reason="needs chromium or google-chrome on PATH"),
]
OWN = ("script-src", "style-src", "connect-src", "img-src")
POLICY = "default-src 'none'; " + "; ".join(f"{kind} 'self'" for kind in OWN)
LONG = "catalogue.synchronise_every_product_with_the_warehouse_of_the_supplier"


def strict(get_response):
    """A middleware: let the page load nothing but its own files, and nothing inline."""

    def answer(request):
        response = get_response(request)
        response["Content-Security-Policy"] = POLICY
        return response

    return answer


@pytest.fixture
def browser(tmp_path):
    browser = browsers.Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def server(settings):
    """A server of its own: that of the session has loaded its middleware before."""
    settings.MIDDLEWARE = [f"{__name__}.strict", *settings.MIDDLEWARE]
    settings.ALLOWED_HOSTS = ["127.0.0.1"]
    server = LiveServer("127.0.0.1")
    yield server.url
    server.stop()


@pytest.fixture
def page(browser, server):
    """Return a function that opens the page for an operator, and waits until it is drawn."""
    client = Client()
    client.force_login(User.objects.create_superuser("op"))
    cookie = client.cookies[django_settings.SESSION_COOKIE_NAME].value

    def open_page(**look):
        cookies = [(django_settings.SESSION_COOKIE_NAME, cookie)]
        browser.open(f"{server}/status/", cookies=cookies, **look)
        browser.until("document.querySelectorAll('#queues article').length === 4")
        return browser

    return open_page


@pytest.fixture
def busy():
    """A system in the middle of an incident: `low` has lost its worker, jobs run and have died."""
    now = timezone.now()

    def ago(**span):
        return now - timedelta(**span)

    for number, name in enumerate(("control", "default", "high", "low")):
        down = name == "low"
        Queue.objects.create(
            name=name,
            seen_at=ago(seconds=4),
            answered_at=ago(minutes=16) if down else ago(seconds=6),
            outstanding_since=ago(minutes=16) if down else None,
            latency=0.012 * (number + 1),
            depth=1204 if down else number * 3,
            worker="worker-7f9c4d@production-workers-eu-1.example.com",
            release="2026.11.21-4f2a9c1",
        )
        Sample.objects.bulk_create(
            Sample(
                queue=name,
                at=ago(minutes=minute),
                latency=0.01 * (number + 1) * (1.5 + math.sin(minute / (5 + number)))
                + (4 if minute in (70, 71) and number == 1 else 0),
            )
            for minute in range(180)
            if not (down and minute < 16)
        )
    for number in (1, 2):
        Node.objects.create(
            name=f"worker-{number}@production-workers-eu-1.example.com",
            queues=["default", "high"],
            pid=number,
            release=("2026.11.21-4f2a9c1", "2026.11.20-00aa11b")[number - 1],
            slots=8,
            active=3,
            oldest_at=ago(seconds=95),
        )


@pytest.fixture
def jobs(busy):
    """Jobs that run, wait and have died, and their numbers of the last hours."""
    job = pytest.importorskip("durable_jobs.models").Job
    now = timezone.now()

    def make(state, count=1, **values):
        live = state in ("running", "queued", "scheduled")
        timer = {"due_at": now + timedelta(seconds=30)} if live else {"finished_at": now}
        return [
            job.objects.create(**{"queue": "default", "state": state, **timer, **values})
            for _ in range(count)
        ]

    node = "worker-1@production-workers-eu-1.example.com"
    for number, task in enumerate(("shop.make_copies", "shop.charge", LONG)):
        started = now - timedelta(seconds=8 * 12**number)
        more = {"worker": node, "progress": 30 * number, "message": "120 of 400"}
        make("running", task=task, started_at=started, **more)
    make("queued", 14, task="shop.charge")
    make("scheduled", 5, task="shop.charge", attempts=2)
    error = "Traceback (most recent call last):\n  ...\nConnectionError: payments.example.com:443"
    before = {"finished_at": now - timedelta(minutes=40)}
    make("scheduled", task="shop.charge", attempts=3, error=error)
    make("queued", task=LONG, attempts=1, error=f"lost with its worker {node}")
    make("dead", 3, task="shop.charge", attempts=8, error=error, **before)
    make("dead", 1, task=LONG, attempts=8, error=f"ValueError: {'0123456789' * 12}")
    minute = now.replace(second=0, microsecond=0)
    JobSample.objects.bulk_create(
        JobSample(
            at=minute - timedelta(minutes=back),
            counts={
                "running": 3 + round(2 * math.sin(back / 9)),
                "queued": 14 + round(12 * math.cos(back / 30)),
                "scheduled": 5 + (back % 7 == 0),
                "dead": 4 if back < 40 else 0,
            },
        )
        for back in range(180)
    )
    return job


def overflow(browser, width):
    """Return what reaches beyond a window of that width. `innerWidth` of a phone grows with it."""
    return browser.ask(
        f"[document.documentElement.scrollWidth > {width}, [...document.querySelectorAll('*')]"
        f".filter((e) => e.getBoundingClientRect().right > {width + 1}).map((e) => e.outerHTML)]"
    )


def refresh(browser):
    """Make the page ask now, as it does when somebody comes back to it."""
    browser.ask("document.dispatchEvent(new Event('visibilitychange')), 0")


def text(browser, selector):
    return browser.ask(f"document.querySelector({selector!r}).innerText")


def picture(browser, name):
    """Keep a picture where STATUS_PICTURES says, for people to look at."""
    if folder := os.environ.get("STATUS_PICTURES"):
        browser.picture(Path(folder) / f"{name}.png")


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("light", {}),
        ("dark", {"dark": True}),
        ("phone", {"width": 360, "height": 740}),
        ("phone-dark", {"width": 360, "height": 740, "dark": True}),
    ],
)
def test_everything_is_shown_in_words_at_every_width_without_an_error(page, jobs, name, look):
    browser = page(**look)
    picture(browser, name)
    assert "low does not move: no worker serves it" in text(browser, "h1")
    first = text(browser, "#queues article")
    assert "▲no worker serves it" in first.replace("▲ ", "▲")
    assert "> 16 min" in first
    assert "1,204" in first
    assert browser.ask("document.querySelectorAll('#queues .gap').length") == 1
    assert "✓" in text(browser, "[data-queue=high] .state")
    assert "Releases workers differ" in text(browser, "#facts")
    assert browser.ask("document.querySelectorAll('#queues path.line').length") == 4
    assert text(browser, "[data-count=queued] strong") == "15"
    assert "shop.charge" in text(browser, "#running")
    assert "ConnectionError" in text(browser, "#dead")
    first, second = text(browser, "#failing li"), text(browser, "#failing li:last-child")
    assert re.search(
        r"payments.example.com:443\s+(in [\d.]+ s|due now)\s+shop.charge .* 3 attempts", first
    )
    assert "waits for a worker" in second
    colours = [f"getComputedStyle(document.body).{key}" for key in ("color", "backgroundColor")]
    ink, paper = (sum(map(int, browser.ask(key)[4:-1].split(","))) for key in colours)
    assert (ink > paper) == look.get("dark", False)
    assert overflow(browser, look.get("width", 1280)) == [False, []]
    assert browser.errors == []
    answer = "fetch('').then((answer) => answer.headers.get('Content-Security-Policy'))"
    assert browser.ask(answer) == POLICY


def test_retry_of_one_and_of_all_makes_the_dead_disappear(page, jobs):
    browser = page()
    browser.ask("document.querySelector('[id^=retry-]:not([id^=retry-all])').click()")
    browser.until("document.querySelector('#said').innerText === '1 job will run again.'")
    browser.ask("document.getElementById('retry-all-shop.charge').click()")
    browser.until("document.querySelector('#said').innerText === '3 jobs will run again.'")
    browser.until("document.querySelector('#dead').innerText === 'None.'")
    assert not jobs.objects.filter(state="dead").exists()
    assert browser.errors == []


def test_the_page_refreshes_itself(page, busy):
    browser = page()
    Queue.objects.filter(name="low").update(outstanding_since=None)
    browser.until("document.querySelector('h1').innerText.includes('All 4 queues move')")
    assert browser.ask("document.title") == "Status"
    assert browser.errors == []


def test_a_server_that_does_not_answer_is_named_with_the_age_of_the_news(page, busy):
    browser = page()
    assert text(browser, "#news") == "Live, every 5 s"
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.call("Network.emulateNetworkConditions", offline=True, **network)
    refresh(browser)
    browser.until(
        r"/does not answer. Last news \d+ s ago/.test(document.querySelector('#news').innerText)"
    )
    picture(browser, "stale")
    browser.call("Network.emulateNetworkConditions", offline=False, **network)
    refresh(browser)
    browser.until("document.querySelector('#news').innerText === 'Live, every 5 s'")


def test_a_frozen_worker_and_a_loop_that_never_passed_are_said_in_the_header(page, busy):
    assert "Workers 2, 6 of 16 slots busy" in text(page(), "#facts")
    silent = timezone.now() - timedelta(minutes=1)
    Node.objects.filter(name__startswith="worker-2").update(seen_at=silent)
    told = text(page(), "#facts")
    assert "Workers 1, 3 of 8 slots busy; 1 silent" in told
    assert "Loop has never passed" in told


@pytest.mark.faults
def test_a_real_worker_is_shown_and_that_it_was_killed(crew, page):
    crew.everybody()
    browser = page()
    picture(browser, "real")
    assert "All 4 queues move" in text(browser, "h1")
    assert "Release r1" in text(browser, "#facts")
    assert "control@test" in text(browser, "#workers")
    crew.signal("control", signal.SIGKILL)
    browser.until("document.querySelector('h1').innerText.includes('its workers were killed')", 60)
    assert "its workers were killed" in text(browser, "[data-queue=control]")
    assert browser.errors == []


def test_who_is_logged_out_meanwhile_is_told_so(page, busy):
    browser = page()
    Session.objects.all().delete()
    refresh(browser)
    browser.until("document.querySelector('#news').innerText.startsWith('You are no longer')")


def test_a_retry_that_changes_nothing_says_why(page, jobs):
    jobs.objects.filter(state="dead").exclude(task="shop.charge").update(key="k")
    later = timezone.now() + timedelta(hours=1)
    jobs.objects.create(task=LONG, key="k", queue="q", state="queued", due_at=later)
    browser = page()
    browser.ask("document.querySelector('#dead button').click()")
    browser.until("document.querySelector('#said').innerText.startsWith('0 jobs will run')")
    assert "another job with the same key" in text(browser, "#said")
    browser.until("!document.querySelector('#dead button').disabled")
    assert browser.errors == []


def test_before_anything_has_run_the_page_says_so(page):
    browser = page(width=360, height=740)
    assert "4 of 4 queues do not move" in text(browser, "h1")
    assert "Beat has never looked" in text(browser, "#facts")
    assert overflow(browser, 360) == [False, []]
    assert browser.errors == []
