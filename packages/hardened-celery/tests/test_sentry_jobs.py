"""Sentry and durable jobs: one event for what nobody repairs, and for each process that is lost."""

import secrets
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import current_app
from django.db import connection
from django.db.models.functions import Now

from durable_jobs import Job
from durable_jobs.reconcile import UNKNOWN_AFTER_SECONDS, fire_timers
from durable_jobs.tasks import reconcile
from hardened_celery.sentry import MONITOR
from queue_probes.probe import probe
from tests import observed
from tests.envelope_server import EnvelopeServer, running
from tests.observed import jobs
from tests.observed.tasks import speak
from tests.processes import running_worker, wait_until

SECRET = secrets.token_hex()
# job: events, and their fingerprint when it is ours
EVENTS = {
    "fail_twice": (1, None),
    "fail_once": (0, None),
    "fail_as_expected": (0, None),
    "exhaust_retries": (1, None),
    "sleep_twice": (1, "SoftTimeLimitExceeded"),
    "ignore_soft_limit": (1, "TimeLimitExceeded"),
    "die_once": (1, "WorkerLostError"),
    "die_twice": (2, "WorkerLostError"),
    # an exception like any other, and grouped as such
    "leave": (1, None),
}
# and a job lost with its workers; one of an unknown task, as the worker and as the loop see it
EXPECTED = sum(number for number, _ in EVENTS.values()) + 1 + 2
UNKNOWN = "tests.unknown"
MONITORS = ["beat", "reconcile", "probe-high", "probe-control"]


@dataclass
class Reports:
    """What one worker reported of jobs that failed in every way."""

    sentry: EnvelopeServer
    ids: dict[str, str]
    log: str

    def of(self, name: str) -> list[dict[str, Any]]:
        return self.sentry.events(celery_task_id=self.ids[name])


def lose(name: str, *, task: str, **fields: Any) -> str:
    """Write a job that is overdue; return its id."""
    common = {"args": [SECRET], "kwargs": {"password": SECRET}, "due_at": Now()}
    return str(Job.objects.create(task=task, queue=name, **common, **fields).pk)


def enqueue() -> dict[str, str]:
    """Enqueue jobs of all kinds, two lost ones among them; return the ids."""
    given = {"args": [SECRET], "kwargs": {"password": SECRET}, "queue": "high"}
    ids = {name: getattr(jobs, name).apply_async(**given).id for name in EVENTS}
    spent = {"state": Job.State.RUNNING, "attempts": 2, "max_attempts": 2, "worker": "gone"}
    ids["never_run"] = lose("low", task=jobs.never_run.name, **spent)
    ids["unknown"] = lose("high", task=UNKNOWN)
    old = Now() - timedelta(seconds=UNKNOWN_AFTER_SECONDS + 1)
    Job.objects.filter(pk=ids["unknown"]).update(created_at=old)
    reconcile.apply_async(queue="control")
    return ids


def all_ended() -> bool:
    """Do what the loop does; tell whether nothing is left to do."""
    fire_timers()  # a retry's own timer is lost with the process that is killed a moment later
    return not Job.objects.unfinished().exclude(task=UNKNOWN).exists()


@pytest.fixture(scope="module", autouse=True)
def empty_broker() -> None:
    """Throw away what tests before left in the queues: it would be reported as well."""
    current_app.control.purge()


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory, django_db_setup: None, django_db_blocker: Any
) -> Iterator[Reports]:
    """Let one worker meet every failure, and end it, so that nothing is left to be sent."""
    log = tmp_path_factory.mktemp("worker") / "log"
    with django_db_blocker.unblock(), running() as sentry:
        url = observed.database(str(connection.settings_dict["NAME"]))
        environment = observed.environment(
            SENTRY_DSN=sentry.dsn, SENTRY_TRACES_SAMPLE_RATE="1", DATABASE_URL=url
        )
        options = "-c", "2", "-Q", "high,low,control"
        try:
            with running_worker(log, environment, *options) as worker:
                ids = enqueue()
                spent = Job.objects.filter(pk=ids["never_run"], state=Job.State.DEAD)
                wait_until(spent.exists, what="the worker has run the loop")
                wait_until(all_ended, 60)
                wait_until(lambda: len(sentry.events()) >= EXPECTED, what="all is reported")
                worker.send(signal.SIGTERM)
                worker.wait()
            yield Reports(sentry, ids, log.read_text())
        finally:
            Job.objects.all().delete()


@pytest.mark.parametrize("name", EVENTS)
def test_job_is_one_event_with_its_tags_when_it_has_failed_for_good_or_lost_its_process(
    reports: Reports, name: str
) -> None:
    events = reports.of(name)
    number, reason = EVENTS[name]
    task = f"tests.observed.jobs.{name}"
    assert len(events) == number
    for event in events:
        assert event["tags"].items() >= {"task": task, "queue": "high"}.items()
        assert event.get("fingerprint") == (["celery", reason, task] if reason else None)


def test_job_whose_workers_died_is_one_event_of_its_own_task(reports: Reports) -> None:
    (event,) = reports.of("never_run")
    assert event["tags"]["task"] == jobs.never_run.name
    assert event["tags"]["queue"] == "low"
    assert event["fingerprint"] == ["{{ default }}", jobs.never_run.name]


def test_jobs_of_an_unknown_task_are_one_issue(reports: Reports) -> None:
    events = reports.sentry.events(task=UNKNOWN)
    assert [event["fingerprint"] for event in events] == [["celery", "unknown task", UNKNOWN]] * 2
    (met,) = reports.of("unknown")
    assert met["tags"]["queue"] == "high"


def test_nothing_else_is_reported(reports: Reports) -> None:
    assert len(reports.sentry.events()) == EXPECTED


def test_jobs_are_traced_and_the_loop_is_not(reports: Reports) -> None:
    traced = {item["transaction"] for item in reports.sentry.items("transaction")}
    assert jobs.fail_once.name in traced
    assert reconcile.name not in traced


def test_arguments_of_jobs_reach_neither_sentry_nor_the_log(reports: Reports) -> None:
    assert SECRET.encode() not in reports.sentry.raw
    assert SECRET not in reports.log


def test_beat_loop_and_probes_check_in_once_a_minute(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    database = project_environment["DATABASE_URL"]
    command = "celery", "-A", "tests.app", "beat", "--pidfile=", "-s", str(tmp_path / "schedule")
    with running() as sentry:
        environment = observed.environment(SENTRY_DSN=sentry.dsn, DATABASE_URL=database)
        real = environment | {"DJANGO_SETTINGS_MODULE": "tests.settings"}
        with (
            running_worker(tmp_path / "log", environment, "-c", "1", "-Q", "high,control") as work,
            observed.program(tmp_path / "beat", real, *command),
        ):
            for slug in MONITORS:
                wait_until(lambda slug=slug: sentry.check_ins(slug), what=f"{slug} checks in")
            for queue in "high", "control":  # once more, and something that runs after it
                reconcile.apply_async(queue=queue)
                probe.apply_async([queue, str(uuid.uuid4())], queue=queue)
                speak.apply_async([f"the last of {queue}"], queue=queue)
                wait_until(lambda queue=queue: f"the last of {queue}" in work.text())
            work.send(signal.SIGTERM)
            work.wait()
        for slug in MONITORS:
            (check_in,) = sentry.check_ins(slug)
            assert check_in["status"] == "ok"
            assert check_in["monitor_config"] == MONITOR
        assert not sentry.events()
    current_app.control.purge()
