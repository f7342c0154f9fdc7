"""What a task does to its database session reaches neither its end nor the next task."""

import pytest
from celery import Task, shared_task
from django.db import connection

from durable_jobs import Job, JobTask
from durable_jobs.session import changes
from tests.conftest import effects, wait_until
from tests.tasks import effect

State = Job.State
pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(connection.vendor != "postgresql", reason="needs PostgreSQL's sessions"),
]
LEFT = {
    "read only": "SET default_transaction_read_only = on",
    "role": "/* mine */ SET ROLE pg_monitor",
    "lock": "SELECT pg_advisory_lock(42)",
    "table": "CREATE TEMPORARY TABLE leftover (id int)",
    "channel": "LISTEN leftover",
    "setting": "SELECT 1; -- two\nSELECT set_config('app.tenant', 'x', false)",
    "transaction": "BEGIN",
}
SEEN = """SELECT current_setting('default_transaction_read_only'), current_user = session_user,
  (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
  to_regclass('pg_temp.leftover'), (SELECT count(*) FROM pg_listening_channels()),
  COALESCE(current_setting('app.tenant', true), '')"""
CLEAN = ("off", True, 0, None, 0, "")


def leave(statement, fails):
    with connection.cursor() as cursor:
        cursor.execute(statement)
    if fails:
        raise ValueError(statement)


@shared_task(base=JobTask, max_attempts=1)
def leaves(statement, fails=False):
    leave(statement, fails)


@shared_task(base=JobTask, max_attempts=1, atomic=True)
def leaves_in_transaction(statement, fails=False):
    leave(statement, fails)


@shared_task(base=Task)
def plain_leaves(statement, fails=False):
    leave(statement, fails)


def look(note):
    with connection.cursor() as cursor:
        cursor.execute(SEEN)
        seen = cursor.fetchone()
    effect(None, f"{note} {'clean' if seen == CLEAN else seen}")


@shared_task(base=JobTask)
def looks(note):
    look(note)


@shared_task(base=Task)
def plain_looks(note):
    look(note)


def seen(task, note):
    """Run it; return what it saw."""
    task.delay(note)
    wait_until(lambda: effects(note))
    return effects(note)[0].removeprefix(f"{note} ")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_a_task_leaves_on_its_session_reaches_nobody(crew, pool):
    crew(work=f"--pool={pool} -c 1 -Q default -I tests.test_session")
    assert seen(looks, "before") == "clean"
    for name, statement in LEFT.items():
        for fails in (False, True):
            job = leaves.delay(statement, fails)
            wait_until(lambda job=job: job.job.state in (State.SUCCEEDED, State.DEAD))
            assert job.job.state == (State.DEAD if fails else State.SUCCEEDED), job.job.error
            assert not fails or f"ValueError: {statement}" in job.job.error
            assert seen(plain_looks, f"{name} {fails} plain") == "clean"
            plain_leaves.delay(statement, fails)
            assert seen(looks, f"{name} {fails} after plain") == "clean"
            plain_leaves.delay(statement, fails)
            assert seen(plain_looks, f"{name} {fails} plain after plain") == "clean"


def test_what_an_atomic_task_leaves_on_its_session_reaches_nobody(crew):
    crew(work="-c 1 -Q default -I tests.test_session")
    for name in ("read only", "lock", "table", "channel", "setting"):
        for fails in (False, True):
            job = leaves_in_transaction.delay(LEFT[name], fails)
            wait_until(lambda job=job: job.job.state in (State.SUCCEEDED, State.DEAD))
            assert job.job.state == (State.DEAD if fails else State.SUCCEEDED), job.job.error
            assert seen(plain_looks, f"{name} {fails} plain") == "clean"


@shared_task(base=JobTask)
def notes_its_session(number):
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('app.tenant', 'x', true), pg_backend_pid()")
        effect(None, f"session {cursor.fetchone()[1]} {number}")


def test_a_task_that_changes_nothing_keeps_its_connection(crew):
    crew(work="-c 1 -Q default -I tests.test_session")
    for number in range(20):
        notes_its_session.delay(number)
    wait_until(lambda: len(effects("session")) == 20)
    assert len({note.split()[1] for note in effects("session")}) == 1


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        *((statement, True) for statement in LEFT.values()),
        ("reset all", True),
        ("SELECT * INTO TEMP t FROM a", True),
        ("SELECT set_config('a.b', %s, %s)", True),
        ("SELECT pg_try_advisory_lock_shared(1)", True),
        ("SET LOCAL ROLE x", False),
        ("SET CONSTRAINTS ALL IMMEDIATE", False),
        ("SELECT pg_advisory_xact_lock(1)", False),
        ("SELECT set_config('a.b', 'c', true)", False),
        ('UPDATE "a" SET "b" = 1', False),
        ("SELECT 'SET x'", False),
    ],
)
def test_statements_that_change_a_session_are_told_from_others(statement, expected):
    assert changes(statement) == expected
