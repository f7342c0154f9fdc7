"""The control arm: the same faults on plain Celery tasks, with the settings of this project.

Those are the careful ones (acks_late, reject_on_worker_lost, prefetch 1). Each test shows beside it
what the durable job does, so that a test of ours that cannot fail would be seen here.
"""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from celery import Task, current_app
from django.db import connection

from durable_jobs import JobTask
from durable_jobs.models import Job
from durable_jobs.publisher import publisher
from tests import release, tasks
from tests.conftest import CONTROL, EVERYTHING, FAST, WORK, effects, end, wait_until

State = Job.State
pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]


def succeeded():
    return Job.objects.filter(state=State.SUCCEEDED).count()


def waiting(broker):
    """Return how many messages wait in the broker, or wait to be acknowledged."""
    return broker.llen("default") + broker.hlen("unacked")


def test_the_plain_tasks_here_are_celerys_own_with_late_acknowledgement():
    assert not isinstance(tasks.plain_work, JobTask)
    assert isinstance(tasks.plain_work, Task)
    assert tasks.plain_work.acks_late
    assert tasks.plain_work.reject_on_worker_lost


def test_a_flushed_broker_loses_every_plain_task_and_no_job(broker, crew):
    for number in range(20):
        tasks.plain_work.delay(str(number))
        tasks.write.delay(str(number))
    assert publisher.flush(5)
    assert broker.llen("default") >= 21
    broker.flushall()
    assert waiting(broker) == 0
    crew(all=EVERYTHING)
    wait_until(lambda: succeeded() == 20)
    sentinel = tasks.plain_work.delay("sentinel")
    wait_until(lambda: "plain end sentinel" in effects())
    assert sentinel.id
    assert effects("plain start") == ["plain start sentinel"]
    assert len(effects("end")) == 20


def test_a_crash_between_commit_and_publish_loses_the_plain_task_and_not_the_job(broker, crew):
    script = textwrap.dedent("""
        import os
        from tests import worker_app, tasks
        from durable_jobs.publisher import publisher
        from django.db import transaction
        worker_app.app.set_default()
        publisher.send = lambda hints: None
        with transaction.atomic():
            tasks.effect("", "domain row")
            tasks.write.delay("job")
            transaction.on_commit(lambda: os._exit(9))
            transaction.on_commit(lambda: tasks.plain_work.delay("plain"))
    """)
    environment = {
        **os.environ,
        "TEST_DATABASE": connection.settings_dict["NAME"],
        "TEST_DURABLE_JOBS": '{"REPUBLISH": 1}',
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 9
    assert effects() == ["domain row"]
    assert waiting(broker) == 0
    crew(all=EVERYTHING)
    wait_until(lambda: succeeded() == 1 and waiting(broker) == 0)
    assert effects() == ["domain row", "start job", "end job"]


def test_a_worker_of_the_old_release_discards_a_plain_task_it_does_not_know(
    broker, crew, monkeypatch
):
    monkeypatch.setenv("TEST_RELEASE", "1")
    (old,) = crew(old=WORK)
    monkeypatch.delenv("TEST_RELEASE")
    release.plain_farewell.delay("ann")
    name = "unregistered task of type 'tests.release.plain_farewell'"
    wait_until(lambda: name in old.log.read_text())
    # Nothing is left that a new worker could find; test_faults_worker.py has the durable side.
    wait_until(lambda: waiting(broker) == 0)
    end([old.process])
    assert waiting(broker) == 0
    assert effects() == []


def test_a_plain_task_longer_than_the_visibility_timeout_runs_twice_at_once_and_a_job_once(
    broker, crew, monkeypatch
):
    monkeypatch.setenv("TEST_VISIBILITY_TIMEOUT", "2")
    # Two, because a worker does not fetch more messages than it has children.
    crew(work=WORK, more=WORK)
    tasks.plain_work.delay("long", seconds=5)
    job = tasks.write.delay("long", seconds=5)
    wait_until(lambda: len(effects("plain start")) >= 2)
    assert effects("plain end") == []  # the first is not over
    wait_until(lambda: Job.objects.get(pk=job.id).state == State.SUCCEEDED)
    assert effects("start") == ["start long"]
    assert Job.objects.get(pk=job.id).token == 1


def test_a_plain_task_of_a_killed_worker_waits_for_the_visibility_timeout_and_a_job_for_its_lease(
    broker, crew
):
    lost, _ = crew(lost=WORK, control=CONTROL)
    tasks.plain_work.delay("x", seconds=2)
    tasks.write.delay("x", seconds=2)
    wait_until(lambda: effects("plain start") and effects("start"))
    end([lost.process])
    crew(second=WORK)
    wait_until(lambda: succeeded() == 1)
    assert effects("start") == ["start x"] * 2
    # Celery's is held back by the broker, for 900 s and more with the settings of this project.
    assert effects("plain start") == ["plain start x"]
    assert any(b"plain_work" in message for message in broker.hvals("unacked"))
    assert current_app.conf.broker_transport_options["visibility_timeout"] > 100 * FAST["LEASE"]


def test_a_plain_task_frozen_past_its_redelivery_takes_effect_twice(broker, crew, monkeypatch):
    monkeypatch.setenv("TEST_VISIBILITY_TIMEOUT", "2")
    frozen, _ = crew(frozen="-c 2 -Q default", control=CONTROL)
    tasks.plain_work.delay("x", seconds=1)
    tasks.write_atomic.delay("x", seconds=1)
    wait_until(lambda: effects("plain start") and Job.objects.filter(state=State.RUNNING).exists())
    stopped = [frozen.process.pid, *(child.pid for child in frozen.children())]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    crew(second=WORK)
    wait_until(lambda: succeeded() == 1)
    wait_until(lambda: effects("plain end"))
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: len(effects("plain end")) == 2)
    wait_until(lambda: "had lost its lease" in frozen.log.read_text())
    assert effects("atomic") == ["atomic x"]
