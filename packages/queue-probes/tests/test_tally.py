"""Jobs that ended are counted once: beside other beats, killed ones, and late commits."""

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from django.db import connection, transaction
from django.db.models import Sum
from django.db.models.functions import Now

from durable_jobs.models import Job
from queue_probes import tally as module
from queue_probes.models import DURATIONS, Finished, Watermark
from queue_probes.tally import tally
from tests.conftest import end, wait_until

State = Job.State
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def yesterday(transactional_db: None) -> None:
    Watermark.objects.create(pk=1, until=Now() - timedelta(days=1))


@pytest.fixture
def other() -> Iterator[psycopg.Connection]:
    """Another session, in a transaction of its own."""
    known = connection.settings_dict
    names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST"}
    given = {name: str(known[key]) for name, key in names.items() if known[key]}
    with psycopg.connect(**given, port=str(known["PORT"] or "")) as session:
        yield session
        session.rollback()


def ended(count: int = 1, *, ago: float = 60, ran: float | None = 1, **fields: object) -> None:
    """Make jobs that ended so many seconds ago, all at the same instant."""
    end = Now() - timedelta(seconds=ago)
    start = None if ran is None else end - timedelta(seconds=ran)
    values = {"task": "app.one", "queue": "low", "state": State.SUCCEEDED, "attempts": 1, **fields}
    jobs = [Job(**values, finished_at=end, started_at=start) for _ in range(count)]
    Job.objects.bulk_create(jobs)


def total() -> int:
    return Finished.objects.aggregate(total=Sum("count"))["total"] or 0


def test_outcomes_attempts_and_durations_are_counted() -> None:
    ended(3, ran=0.03)
    ended(ran=2.5, attempts=4)  # a bound belongs to the bucket below it
    ended(ran=86400, attempts=8, state=State.DEAD)
    assert tally() == 5
    done = Finished.objects.get(task="app.one", queue="low", state="succeeded")
    assert (done.count, done.attempts, round(done.seconds, 3)) == (4, 7, 2.59)
    found = {bound: count for bound, count in zip(DURATIONS, done.buckets, strict=True) if count}
    assert found == {0.05: 3, 2.5: 1}
    dead = Finished.objects.get(state="dead")
    assert (dead.count, dead.attempts, dead.buckets[-1]) == (1, 8, 1)


def test_a_cancelled_job_has_no_duration() -> None:
    ended(state=State.CANCELLED, ran=None, attempts=0)
    ended(state=State.CANCELLED, ran=3600)  # an hour after its last attempt
    tally()
    row = Finished.objects.get()
    assert (row.count, row.seconds, sum(row.buckets)) == (2, 0, 0)


def test_counts_outlive_the_jobs_and_none_counts_twice() -> None:
    ended(3)
    assert (tally(), tally()) == (3, 0)
    Job.objects.all().delete()
    ended(2)
    Watermark.objects.update(until=Now() - timedelta(seconds=61))
    assert tally() == 2
    assert total() == 5


def test_a_batch_is_bounded_and_ends_between_two_instants(monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    for ago in (50, 40, 30, 20):
        ended(ago=ago)
    ended(4, ago=35)
    assert [tally() for _ in range(5)] == [2, 4, 2, 0, 0]
    assert total() == 8


def test_what_ended_just_now_waits(monkeypatch) -> None:
    ended(ago=1)
    assert tally() == 0
    monkeypatch.setattr(module, "MARGIN", 0.5)
    assert tally() == 1


def test_a_late_commit_is_counted(monkeypatch, other: psycopg.Connection) -> None:
    monkeypatch.setattr(module, "MARGIN", 0.0)
    job = Job.objects.create(task="app.late", queue="low", due_at=Now())
    other.execute(
        "UPDATE durable_jobs_job SET state = 'cancelled', due_at = NULL,"
        " finished_at = statement_timestamp() WHERE id = %s",
        [job.pk],
    )
    ended(2, ago=0)
    before = tally()
    other.commit()
    assert (before, tally()) == (0, 3)


def test_a_transaction_that_does_not_end_stops_the_counters_for_a_while_only(
    monkeypatch, other: psycopg.Connection
) -> None:
    monkeypatch.setattr(module, "MARGIN", 0.0)
    job = Job.objects.create(task="app.late", queue="low", due_at=Now())
    other.execute(
        "UPDATE durable_jobs_job SET state = 'cancelled', due_at = NULL,"
        " finished_at = statement_timestamp() WHERE id = %s",
        [job.pk],
    )
    ended(2, ago=0)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert tally() == 2
    other.commit()
    # the known limit
    assert tally() == 0


def test_more_tasks_than_are_told_apart_are_others(monkeypatch) -> None:
    monkeypatch.setattr(module, "TASKS", 2)
    for number in range(2):
        ended(task=f"app.{number}")
    tally()
    Watermark.objects.update(until=Now() - timedelta(days=1))
    Job.objects.all().delete()
    for number in range(5):
        ended(task=f"app.{number}")
    tally()
    assert dict(Finished.objects.values_list("task", "count")) == {
        "app.0": 2,
        "app.1": 2,
        "other": 3,
    }


def test_a_beat_that_is_killed_while_it_counts_counts_nothing_and_holds_nobody_up(
    project_environment: dict[str, str], other: psycopg.Connection
) -> None:
    Finished.objects.create(task="app.one", queue="low", state="succeeded", count=1)
    ended(5)
    # The counts of this group cannot be written: the other beat stops in the middle.
    other.execute("SELECT * FROM queue_probes_finished FOR UPDATE")
    script = "import django; django.setup(); from queue_probes.tally import tally; tally()"
    environment = {**project_environment, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    beat = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_until(lambda: beat.poll() is not None or waits_for_a_lock("UPDATE"))
        assert beat.poll() is None
        assert tally() == 0
    finally:
        beat.kill()
        beat.wait(10)
    other.rollback()
    assert total() == 1
    # PostgreSQL notices the end of the process when it speaks to it the next time
    wait_until(lambda: tally() or total() == 6)
    assert (total(), tally()) == (6, 0)


BEATS = """
import django
django.setup()
from queue_probes import tally
tally.MARGIN, tally.BATCH = 0.5, 20
while True:
    tally.tally()
"""


@pytest.mark.faults
def test_every_end_counts_once_though_beats_are_killed_and_commits_are_late(
    project_environment: dict[str, str], monkeypatch
) -> None:
    monkeypatch.setattr(module, "MARGIN", 0.0)
    chance = random.Random(4)
    environment = {**project_environment, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    stop = threading.Event()

    def beat() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", BEATS], env=environment)

    def end_jobs(seed: int) -> int:
        """End jobs, three at a time, and commit up to two seconds later, far beyond the margin."""
        late, count = random.Random(seed), 0
        try:
            while not stop.is_set():
                with transaction.atomic():
                    ended(3, ago=0)
                    stop.wait(late.choice([0, 0.01, 0.1, 2]))
                count += 3
        finally:
            connection.close()
        return count

    beats = [beat() for _ in range(3)]
    try:
        with ThreadPoolExecutor(6) as pool:
            work = [pool.submit(end_jobs, seed) for seed in range(6)]
            wait_until(total)
            for _ in range(5):
                unlucky = beats.pop(0)
                before = total()
                assert unlucky.poll() is None
                unlucky.kill()
                unlucky.wait(10)
                beats.append(beat())
                wait_until(lambda before=before: total() > before)
                stop.wait(chance.random() / 2)
            stop.set()
            made = sum(done.result() for done in work)
    finally:
        end(beats)
    wait_until(lambda: tally() == 0)
    assert total() == made == Job.objects.count()


@pytest.mark.faults
def test_beat_counts_though_its_broker_is_away(
    project_environment: dict[str, str], free_port: int, tmp_path: Path
) -> None:
    ended(3)
    command = [*(sys.executable, "-m", "celery", "-A", "tests.app", "beat"), "--pidfile="]
    names = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL")
    environment = project_environment | dict.fromkeys(names, f"redis://127.0.0.1:{free_port}/0")
    with (tmp_path / "log").open("wb") as log:
        beat = subprocess.Popen(
            [*command, f"--schedule={tmp_path / 'schedule'}"], env=environment, stderr=log
        )
    try:
        wait_until(lambda: total() == 3)
    finally:
        end([beat])


def waits_for_a_lock(statement: str) -> bool:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock' AND query LIKE %s",
            [f"{statement}%"],
        )
        return cursor.fetchone()[0] > 0
