"""What a body may raise or return, in every pool: each attempt ends at once, as what it is."""

import pytest
from celery import current_app

from durable_jobs import Job, run, transitions
from durable_jobs.heartbeat import heartbeat
from durable_jobs.publisher import publisher
from tests import bodies, tasks
from tests.conftest import pids, wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")
TASKS = "-Q default -I tests.bodies"
POOLS = {"prefork": "-c 1", "threads": "--pool=threads -c 2", "solo": "--pool=solo"}


def row(result):
    return Job.objects.get(pk=result.id)


@pytest.mark.parametrize("pool", POOLS)
def test_whatever_a_body_raises_is_a_failed_attempt_and_the_worker_goes_on(crew, pool):
    before = tasks.write.delay("before")
    dying = {kind: bodies.die.delay(kind) for kind in bodies.KINDS}
    twice = [bodies.die_twice.delay(kind) for kind in ("cancelled", "exit", "memory")]
    after = [bodies.die_after.delay(kind) for kind in ("cancelled", "exit", "memory")]
    publisher.flush(5)
    [worker] = crew(work=f"{POOLS[pool]} {TASKS}")
    ended = [*dying.values(), *after]
    wait_until(lambda: not Job.objects.unfinished().filter(pk__in=[j.id for j in ended]).exists())
    for kind, job in dying.items():
        found = row(job)
        assert (found.state, found.attempts) == (State.DEAD, 1), kind
        assert found.error.startswith("Traceback")
        assert f"{bodies.KINDS[kind].__name__}: " in found.error.splitlines()[-1]
        assert [kind for kind in bodies.KINDS if f"of {kind}." in found.error] == [kind]
    assert {row(job).state for job in after} == {State.SUCCEEDED}
    # Backoff is what it is for every failure, and so is the hint of the next attempt.
    wait_until(lambda: {(row(job).state, row(job).attempts) for job in twice} == {(State.DEAD, 2)})
    last = tasks.write.delay("after")
    wait_until(lambda: row(last).state == row(before).state == State.SUCCEEDED)
    assert worker.process.poll() is None
    assert len(set(pids())) == 1  # nor has a child ended


def test_a_hard_limit_gives_the_job_to_nobody_before_its_first_body_is_dead(crew):
    crew(one=f"-c 1 {TASKS}", two=f"-c 1 {TASKS}")
    job = bodies.deaf.apply_async(max_attempts=2)
    wait_until(lambda: row(job).state == State.SUCCEEDED)
    first, *between, second = pids("deaf")
    assert second not in {first, *between}


def test_a_run_that_ends_while_the_heartbeat_looks_has_lost_nothing(monkeypatch, caplog):
    job = tasks.noop.delay()
    renew = transitions.renew
    with heartbeat.by_hand():
        (mine,) = transitions.claim(current_app.tasks[tasks.noop.name], [job.job.pk], alone=True)
        heartbeat.add([mine])

        def ends_meanwhile(runs):
            found = renew(runs)
            run.write(mine, run.Succeeded(None))
            return found

        monkeypatch.setattr(transitions, "renew", ends_meanwhile)
        heartbeat.report(mine)
        heartbeat.drop(mine)
    assert row(job).state == State.SUCCEEDED
    assert not mine.lost
    assert "lost its lease" not in caplog.text
