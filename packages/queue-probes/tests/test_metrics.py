"""What Prometheus reads: every number comes from the database, and reading is cheap."""

import math
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from django.db import connection, connections
from django.db.models.functions import Now
from django.test import Client
from django.test.utils import CaptureQueriesContext
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from durable_jobs.models import Job, LoopPass
from queue_probes import metrics
from queue_probes.models import BOUNDS, DURATIONS, Finished, Node, Queue, Watermark
from queue_probes.tally import tally
from tests.conftest import end, wait_until

State = Job.State
pytestmark = pytest.mark.django_db(transaction=True)
README = Path(__file__).resolve().parent.parent / "README.md"
Numbers = dict[tuple[str, ...], float]


def numbers(text: str) -> Numbers:
    """Return every sample by name and label values, these in the order of the labels' names."""
    samples = (
        sample for family in text_string_to_metric_families(text) for sample in family.samples
    )
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for sample in samples
    }


def scrape(client: Client) -> Numbers:
    answer = client.get("/metrics")
    assert (answer.status_code, answer["Content-Type"]) == (200, metrics.CONTENT_TYPE_PLAIN_0_0_4)
    return numbers(answer.text)


def ago(seconds: float) -> object:
    return Now() - timedelta(seconds=seconds)


def many(*, finished: int, unfinished: int) -> None:
    """Make jobs: one ended each second until now, every thousandth dead; the others are due."""
    insert = """INSERT INTO durable_jobs_job (id, task, args, kwargs, options, queue, state,
        attempts, created_at, started_at, finished_at, due_at)
        SELECT gen_random_uuid(), 'app.task_' || n % 20, '[]', '{}', '{}', 'low', """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""{insert} CASE WHEN n % 1000 = 0 THEN 'dead' ELSE 'succeeded' END, 1,
            now() - (n + 1) * interval '1s', now() - (n + 0.1) * interval '1s',
            now() - n * interval '1s', NULL FROM generate_series(1, {finished}) n"""
        )
        cursor.execute(
            f"""{insert} 'queued', 0, now(), NULL, NULL, now() - interval '60s'
            FROM generate_series(1, {unfinished}) n"""
        )
        cursor.execute("ANALYZE durable_jobs_job")


def test_a_queue_that_moves(client: Client) -> None:
    slots = [0] * len(BOUNDS)
    slots[1], slots[3], slots[-1] = 2, 1, 1
    facts = {"depth": 7, "answers": 4, "seconds": 400.5, "buckets": slots}
    Queue.objects.create(name="high", seen_at=Now(), answered_at=ago(8), **facts)
    found = scrape(client)
    assert found["queue_up", "high"] == 1
    assert found["queue_depth", "high"] == 7
    assert found["queue_probe_outstanding_seconds", "high"] == 0
    assert found["queue_probe_age_seconds", "high"] == pytest.approx(8, abs=5)
    below = [found["queue_probe_latency_seconds_bucket", le, "high"] for le in ("0.005", "0.01")]
    assert below == [0, 2]
    assert found["queue_probe_latency_seconds_bucket", "30.0", "high"] == 3
    assert found["queue_probe_latency_seconds_bucket", "+Inf", "high"] == 4
    assert found["queue_probe_latency_seconds_count", "high"] == 4
    assert found["queue_probe_latency_seconds_sum", "high"] == 400.5


def test_a_queue_that_does_not_move_says_why(client: Client) -> None:
    Queue.objects.create(name="high", seen_at=Now(), outstanding_since=ago(100))
    found = scrape(client)
    assert found["queue_up", "high"] == 0
    assert found["queue_probe_outstanding_seconds", "high"] == pytest.approx(100, abs=5)
    states = {key[2]: value for key, value in found.items() if key[:2] == ("queue_state", "high")}
    assert states == {word: word == "no_worker" for word in metrics.WORDS}
    # never measured is not 0
    assert ("queue_probe_age_seconds", "high") not in found
    assert ("queue_depth", "high") not in found


def test_workers(client: Client) -> None:
    Node.objects.create(name="w@a", pid=1, slots=4, active=2, oldest_at=ago(60), seen_at=ago(30))
    Node.objects.create(name="w@b", pid=2)
    found = scrape(client)
    assert (found["worker_slots", "w@a"], found["worker_active_tasks", "w@a"]) == (4, 2)
    assert found["worker_oldest_task_age_seconds", "w@a"] == pytest.approx(60, abs=5)
    assert found["worker_seen_age_seconds", "w@a"] == pytest.approx(30, abs=5)
    assert found["worker_oldest_task_age_seconds", "w@b"] == 0


def test_jobs_that_wait_run_and_are_dead(client: Client, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "TASKS", 1)
    job = {"task": "app.one", "queue": "own"}
    Job.objects.create(**job, due_at=ago(40), created_at=ago(90))
    Job.objects.create(**job, due_at=Now() + timedelta(hours=1), state=State.RUNNING)
    for task in ("app.one", "app.one", "app.two", "app.three"):
        Job.objects.create(queue="own", task=task, finished_at=Now(), state=State.DEAD)
    found = scrape(client)
    assert (found["jobs_unfinished", "own", "queued"], found["jobs_counted",]) == (1, 1)
    assert found["jobs_unfinished", "own", "running"] == 1
    assert found["jobs_unfinished", "high", "scheduled"] == 0
    assert found["jobs_oldest_age_seconds", "own", "queued"] == pytest.approx(90, abs=5)
    assert found["jobs_overdue_seconds",] == pytest.approx(40, abs=5)
    assert (found["jobs_dead", "app.one"], found["jobs_dead", "other"]) == (2, 2)


def test_jobs_that_ended(client: Client) -> None:
    slots = [0] * len(DURATIONS)
    slots[0], slots[4] = 2, 1
    name = {"task": "app.one", "queue": "low"}
    Finished.objects.create(
        **name, state="succeeded", count=3, attempts=5, seconds=1, buckets=slots
    )
    Finished.objects.create(**name, state="cancelled", count=1)
    found = scrape(client)
    assert found["jobs_finished_total", "low", "succeeded", "app.one"] == 3
    assert found["jobs_attempts_total", "low", "succeeded", "app.one"] == 5
    assert found["jobs_duration_seconds_bucket", "0.01", "low", "succeeded", "app.one"] == 2
    assert found["jobs_duration_seconds_count", "low", "succeeded", "app.one"] == 3
    assert found["jobs_finished_total", "low", "cancelled", "app.one"] == 1
    assert ("jobs_duration_seconds_count", "low", "cancelled", "app.one") not in found


def test_the_readme_lists_what_is_printed(client: Client) -> None:
    section = re.split(r"^## ", README.read_text().partition("## Metrics\n")[2], flags=re.M)[0]
    told = re.findall(r"`((?:queue|worker|jobs)_\w+)`", section)
    printed = re.findall(r"^# TYPE (\w+)", client.get("/metrics").text, re.M)
    assert sorted(told) == sorted(printed)


def test_without_anything_there_is_still_an_answer(client: Client) -> None:
    found = scrape(client)
    assert found["queue_state", "control", "beat_dead"] == 1
    assert (found["jobs_overdue_seconds",], found["jobs_loop_age_seconds",]) == (0, math.inf)
    LoopPass.objects.create(at=ago(40))
    assert scrape(client)["jobs_loop_age_seconds",] == pytest.approx(40, abs=5)


def test_too_many_jobs_to_count_take_nothing_else_away(settings) -> None:
    many(finished=0, unfinished=50_000)
    settings.QUEUE_PROBES = {"TIMEOUT": 0.002}  # half of it is too short for them
    found = numbers(generate_latest(metrics.registry).decode())
    assert found["jobs_counted",] == 0
    assert not [key for key in found if key[0] in ("jobs_unfinished", "jobs_dead")]
    assert ("queue_up", "high") in found
    assert found["jobs_overdue_seconds",] == pytest.approx(60, abs=30)


def test_no_scrape_and_no_tally_reads_the_whole_table() -> None:
    many(finished=30_000, unfinished=1000)
    Watermark.objects.create(pk=1, until=ago(600))
    with CaptureQueriesContext(connection) as queries:
        generate_latest(metrics.registry)
        assert tally() > 100
    asked = [
        query["sql"]
        for query in queries.captured_queries
        if 'FROM "durable_jobs_job"' in query["sql"]
    ]
    assert len(asked) == 5
    with connection.cursor() as cursor:
        for sql in asked:
            cursor.execute(f"EXPLAIN {sql}")
            plan = "\n".join(line for (line,) in cursor.fetchall())
            assert "Seq Scan on durable_jobs_job" not in plan, f"{sql}\n{plan}"


def test_only_who_has_the_token_reads_it(client: Client, settings) -> None:
    settings.QUEUE_PROBES = {"TOKEN": "secret"}
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
    answer = client.get("/metrics", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200


def test_a_database_that_is_down_is_503_in_one_line(client: Client, free_port: int) -> None:
    database = connections["default"]
    database.close()
    port = database.settings_dict["PORT"]
    database.settings_dict["PORT"] = free_port
    try:
        answer = client.get("/metrics")
    finally:
        database.close()
        database.settings_dict["PORT"] = port
    assert (answer.status_code, answer.text) == (503, "# database: OperationalError\n")


@contextmanager
def gunicorn(
    environment: dict[str, str], port: int
) -> Iterator[tuple[psutil.Process, Callable[[], list[str]]]]:
    """Run gunicorn with three processes; give it, and a function that scrapes."""
    how = ("-k", "gthread", "-w", "3", "--threads", "4", "--no-control-socket")
    command = [sys.executable, "-m", "gunicorn", "tests.wsgi", *how, "-b", f"127.0.0.1:{port}"]
    server = subprocess.Popen(command, env=environment)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def lines() -> list[str]:
        """Return what does not change by itself: counters, histograms and depths."""
        with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return [line for line in text.splitlines() if "age_seconds" not in line]

    def listens() -> bool:
        with suppress(OSError):
            return bool(lines())
        return False

    try:
        wait_until(listens)
        yield psutil.Process(server.pid), lines
    finally:
        end([server])


@pytest.mark.faults
def test_processes_of_gunicorn_agree_and_a_restart_changes_nothing(
    project_environment: dict[str, str], free_port: int
) -> None:
    many(finished=100, unfinished=3)
    Watermark.objects.create(pk=1, until=ago(600))
    tally()
    Queue.objects.create(name="high", answers=1, seconds=0.5, buckets=[0] * 6 + [1] + [0] * 8)
    Job.objects.filter(due_at__isnull=False).update(due_at=Now() + timedelta(days=1))
    with gunicorn(project_environment, free_port) as (server, lines):
        wait_until(lambda: len(server.children()) == 3)
        first = lines()
        processes = server.children()
        for one in processes:
            others = [process for process in processes if process != one]
            for process in others:
                process.suspend()
            assert lines() == first
            for process in others:
                process.resume()
    assert sum(line.startswith("jobs_finished_total{") for line in first) == 20
    with gunicorn(project_environment, free_port) as (_, lines):
        assert lines() == first


# No `durable_jobs` anywhere, and another database than the one of the other tests.
ALONE = """
import sys
sys.modules["durable_jobs"] = None
import django
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["queue_probes"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    USE_TZ=True,
)
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from prometheus_client import generate_latest
from queue_probes import metrics, probe
assert probe.tally() == 0
print(generate_latest(metrics.registry).decode())
"""


def test_without_durable_jobs_there_are_queues_and_workers() -> None:
    output = subprocess.check_output([sys.executable, "-c", ALONE], text=True)
    names = {family.name for family in text_string_to_metric_families(output)}
    assert {"queue_up", "worker_slots"} <= names
    assert not [name for name in names if name.startswith("jobs")]
