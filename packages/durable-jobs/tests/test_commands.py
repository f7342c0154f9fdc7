"""The operator's commands: what they print and change, and what a mistake of the operator costs."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils.timezone import now

from durable_jobs import Job, database
from durable_jobs.models import LoopPass
from durable_jobs.publisher import publisher
from durable_jobs.testing import drain
from tests import tasks
from tests.conftest import terminate_connections, wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, request):
    """Keep hints from the broker: what these commands do, they do without it."""
    monkeypatch.setattr(publisher, "send", list)
    monkeypatch.setattr(publisher, "later", lambda *_: None)


def jobs(*arguments):
    output = io.StringIO()
    call_command("jobs", *arguments, stdout=output)
    return output.getvalue()


def dead(count=1):
    results = [tasks.fail_for_good.delay() for _ in range(count)]
    drain()
    return [result.id for result in results]


def test_list_prints_a_line_for_each_job_newest_first_and_can_be_narrowed():
    [failed] = dead()
    waiting = [tasks.noop.apply_async((number,), key=f"k{number}").id for number in range(3)]
    heading, *lines = jobs("list").splitlines()
    assert heading.split() == ["ID", "STATE", "AGE", "ATTEMPTS", "TASK", "KEY", "ERROR"]
    assert [line.split()[0] for line in lines] == [*reversed(waiting), failed]
    assert lines[-1].split()[1] == "dead"
    assert lines[-1].endswith("Permanent: no such account")
    for narrowed, expected in {
        ("--state", "dead"): [failed],
        ("--key", "k1"): [waiting[1]],
        ("--task", tasks.noop.name, "--limit", "1"): [waiting[2]],
        ("--error", "no such account"): [failed],
        ("--queue", "default", "--state", "queued", "--limit", "2"): waiting[:0:-1],
        (waiting[0], failed): [waiting[0], failed],
        ("--queue", "none"): [],
    }.items():
        found = [line.split()[0] for line in jobs("list", *narrowed).splitlines()[1:]]
        assert found == expected, narrowed


def test_show_prints_every_field_of_the_row():
    [failed] = dead()
    text = jobs("show", failed)
    assert failed in text
    assert {line.split()[0] for line in text.splitlines() if line} >= {
        field.name for field in Job._meta.concrete_fields
    }


def test_show_takes_the_begin_of_an_id_and_ids_that_are_no_uuid():
    first, second = tasks.noop.delay("first"), tasks.noop.delay("second")
    named = tasks.noop.apply_async(["named"], task_id="order-7")
    for begin in (first.id, first.id[:-6], first.id.replace("-", "")[:-6].upper()):
        assert "'first'" in jobs("show", begin) or '"first"' in jobs("show", begin)
    assert "named" in jobs("show", named.id)
    for end in "01":
        Job.objects.create(task="t", queue="q", due_at=now(), pk=f"{second.id[:-2]}a{end}")
    with pytest.raises(CommandError, match="several jobs begin"):
        jobs("show", f"{second.id[:-2]}a")


def test_retry_gives_a_new_budget_and_spreads_the_starts():
    ids = dead(20)
    assert jobs("retry", "--state", "dead", "--spread", "1000") == "20 jobs will run again.\n"
    dues = Job.objects.filter(pk__in=ids, attempts=0, state=State.SCHEDULED)
    distances = [(job.due_at - now()).total_seconds() for job in dues]
    assert len(distances) == 20
    assert min(distances) < 500 < max(distances) <= 1000
    assert jobs("retry", ids[0]).startswith("0 jobs will run again.\nOnly dead and cancelled jobs")


def test_retry_ends_the_pause_of_a_job_that_backs_off():
    failing = tasks.fail.delay()
    drain()
    assert failing.job.state == State.SCHEDULED
    assert jobs("retry", failing.id) == "1 job will run again.\n"
    assert failing.job.due_at <= now()
    assert (failing.job.state, failing.job.attempts) == (State.SCHEDULED, 1)


@pytest.mark.unsound
@pytest.mark.parametrize("change", ["claim", "cancel"])
def test_retry_looks_again_at_what_changed_while_it_waited(change):
    failing = tasks.fail.delay()
    drain()
    rows = Job.objects.filter(pk=failing.id)
    later = now() + timedelta(seconds=30)
    done = []

    def retry():
        done.append(rows.all().retry())
        connection.close()

    waiting = threading.Thread(target=retry)
    with transaction.atomic():
        if change == "claim":
            rows.update(state=State.RUNNING, token=2, attempts=2, due_at=later)
        else:
            rows.cancel()
        waiting.start()
        wait_until(lambda: blocked() or done, 10)
    waiting.join(10)
    if change == "claim":  # and is not taken for lost
        assert (done, failing.job.state, failing.job.due_at) == ([0], State.RUNNING, later)
    else:  # the retry came last
        assert (done, failing.job.state, failing.job.attempts) == ([1], State.SCHEDULED, 0)


def blocked():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return cursor.fetchone()[0]


def test_cancel_ends_unfinished_jobs_only():
    [failed] = dead()
    waiting = tasks.noop.delay()
    assert jobs("cancel", waiting.id, failed) == "1 job cancelled.\n"
    assert jobs("cancel", "--task", tasks.noop.name) == "0 jobs cancelled.\n"
    assert (waiting.job.state, Job.objects.get(pk=failed).state) == (State.CANCELLED, State.DEAD)


def test_stats_count_what_waits_what_is_dead_and_what_nobody_knows():
    dead(2)
    tasks.noop.delay()
    tasks.noop.apply_async(countdown=60)
    long_ago = now() - timedelta(days=2)
    door = "durable_jobs.run_django_task"
    for name, via in (("gone", None), ("os.path.join", door), ("os.gone", door)):
        options = {"via": via} if via else {}
        lost = Job.objects.filter(pk=tasks.noop.delay().id)
        lost.update(task=name, options=options, created_at=long_ago, due_at=long_ago)
    lines = [line.split() for line in jobs("stats").splitlines()]
    assert ["default", "queued", "4"] in lines
    assert ["default", "scheduled", "1"] in lines
    assert ["dead", tasks.fail_for_good.name, "2"] in lines
    unknown = [line[2] for line in lines if line[:2] == ["unknown", "task"]]
    assert sorted(unknown) == ["gone:", "os.gone:"]
    [overdue] = [line for line in lines if line[0] == "most"]
    assert float(overdue[3]) > 86_400


def test_stats_of_an_empty_table_say_whether_the_loop_is_alive():
    overdue, passed = jobs("stats").splitlines()[1:]
    assert overdue == "most overdue timer: 0.0 s"
    assert (passed, Job.objects.loop_age()) == ("last pass of the loop: never", None)
    for _ in range(2):
        call_command("reconcile", stdout=io.StringIO())
    assert LoopPass.objects.count() == 1
    assert jobs("stats").splitlines()[-1].startswith("last pass of the loop: 0.")
    LoopPass.objects.update(at=now() - timedelta(minutes=10))
    assert jobs("stats").splitlines()[-1].startswith("last pass of the loop: 60")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "no-id"], "There is no job no-id."),
        (["show", str(uuid.UUID(int=7))], f"There is no job {uuid.UUID(int=7)}."),
        (["list", "no-id"], "There is no job no-id."),
        (["retry", str(uuid.UUID(int=7))], f"There is no job {uuid.UUID(int=7)}."),
        (["cancel", "no-id"], "There is no job no-id."),
        (["cancel"], "Name jobs by id"),
        (["retry", "--spread", "5"], "Name jobs by id"),
        (["list", "--state", "broken"], "invalid choice: 'broken'"),
        (["list", "--limit", "-1"], "--limit: invalid positive value: '-1'"),
        (["list", "--limit", "many"], "--limit: invalid positive value: 'many'"),
        ([], "required: verb"),
        (["drop"], "invalid choice: 'drop'"),
    ],
)
def test_a_mistake_is_answered_with_one_line(arguments, words):
    before = tasks.noop.delay()
    with pytest.raises(CommandError) as mistake:
        jobs(*arguments)
    assert words in str(mistake.value)
    assert "\n" not in str(mistake.value)
    assert before.state == "PENDING"


def test_a_mistake_makes_the_command_fail(project_environment):
    command = [sys.executable, "-m", "django", "jobs", "show", "no-id"]
    run = subprocess.run(
        command, env=project_environment, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines()[-1] == "CommandError: There is no job no-id."


def test_reconcile_makes_one_pass_and_says_what_it_did():
    tasks.noop.delay()
    Job.objects.update(due_at=now())
    output = io.StringIO()
    call_command("reconcile", stdout=output)
    assert output.getvalue() == "1 queued; 0 inserted; 0 pruned\n"


def test_a_loop_that_is_stopped_tells_workers_of_what_it_has_just_moved(monkeypatch):
    tasks.noop.delay()
    Job.objects.update(due_at=now())
    run, sent = database.run, []

    def stopped_in_the_middle(*args, **kwargs):
        found = run(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(database, "run", stopped_in_the_middle)
    monkeypatch.setattr(publisher, "send", sent.extend)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        call_command("reconcile", loop=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [hint.state for hint in sent] == [State.QUEUED]


def queued_by(*loops):
    """Return how many jobs these loops say they have queued."""
    words = " ".join(loop.log.read_text() for loop in loops).split()
    return sum(int(words[i - 1]) for i, word in enumerate(words) if word.startswith("queued"))


@contextmanager
def closed_database():
    """Cut all connections to the database but this one, and let nobody connect."""
    name = connection.settings_dict["NAME"]
    with connection._nodb_cursor() as cursor:
        cursor.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        try:
            terminate_connections()
            yield
        finally:
            cursor.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


def test_two_loops_share_the_work_outlive_the_database_and_end_at_once(start_loop, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")  # and there is no broker
    loops = [start_loop("one"), start_loop("two")]
    first = [tasks.noop.apply_async(countdown=0.01).id for _ in range(150)]
    wait_until(lambda: Job.objects.filter(pk__in=first, state=State.QUEUED).count() == 150)
    wait_until(lambda: queued_by(*loops) == 150)
    with closed_database():
        wait_until(lambda: all("pass failed" in loop.log.read_text() for loop in loops))
    while not all("broker does not take hints" in loop.log.read_text() for loop in loops):
        second = [tasks.noop.apply_async(countdown=0.01).id for _ in range(20)]
        wait_until(
            lambda new=second: Job.objects.filter(pk__in=new, state=State.QUEUED).count() == 20
        )
    for loop in loops:
        begin, said = time.monotonic(), len(loop.log.read_text())
        loop.process.send_signal(signal.SIGTERM)
        assert loop.process.wait(10) == 0
        assert time.monotonic() - begin < 5
        assert "Traceback" not in loop.log.read_text()[said:]
