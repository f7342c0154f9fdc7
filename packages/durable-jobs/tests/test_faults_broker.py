"""The broker loses what it holds, dies and comes back; a backlog that stands causes no storm."""

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter

import pytest
import redis
from celery import current_app
from django.db import connection
from django.db.models import F, Max
from django.db.models.functions import Now

from durable_jobs.models import Job
from durable_jobs.publisher import publisher
from durable_jobs.reconcile import fire_timers
from tests import tasks
from tests.conftest import EVERYTHING, FAST, effects, now, wait_until

State = Job.State
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]


def succeeded():
    return Job.objects.filter(state=State.SUCCEEDED).count()


def hints_of_each_job(broker):
    """Return how often each job is named by the messages that wait in the broker."""
    found = Counter()
    for message in broker.lrange("default", 0, -1):
        found.update(json.loads(message)["headers"]["durable_jobs"])
    return found


def test_two_hundred_jobs_whose_hints_were_flushed_are_done_in_twice_their_wait(broker, crew):
    for number in range(200):
        tasks.write.delay(str(number))
    assert publisher.flush(5)
    assert sum(hints_of_each_job(broker).values()) == 200
    broker.flushall()
    assert broker.keys() == []
    flushed = now()
    crew(all=EVERYTHING)
    wait_until(lambda: succeeded() == 200, 60)
    ends = Job.objects.aggregate(last=Max("finished_at"))["last"]
    assert (ends - flushed).total_seconds() < 2 * FAST["REPUBLISH"] + FAST["TICK"] + 15
    assert sorted(effects("end")) == sorted(f"end {number}" for number in range(200))
    assert not Job.objects.exclude(attempts=1, token=1).exists()


def test_a_process_that_dies_between_commit_and_publish_loses_no_job(broker, crew):
    crew(all=EVERYTHING)
    script = textwrap.dedent("""
        import os
        from tests import worker_app, tasks
        from durable_jobs.publisher import publisher
        from django.db import transaction
        publisher.send = lambda hints: os._exit(9)
        worker_app.app.set_default()
        with transaction.atomic():
            tasks.write.delay("x")
    """)
    environment = {
        **os.environ,
        "TEST_DATABASE": connection.settings_dict["NAME"],
        "TEST_DURABLE_JOBS": json.dumps(FAST),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 9
    assert Job.objects.filter(state=State.QUEUED, token=0).count() == 1
    assert broker.llen("default") == 0
    wait_until(lambda: effects("end") == ["end x"])
    row = Job.objects.get()
    waited = (row.started_at - row.created_at).total_seconds()
    assert FAST["REPUBLISH"] <= waited < FAST["REPUBLISH"] + FAST["TICK"] + 3


def test_a_flush_under_load_stops_neither_beat_nor_workers(broker, crew):
    (worker,) = crew(all=EVERYTHING)
    for round_ in range(3):
        for number in range(20):
            tasks.write.delay(f"{round_} {number}", seconds=0.05)
        wait_until(lambda: effects("start"))
        assert broker.dbsize() > 0
        broker.flushall()
    wait_until(lambda: succeeded() == 60)
    assert worker.process.poll() is None
    assert len(set(effects("end"))) == len(effects("end")) == 60


def test_a_standing_backlog_gets_six_hints_a_job_in_twenty_waits(broker, start_loop, monkeypatch):
    # Intervals double with the time waited: 0.5 s, 1, 2, 4, 8. A fixed one would send twenty.
    monkeypatch.setitem(FAST, "REPUBLISH", 0.5)
    monkeypatch.setitem(FAST, "REPUBLISH_MAX", 900)
    start_loop("one")
    start_loop("two")
    jobs = tasks.noop.enqueue_many([[number] for number in range(1200)])
    queued = Job.objects.aggregate(at=Max("queued_at"))["at"]
    # Nobody works: time passes, and what the loops publish is counted.
    wait_until(lambda: (now() - queued).total_seconds() >= 20 * FAST["REPUBLISH"])
    hints = hints_of_each_job(broker)
    waits = (now() - queued).total_seconds() / FAST["REPUBLISH"]
    assert set(hints) == {str(job) for job in jobs}
    assert min(hints.values()) >= 2
    assert max(hints.values()) <= 2 + int(math.log2(waits))
    # A message names many jobs, so a backlog costs the broker little.
    assert broker.llen("default") < 1200 / 10
    assert Job.objects.filter(state=State.QUEUED, due_at__gt=F("queued_at")).count() == 1200


@pytest.fixture
def own_broker(tmp_path, monkeypatch):
    """A Valkey of this test alone, which it may kill; everything here publishes to it."""
    valkey = pytest.importorskip("devstack.valkey", reason="starts its own broker with devstack")
    processes = pytest.importorskip("devstack.processes")
    server, url = valkey.process(tmp_path / "valkey")
    server.start()
    processes.wait_until_ready([server])
    # Celery asks the environment first, here and in the workers.
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        monkeypatch.setenv(name, url)
    assert current_app.conf.broker_read_url == current_app.conf.broker_write_url == url
    publisher.reset()
    yield server
    publisher.reset()
    processes.stop([server])


def test_a_broker_killed_under_load_and_started_again_loses_no_job(own_broker, crew):
    crew(all=EVERYTHING)
    for number in range(30):
        tasks.write.delay(f"before {number}", seconds=0.1)
    wait_until(lambda: effects("start"))
    own_broker.send(9)
    wait_until(lambda: not own_broker.running)
    with pytest.raises(redis.exceptions.ConnectionError):
        redis.Redis.from_url(current_app.conf.broker_url).ping()
    slowest = 0.0
    for number in range(30):
        begin = time.perf_counter()
        tasks.write.delay(f"during {number}")
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 0.2
    wait_until(lambda: publisher.failures > 0)
    assert effects("start during") == []
    own_broker.start()
    wait_until(lambda: succeeded() == 60, 60)
    assert len(effects("end")) == len(set(effects("end"))) == 60


def test_a_queue_that_the_broker_refuses_holds_up_no_other(broker, crew, caplog):
    crew(work="-c 1 -Q default")
    broker.set("low", "not a list")
    for number in range(10):
        tasks.write.apply_async(["low"], queue="low")
        tasks.write.delay(str(number))
    wait_until(lambda: len(effects("end")) == 10, 20)
    assert publisher.failures == 0
    assert "broker refuses queue 'low'" in caplog.text
    # Its hints were dropped, its jobs are safe.
    assert Job.objects.filter(queue="low", state=State.QUEUED).count() == 10
    broker.delete("low")
    Job.objects.filter(queue="low").update(due_at=Now())
    assert fire_timers() == {State.QUEUED: 10}
    assert publisher.flush(10)
    assert broker.llen("low") > 0


def test_a_broker_without_memory_gets_the_hints_once_it_has_some(own_broker, jobs_db):
    full = redis.Redis.from_url(current_app.conf.broker_url)
    full.config_set("maxmemory", 1)
    tasks.write.delay("x")
    wait_until(lambda: publisher.failures > 0)
    assert full.llen("default") == 0
    full.config_set("maxmemory", 0)
    wait_until(lambda: full.llen("default") == 1)
    full.close()


@pytest.mark.unsound
def test_the_loop_heals_states_while_the_broker_is_down(own_broker, jobs_db, start_loop):
    own_broker.send(9)
    wait_until(lambda: not own_broker.running)
    loop = start_loop()
    with connection.cursor() as cursor:
        job = tasks.noop.apply_async(countdown=0.1)
        lost = tasks.noop.delay()
        cursor.execute(
            "UPDATE durable_jobs_job SET state = 'running', attempts = 8, due_at = now()"
            " WHERE id = %s",
            [lost.id],
        )
    wait_until(lambda: Job.objects.get(pk=lost.id).state == State.DEAD)
    wait_until(lambda: Job.objects.get(pk=job.id).state == State.QUEUED)
    wait_until(lambda: "broker does not take hints" in loop.log.read_text())
    assert loop.process.poll() is None
