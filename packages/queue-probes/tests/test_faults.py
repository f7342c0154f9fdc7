"""Each fault is really caused; the verdict names it, and the time that takes is printed."""

import signal
import socket
import time

import pytest
import redis
from celery import current_app
from django.db import connections
from django.test import Client

from queue_probes.models import Node, Queue, Sample
from queue_probes.probe import probe
from tests.conftest import answered, states, wait_until
from tests.fast_settings import QUEUE_PROBES
from tests.slow import sleep

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]
# Detection is late by the interval of beat, the threshold, and the work of the machine.
LONGEST = QUEUE_PROBES["THRESHOLDS"]["low"] + 8


def becomes(expected, queues=("default", "high", "low"), longest=LONGEST):
    """Wait until all these queues are in that state, and print how long it took."""
    begin = time.monotonic()
    wait_until(
        lambda: {queue: states()[queue] for queue in queues} == dict.fromkeys(queues, expected),
        longest,
        f"{expected}: {states()}",
    )
    print(f"{expected} after {time.monotonic() - begin:.1f} s")


def answer():
    """Return status code and queues as a load balancer sees them."""
    response = Client().get("/healthz/queues")
    return response.status_code, response.json()


def test_probes_arrive_on_every_queue_and_are_timed(crew):
    crew.everybody()
    status, body = answer()
    assert (status, body["status"]) == (200, "ok")
    assert set(body["queues"]) == {"control", "default", "high", "low"}
    for queue, worker in (("control", "control@test"), ("low", "work@test")):
        found = body["queues"][queue]
        assert (found["release"], found["worker"]) == ("r1", worker)
        assert 0 < found["latency"] < QUEUE_PROBES["THRESHOLD"]
    assert Sample.objects.count() >= 4
    rows = Queue.objects.all()
    assert [sum(row.buckets) for row in rows] == [row.answers for row in rows]


def test_probes_arrive_where_durable_jobs_is_not_installed(crew):
    crew.environment["DJANGO_SETTINGS_MODULE"] = "tests.alone_settings"
    crew.everybody()
    for log in crew.folder.glob("*.log"):
        assert "queue_probes: " not in log.read_text(), "a warning"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_beat_that_is_dead_or_frozen(crew, number):
    crew.everybody()
    crew.signal("beat", number)
    becomes("beat_dead", ("control", "default", "high", "low"))
    assert answer()[0] == 503


def test_a_worker_that_was_killed(crew):
    crew.everybody()
    crew.signal("work", signal.SIGKILL)
    becomes("worker_dead")
    status, body = answer()
    assert (status, body["queues"]["control"]["state"]) == (503, "ok")
    crew.worker("again", "default,high,low")
    becomes("ok")


def test_a_worker_that_is_frozen_and_goes_on(crew):
    crew.everybody()
    crew.signal("work", signal.SIGSTOP)
    becomes("worker_stopped")
    crew.signal("work", signal.SIGCONT)
    becomes("ok")


def test_a_pool_whose_processes_are_stuck(crew):
    crew.everybody()
    crew.signal("work", signal.SIGSTOP, main=False)
    becomes("wedged")
    assert states()["control"] == "ok"


def test_a_pool_whose_processes_are_stopped_in_the_middle_of_a_task(crew):
    crew.everybody()
    sleep.apply_async((600,), queue="default")
    wait_until(lambda: Node.objects.get(name="work@test").active == 1)
    crew.signal("work", signal.SIGSTOP, main=False)
    becomes("wedged")
    assert answer()[0] == 503


def test_a_task_that_hangs_in_every_process(crew):
    crew.everybody()
    sleep.apply_async((600,), queue="default")
    becomes("busy")
    assert answer()[0] == 200
    becomes("full", longest=QUEUE_PROBES["FULL_FACTOR"] * LONGEST)
    status, body = answer()
    assert (status, body["queues"]["control"]["state"]) == (503, "ok")
    assert body["queues"]["low"]["oldest"] > 2 * QUEUE_PROBES["THRESHOLDS"]["low"]


def test_a_queue_without_a_consumer(crew):
    crew.beat()
    crew.worker("work", "default,high")
    # Beat and worker have started, however busy the machine is.
    wait_until(lambda: Sample.objects.filter(queue="high").exists(), 60)
    becomes("no_worker", ("low", "control"))
    becomes("ok", ("default", "high"))


def test_a_worker_that_is_stopped_properly_leaves_no_row(crew):
    crew.everybody()
    crew.started["work"].popen.terminate()
    assert crew.started["work"].popen.wait(30) == 0
    assert not Node.objects.filter(name="work@test").exists()
    becomes("no_worker")


def test_a_long_backlog_that_moves_is_busy_and_no_fault(crew):
    crew.everybody()
    for _ in range(80):
        sleep.apply_async((0.1,), queue="default")
    becomes("busy", ["default"])
    assert answer()[0] == 200
    assert Queue.objects.get(name="default").depth > 0
    becomes("ok", ["default"])


def test_long_tasks_in_every_process_of_a_worker_are_busy_and_no_fault(crew):
    crew.everybody()
    for _ in range(2):
        sleep.apply_async((QUEUE_PROBES["THRESHOLDS"]["low"] + 3,), queue="default")
    becomes("busy")
    seen = set()
    wait_until(lambda: seen.update(states().values()) or states()["default"] == "ok", 40)
    assert seen <= {"ok", "busy"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_broker_that_is_down_or_frozen(own_broker, crew, number):
    crew.everybody()
    own_broker.send(number)
    wait_until(lambda: number == signal.SIGSTOP or not own_broker.running)
    begin = time.monotonic()
    wait_until(lambda: set(states().values()) == {"broker_down"}, 20, str(states()))
    print(f"broker_down after {time.monotonic() - begin:.1f} s")
    assert answer()[0] == 503
    if number == signal.SIGSTOP:
        own_broker.send(signal.SIGCONT)
    else:
        own_broker.start()
    wait_until(lambda: set(states().values()) == {"ok"}, 60, str(states()))


def test_probes_that_a_flushed_broker_lost_are_sent_again(crew):
    crew.everybody()
    crew.signal("work", signal.SIGSTOP)
    broker = redis.Redis.from_url(current_app.conf.broker_url)
    wait_until(lambda: broker.llen("default"), 10)
    broker.delete("default", "high", "low")
    crew.signal("work", signal.SIGKILL)
    crew.worker("again", "default,high,low")
    wait_until(lambda: set(states().values()) == {"ok"} and answered(), 30, str(states()))


def test_one_probe_at_a_time_waits_in_a_queue_that_nobody_serves(crew, settings):
    crew.beat()
    broker = redis.Redis.from_url(current_app.conf.broker_url)

    def said():
        row = Queue.objects.filter(name="low").first() or Queue()
        return [row.sends, row.depth]

    # One message and its copies at doubled intervals: noted, there, and counted a moment later.
    wait_until(lambda: said() == [broker.llen("low")] * 2 and broker.llen("low") >= 3, 40)
    assert broker.llen("low") <= 5


def test_an_answer_that_comes_twice_counts_once(crew):
    crew.everybody()
    row = Queue.objects.get(name="default")
    crew.signal("beat", signal.SIGKILL)
    probe.apply_async(("default", str(row.probe)), queue="default")
    probe.apply_async(("default", str(row.probe)), queue="default")
    becomes("beat_dead", ["default"])
    after = Queue.objects.get(name="default")
    assert after.answers - row.answers <= 1
    assert sum(after.buckets) == after.answers


@pytest.fixture
def black_hole():
    """A port that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_database_that_is_down_or_silent_is_named_in_time(
    fast, settings, black_hole, free_port, kind
):
    settings.QUEUE_PROBES = {**QUEUE_PROBES, "TIMEOUT": 1}
    database = connections["default"]
    database.close()
    port = database.settings_dict["PORT"]
    database.settings_dict["PORT"] = {"refused": free_port, "silent": black_hole}[kind]
    database.settings_dict["HOST"], host = "127.0.0.1", database.settings_dict["HOST"]
    begin = time.monotonic()
    try:
        status, body = answer()
    finally:
        database.settings_dict.update(PORT=port, HOST=host)
    assert (status, body["status"]) == (503, "database_down")
    assert time.monotonic() - begin < 2
