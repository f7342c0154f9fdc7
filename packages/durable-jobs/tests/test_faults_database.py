"""The database server dies, comes back, or cuts connections; somebody holds its rows locked."""

import threading
import time
from uuid import uuid4

import psutil
import psycopg
import pytest
from django.contrib.auth.models import Group
from django.contrib.contenttypes.models import ContentType
from django.core.management import call_command
from django.db import OperationalError, connection, transaction
from django.db.models.functions import Now

from durable_jobs.models import Job
from durable_jobs.reconcile import fire_timers
from tests import tasks
from tests.conftest import (
    CONTROL,
    EVERYTHING,
    FAST,
    effects,
    open_transaction,
    terminate_connections,
    wait_until,
)

State = Job.State
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.faults,
    pytest.mark.skipif(
        connection.vendor != "postgresql", reason="needs a server with connections to cut"
    ),
]


def succeeded():
    return Job.objects.filter(state=State.SUCCEEDED).count()


def test_all_connections_cut_while_idle_cost_no_job_and_no_plain_task(crew):
    crew(all=EVERYTHING)
    for number in range(10):  # every child has its connection now
        tasks.plain_write.delay(f"warm {number}")
        tasks.write.delay(f"warm {number}")
    wait_until(lambda: len(effects("start warm")) == 20 and succeeded() == 10)
    assert terminate_connections() >= 3
    for number in range(20):
        tasks.plain_write.delay(f"plain {number}")
        tasks.write.delay(f"job {number}")
    wait_until(lambda: len(effects("end job")) == 20)
    wait_until(lambda: len(effects("start plain")) == 20)
    wait_until(lambda: succeeded() == 30)
    assert len(set(effects("start plain"))) == len(set(effects("end job"))) == 20


def test_connections_cut_in_the_middle_of_a_task_lose_no_job_and_double_no_atomic_effect(crew):
    (worker,) = crew(all="-B -s {folder}/beat -c 4 -Q default,control")
    atomic = tasks.write_atomic.delay("x", seconds=2)
    silent = tasks.nap.delay(2)
    loud = tasks.write.delay("y", seconds=2)
    wait_until(lambda: Job.objects.filter(state=State.RUNNING).count() == 3)
    wait_until(lambda: effects("start y"))
    assert terminate_connections() >= 3
    wait_until(lambda: succeeded() == 3)
    assert effects("atomic") == ["atomic x"]
    assert effects("end") == ["end y"]
    assert Job.objects.get(pk=atomic.id).attempts == 2
    assert Job.objects.get(pk=loud.id).attempts == 2
    # Its body did not notice, and its end is written on another connection.
    assert Job.objects.get(pk=silent.id).attempts == 1
    assert worker.process.poll() is None


def test_a_row_that_a_user_holds_locked_makes_neither_loop_nor_worker_wait(crew, start_loop):
    start_loop()
    crew(work="-c 1 -Q default")
    held = [tasks.write.apply_async(["held"], countdown=1) for _ in range(50)]
    rows = Job.objects.filter(pk__in=[job.id for job in held])
    with open_transaction(lambda: list(rows.select_for_update())):
        free = [tasks.write.apply_async([f"free {n}"], countdown=1) for n in range(50)]
        wait_until(lambda: len(effects("end free")) == len(free), 15)
        begin = time.monotonic()
        assert fire_timers().total() == 0
        assert time.monotonic() - begin < 0.5
        assert rows.filter(state=State.SCHEDULED).overdue(0).count() == 50
        assert waiting_for_locks() == 0
    wait_until(lambda: len(effects("end held")) == 50)
    assert not Job.objects.exclude(attempts=1).exists()


def test_a_user_who_holds_a_running_job_locked_stops_no_heartbeat(crew):
    crew(work="-c 1 -Q default", control=CONTROL)
    tasks.write.enqueue_many([["warm up"]] * 60)
    wait_until(lambda: succeeded() == 60)
    # Of a slice, so that the heartbeat's thread is the one to write its end.
    slow, *_ = tasks.write.enqueue_many([["slow", 1], ["next"], ["next"]])
    wait_until(lambda: effects("start slow"))
    locked, release = threading.Event(), threading.Event()

    def hold():
        with transaction.atomic():
            list(Job.objects.select_for_update().filter(pk=slow))
            locked.set()
            release.wait(60)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert locked.wait(10)
        long = tasks.write.delay("long", seconds=2 * FAST["LEASE"])
        wait_until(lambda: Job.objects.get(pk=long.id).state == State.SUCCEEDED)
        assert Job.objects.get(pk=slow).state == State.RUNNING
        wait_until(lambda: succeeded() == 60 + 3)
    finally:
        release.set()
        thread.join()
    wait_until(lambda: Job.objects.get(pk=slow).state == State.SUCCEEDED)
    assert effects("start long") == ["start long"]
    assert effects("start slow") == ["start slow"]


def waiting_for_locks():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return cursor.fetchone()[0]


@pytest.mark.unsound
def test_a_failover_that_forgot_a_claim_runs_the_job_twice_for_one_effect(crew):
    (worker,) = crew(all=EVERYTHING)
    job = tasks.write_atomic.delay("x", seconds=3)
    wait_until(lambda: Job.objects.filter(state=State.RUNNING, token=1).exists())
    first = Job.objects.get(pk=job.id).worker
    # What a standby knows that was promoted before the claim reached it: even the token is free.
    Job.objects.update(state=State.QUEUED, token=0, attempts=0, worker="", due_at=Now())
    wait_until(lambda: Job.objects.filter(state=State.RUNNING, token=1).exists())
    assert Job.objects.get(pk=job.id).worker != first
    wait_until(lambda: "had lost its lease" in worker.log.read_text())
    assert Job.objects.get(pk=job.id).state == State.SUCCEEDED
    assert effects("atomic") == ["atomic x"]


@pytest.fixture
def own_server(jobs_db, tmp_path, monkeypatch):
    """A PostgreSQL of this test alone, which it may kill; everything here talks to it."""
    postgres = pytest.importorskip("devstack.postgres", reason="starts a server with devstack")
    processes = pytest.importorskip("devstack.processes")
    server, url = postgres.process(tmp_path / "postgres", durable=False)
    server.start()
    processes.wait_until_ready([server])
    connection.close()
    place = psycopg.conninfo.conninfo_to_dict(url)
    names = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host"}
    with monkeypatch.context() as patch:
        patch.setenv("DATABASE_URL", url)
        for name, word in {**names, "PORT": "port"}.items():
            patch.setitem(connection.settings_dict, name, place[word])
        call_command("migrate", verbosity=0)
        with connection.cursor() as cursor:
            cursor.execute(tasks.CREATE_TABLE)
        yield server
        connection.close()
    processes.stop([server])


def test_a_database_killed_under_load_and_started_again_loses_no_job(own_server, crew, start_loop):
    loop = start_loop()
    (worker,) = crew(all=EVERYTHING)
    jobs = [tasks.write_atomic.delay(f"{number}.", seconds=0.1) for number in range(60)]
    wait_until(lambda: succeeded() >= 5)
    pid = own_server.pid
    own_server.send(9)
    wait_until(lambda: not own_server.running)
    connection.close()
    with pytest.raises(OperationalError):
        Job.objects.count()
    time.sleep(2)  # an outage takes its time
    wait_until(lambda: restart(own_server))
    assert own_server.pid != pid
    # What was committed is there, and not all was done yet.
    assert Job.objects.count() == 60
    assert 5 <= succeeded() < 60
    wait_until(lambda: succeeded() == len(jobs), 60)
    assert sorted(effects("atomic")) == sorted(f"atomic {number}." for number in range(60))
    assert worker.process.poll() is None
    assert loop.process.poll() is None
    assert "pass failed" in loop.log.read_text()


def restart(server):
    """Start it; it refuses while a process of its former life is still there."""
    if not server.running:
        server.start()
    connection.close()
    return server.ready()


class Beat:
    """A beat with a durable and a plain entry, each second."""

    def __init__(self, log):
        self.log = log

    def sent(self, name="write"):
        return self.log.read_text().count(f"Sending due task tick {name} ")

    def settled(self, at_least):
        """Return whether each tick so far is one job, and fail if one is two."""
        made = Job.objects.filter(task=tasks.write.name).count()
        sent = self.sent()
        assert made <= sent
        return sent == made >= at_least


@pytest.fixture
def beat(monkeypatch, own_server, crew):
    monkeypatch.setenv("TEST_TICKS", "1")
    [control] = crew(control=CONTROL)
    beat = Beat(control.log)
    wait_until(lambda: beat.settled(1))
    return beat


def test_periodic_calls_on_connections_that_were_cut_are_made_once(beat):
    for _ in range(3):
        before = beat.sent()
        assert terminate_connections() >= 1
        wait_until(lambda before=before: beat.settled(before + 2))


def test_periodic_calls_outlive_sessions_that_the_server_ends_while_idle(beat):
    with connection.cursor() as cursor:
        cursor.execute("ALTER ROLE CURRENT_USER SET idle_session_timeout = '300ms'")
    terminate_connections()
    before = beat.sent()

    def settled():
        connection.close()  # this one does not live longer
        return beat.settled(before + 8)

    wait_until(settled)


def test_periodic_calls_are_made_once_when_the_database_is_back(beat, own_server):
    before, plain = beat.sent(), beat.sent("plain_write")
    connection.close()
    own_server.send(9)
    wait_until(lambda: not own_server.running)
    # Beat itself waits for nothing.
    wait_until(lambda: beat.sent("plain_write") >= plain + 4)
    wait_until(lambda: restart(own_server))
    wait_until(lambda: beat.settled(before + 4))
    assert "periodic calls wait for the database" in beat.log.read_text()


def test_a_database_that_neither_answers_nor_refuses_holds_up_no_entry(beat, own_server):
    before, plain = beat.sent(), beat.sent("plain_write")
    server = psutil.Process(own_server.pid)
    frozen = [server, *server.children(recursive=True)]
    try:
        for process in frozen:
            process.suspend()
        wait_until(lambda: beat.sent("plain_write") >= plain + 5)
    finally:
        for process in frozen:
            process.resume()
    wait_until(lambda: beat.settled(before + 5))


CALLS = {
    "delay": lambda: tasks.write.delay("x"),
    "key": lambda: tasks.write.apply_async(["x"], key="x"),
    "owner": lambda: tasks.write.apply_async(["x"], owner=Group(pk=1)),
    "many": lambda: tasks.write.enqueue_many([["x"], ["x"]]),
    "many with keys": lambda: tasks.write.enqueue_many([["x"], ["x"]], key=lambda call: "x"),
    "result": lambda: tasks.write.AsyncResult(str(uuid4())).state,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_on_a_connection_that_was_cut_is_made_on_another(jobs_db, broker, call):
    CALLS[call]()
    made = Job.objects.count()
    cut(connection)
    ContentType.objects.clear_cache()
    CALLS[call]()
    again = 0 if "key" in call else made
    assert Job.objects.count() == made + again


def test_a_call_whose_connection_breaks_after_it_was_written_is_one_job(jobs_db, broker):
    def breaks(execute, sql, *rest):
        result = execute(sql, *rest)
        if "INSERT INTO durable_jobs_job" in sql and not broken:
            broken.append(sql)
            cut(connection)
            connection.execute_wrappers.clear()
            connection.cursor().execute("SELECT 1")
        return result

    for call in (tasks.write.delay, lambda note: tasks.write.apply_async([note], key="x")):
        broken = []
        connection.execute_wrappers.append(breaks)
        job = call("x")
        assert broken
        assert Job.objects.filter(pk=job.id).delete()[0] == 1
        assert not Job.objects.exists()


def cut(mine):
    """End a connection behind the back of the process that has it."""
    with mine.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()

    def end():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        connection.close()

    other = threading.Thread(target=end)
    other.start()
    other.join(10)
