"""Sentry, against a server that takes its envelopes: web, worker and beat as real processes."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import current_app

from tests import observed
from tests.envelope_server import EnvelopeServer, running
from tests.observed import tasks
from tests.processes import ROOT, children, running_worker, wait_until

SECRET = secrets.token_hex()
# events per task; what Celery itself starts again, or the author expects, is none
EVENTS = {
    "fail": 1,
    "fail_as_expected": 0,
    "succeed_at_second_attempt": 0,
    "fail_at_second_attempt": 1,
    "sleep": 1,
    "ignore_soft_limit": 1,
    "die": 1,
    "die_once": 1,
    "die_twice": 2,
    "leave": 1,
}
LIMITS = {
    "sleep": {"soft_time_limit": 1},
    "ignore_soft_limit": {"soft_time_limit": 1, "time_limit": 2},
}
# an unknown task, three messages that are none
OTHERS = 4
TRIALS = 3
PROMPT_SECONDS = 2


@dataclass
class Failures:
    """What one worker reported of tasks that failed in every way."""

    sentry: EnvelopeServer
    ids: dict[str, str]
    log: str

    def of(self, name: str) -> list[dict[str, Any]]:
        return self.sentry.events(celery_task_id=self.ids[name])

    def by_fingerprint(self, *fingerprint: str) -> list[dict[str, Any]]:
        return [e for e in self.sentry.events() if e.get("fingerprint") == list(fingerprint)]


def send(name: str) -> str:
    """Send a task with secrets, return its id."""
    options = LIMITS.get(name, {})
    return getattr(tasks, name).apply_async([SECRET], {"password": SECRET}, **options).id


def send_unusable_messages() -> None:
    """Send an unknown task, two bad bodies, and what is no task at all."""
    current_app.send_task("tests.unknown", [SECRET], {"password": SECRET}, task_id="2")
    secret = SECRET.encode()
    to = {"routing_key": "default", "exchange": "default", "content_encoding": "utf-8"}
    json, pickle = "application/json", "application/x-python-serialize"
    headers = {"task": tasks.fail.name, "id": "1", "argsrepr": SECRET}
    with current_app.producer_or_acquire() as producer:
        producer.publish(b"{" + secret, content_type=json, headers=headers, **to)
        producer.publish(secret, content_type=pickle, headers=headers, **to)
        producer.publish(b'"%b"' % secret, content_type=json, **to)


@pytest.fixture(scope="module", autouse=True)
def empty_broker() -> None:
    """Throw away what tests before left in the queues: it would be reported as well."""
    current_app.control.purge()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failures]:
    """Let one worker meet every failure, and end it, so that nothing is left to be sent."""
    log = tmp_path_factory.mktemp("worker") / "log"
    with running() as sentry:
        environment = observed.environment(SENTRY_DSN=sentry.dsn, SENTRY_RELEASE="release-7")
        with running_worker(log, environment, "-c", "2") as worker:
            ids = {name: send(name) for name in EVENTS}
            send_unusable_messages()
            expected = sum(EVENTS.values()) + OTHERS
            wait_until(lambda: len(sentry.events()) >= expected, 60, "all failures are reported")
            worker.send(signal.SIGTERM)
            worker.wait()
        yield Failures(sentry, ids, log.read_text())


@pytest.mark.parametrize(("name", "number"), EVENTS.items())
def test_each_failure_of_a_task_is_one_event_with_its_name(
    failures: Failures, name: str, number: int
) -> None:
    events = failures.of(name)
    assert len(events) == number
    assert {event["tags"]["task"] for event in events} <= {f"tests.observed.tasks.{name}"}
    assert {event["tags"]["queue"] for event in events} <= {"default"}
    assert {event["release"] for event in events} <= {"release-7"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sleep", "SoftTimeLimitExceeded"),
        ("ignore_soft_limit", "TimeLimitExceeded"),
        ("die_once", "WorkerLostError"),
        ("die_twice", "WorkerLostError"),
    ],
)
def test_failures_are_grouped_by_reason_and_task(
    failures: Failures, name: str, reason: str
) -> None:
    events = failures.by_fingerprint("celery", reason, f"tests.observed.tasks.{name}")
    assert len(events) == EVENTS[name]


@pytest.mark.parametrize(
    ("reason", "detail", "tags"),
    [
        ("unknown task", "tests.unknown", {"task": "tests.unknown", "celery_task_id": "2"}),
        ("unusable message", "DecodeError", {"task": tasks.fail.name, "celery_task_id": "1"}),
        ("unusable message", "ContentDisallowed", {"task": tasks.fail.name}),
    ],
)
def test_each_message_that_no_worker_can_use_is_one_event(
    failures: Failures, reason: str, detail: str, tags: dict[str, str]
) -> None:
    (event,) = failures.by_fingerprint("celery", reason, detail)
    assert event["tags"].items() >= {"queue": "default", **tags}.items()


def test_deleted_message_that_is_no_task_is_one_event(failures: Failures) -> None:
    (event,) = [e for e in failures.sentry.events() if "deleted a message" in e.get("message", "")]
    assert event["tags"]["queue"] == "default"


def test_nothing_else_is_reported(failures: Failures) -> None:
    assert len(failures.sentry.events()) == sum(EVENTS.values()) + OTHERS


def test_arguments_reach_neither_sentry_nor_the_log(failures: Failures) -> None:
    assert SECRET.encode() not in failures.sentry.raw
    assert SECRET not in failures.log
    assert b"sys.argv" not in failures.sentry.raw


def test_failing_view_is_one_event_and_traces_leave_health_checks_out(
    tmp_path: Path, free_port: int
) -> None:
    headers = {"Cookie": f"session={SECRET}", "Authorization": SECRET, "X_Any": SECRET}
    query, body = f"?q={SECRET}", SECRET.encode()
    with running() as sentry:
        environment = observed.environment(SENTRY_DSN=sentry.dsn, SENTRY_TRACES_SAMPLE_RATE="1")
        with observed.web(tmp_path / "log", free_port, environment):
            assert observed.status(free_port, "/healthz/live") == 200
            assert observed.status(free_port, f"/fail{query}", body, **headers) == 500
            assert observed.status(free_port, f"/suspect{query}", **headers) == 400
            assert observed.status(free_port, f"/fail{query}", Host="scanner") == 400
        failed, suspected = sentry.events()
        transactions = [item["transaction"] for item in sentry.items("transaction")]
    assert failed["exception"]["values"][0]["value"] == "a view fails"
    assert failed["transaction"] == "/fail"
    assert suspected["logentry"]["message"] == "a view suspects"
    assert "/healthz/live" not in transactions
    assert len(transactions) == 3
    assert SECRET.encode() not in sentry.raw
    assert SECRET not in (tmp_path / "log").read_text()


def test_beat_reports_entries_that_fail_and_checks_in(tmp_path: Path) -> None:
    with running() as sentry:
        environment = observed.environment(SENTRY_DSN=sentry.dsn, SENTRY_MONITOR_BEAT_TASKS="1")
        command = "celery", "-A", "tests.app", "beat", "-s", str(tmp_path / "schedule")
        with observed.program(tmp_path / "log", environment, *command):
            wait_until(lambda: sentry.events() and sentry.items("check_in"), 30)
        assert "EncodeError" in str(sentry.events()[0]["exception"])
        check_in = sentry.check_ins("speak")[0]
    assert check_in["status"] == "in_progress"
    assert check_in["monitor_config"]["schedule"] == {
        "type": "interval",
        "value": 1,
        "unit": "minute",
    }
    current_app.control.purge()


@pytest.mark.parametrize(("fork", "prompt"), [("fixed", {TRIALS}), ("broken", set(range(TRIALS)))])
def test_first_error_of_a_replaced_pool_process_is_sent_at_once(
    tmp_path: Path, fork: str, prompt: set[int]
) -> None:
    """https://github.com/getsentry/sentry-python/issues/6164"""

    def fail() -> None:
        for task_id in [send("fail_slowly") for _ in range(TRIALS)]:
            wait_until(lambda task_id=task_id: f'"{task_id}", "duration_ms"' in worker.text(), 60)

    with running() as sentry:
        environment = observed.environment(SENTRY_DSN=sentry.dsn, FORK=fork)
        with running_worker(tmp_path / "log", environment, "-c", str(TRIALS)) as worker:
            arrived = replace_and_fail(sentry, worker.celery_pid, TRIALS, fail)
    assert arrived in prompt


@pytest.mark.parametrize(("fork", "prompt"), [("fixed", {TRIALS}), ("broken", set(range(TRIALS)))])
def test_first_error_of_a_replaced_web_process_is_sent_at_once(
    tmp_path: Path, free_port: int, fork: str, prompt: set[int]
) -> None:
    """https://github.com/getsentry/sentry-python/issues/6164"""

    def fail() -> None:
        assert observed.status(free_port, "/fail") == 500

    with running() as sentry:
        environment = observed.environment(SENTRY_DSN=sentry.dsn, FORK=fork)
        with observed.web(tmp_path / "log", free_port, environment, "--preload") as web:
            arrived = sum(replace_and_fail(sentry, web.pid, 1, fail) for _ in range(TRIALS))
    assert arrived in prompt


def replace_and_fail(
    sentry: EnvelopeServer, parent: int, number: int, fail: Callable[[], None]
) -> int:
    """End the children of a process; return how many first errors of the next ones arrive."""
    wait_until(lambda: len(children(parent)) == number, what="all children run")
    old = set(children(parent))
    for child in old:
        os.kill(child, signal.SIGTERM)
    wait_until(lambda: len(set(children(parent)) - old) == number, 60, "they are replaced")
    before = len(sentry.events())
    fail()
    with suppress(AssertionError):
        wait_until(lambda: len(sentry.events()) >= before + number, PROMPT_SECONDS)
    return len(sentry.events()) - before


def run_python(code: str, **environment: str) -> None:
    """Run a program with the project set up; it has to succeed."""
    command = [sys.executable, "-c", f"import django; django.setup()\n{code}"]
    subprocess.run(command, env=observed.environment(**environment), cwd=ROOT, check=True)


def test_without_a_dsn_the_sdk_is_not_imported() -> None:
    run_python(
        "import sys, tests.wsgi, tests.app; tests.app.app.loader.import_default_modules();"
        "assert 'sentry_sdk' not in sys.modules",
        SENTRY_DSN="",
    )


def test_error_logged_through_structlog_keeps_its_name_and_exception() -> None:
    with running() as sentry:
        run_python(
            "import structlog\n"
            "try: 1 / 0\n"
            "except ZeroDivisionError: structlog.get_logger('shop').exception('no sale', order=7)",
            SENTRY_DSN=sentry.dsn,
        )
        (event,) = sentry.events()
    assert event["logentry"]["message"] == "no sale"
    assert event["exception"]["values"][0]["type"] == "ZeroDivisionError"


def test_late_queue_is_one_issue_with_its_name() -> None:
    with running() as sentry:
        run_python(
            "import logging\n"
            "log = logging.getLogger('queue_probes').error\n"
            "log('queue %s is late: %s', 'high', 'stuck', extra={'queue': 'high'})\n"
            "log('queue %s is late: %s', 'high', 'no consumer', extra={'queue': 'high'})\n",
            SENTRY_DSN=sentry.dsn,
        )
        events = sentry.events(queue="high")
    assert [event["fingerprint"] for event in events] == [["{{ default }}", "high"]] * 2
