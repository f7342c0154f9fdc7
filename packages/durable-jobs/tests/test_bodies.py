"""What a body may raise or return, in every pool: each attempt ends at once, as what it is."""

import asyncio

import pytest
from celery import current_app
from django.contrib.auth.models import Group

from durable_jobs import Job, JobTask, run, transitions
from durable_jobs.heartbeat import heartbeat
from durable_jobs.publisher import publisher
from durable_jobs.testing import drain
from tests import bodies, tasks
from tests.conftest import effects, pids, wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")
TASKS = "-Q default -I tests.bodies"
POOLS = {"prefork": "-c 1", "threads": "--pool=threads -c 2", "solo": "--pool=solo"}


def row(result):
    return Job.objects.get(pk=result.id)


@pytest.mark.parametrize("pool", POOLS)
def test_whatever_a_body_raises_is_a_failed_attempt_and_the_worker_goes_on(crew, start_loop, pool):
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
    start_loop()  # a hint may come too early, or not at all
    wait_until(lambda: {(row(job).state, row(job).attempts) for job in twice} == {(State.DEAD, 2)})
    last = tasks.write.delay("after")
    wait_until(lambda: row(last).state == row(before).state == State.SUCCEEDED)
    assert worker.process.poll() is None
    assert len(set(pids())) == 1  # nor has a child ended


def test_a_hard_limit_gives_the_job_to_nobody_before_its_first_body_is_dead(crew):
    crew(one=f"-c 1 {TASKS}", two=f"-c 1 {TASKS}")
    job = bodies.deaf.apply_async(max_attempts=2)
    wait_until(lambda: row(job).state == State.SUCCEEDED, 60)
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


@pytest.mark.parametrize("pool", [*POOLS, "drain", "eager"])
def test_a_coroutine_runs_in_the_tasks_own_thread_and_on_its_connection(crew, pool, settings):
    if pool == "eager":
        job = bodies.told.apply(args=(1,), kwargs={"y": 2})
        found = job.get()
        assert found.pop("job") == found.pop("request") == found.pop("current") == job.id
        assert found == {"sum": 3, "thread": True, "backend": 1}
        return
    job = bodies.told.delay(1, y=2)
    publisher.flush(5)
    if pool == "drain":
        drain()
    else:
        crew(work=f"{POOLS[pool]} {TASKS}")
    wait_until(lambda: row(job).state != State.QUEUED and row(job).state != State.RUNNING)
    assert row(job).error == ""
    about = dict.fromkeys(("request", "job", "current"), job.id)
    assert row(job).result == {"sum": 3, "thread": True, "backend": 1, **about}


@pytest.mark.parametrize("ends", ["", "badly"])
def test_a_coroutines_writes_fall_into_the_tasks_transaction(ends):
    job = bodies.group_and.delay("one", ends)
    drain()
    assert row(job).state == (State.DEAD if ends else State.SUCCEEDED), row(job).error
    names = [] if ends else ["one twice"]
    assert list(Group.objects.values_list("name", flat=True)) == names


def test_a_coroutine_is_retried_as_celery_does():
    by_hand, auto = bodies.retry.delay(), bodies.autoretry.delay()
    drain(everything=True)
    assert (row(by_hand).state, row(auto).state) == (State.SUCCEEDED, State.DEAD)
    assert effects("retry") == ["retry 0", "retry 1", "retry 2"]
    assert effects("autoretry") == ["autoretry 0", "autoretry 1"]
    assert "OSError: gone" in row(auto).error


def test_a_soft_limit_ends_a_coroutine_wherever_it_is(crew):
    jobs = {how: bodies.overdue.delay(how) for how in ("waits", "works", "calls")}
    crew(work=f"-c 1 {TASKS}")
    wait_until(lambda: Job.objects.unfinished().count() == 0)
    for how, job in jobs.items():
        assert row(job).state == State.DEAD
        assert "SoftTimeLimitExceeded" in row(job).error.splitlines()[-1]
        assert effects(how) == [f"{how} cleaned up"]
    assert len(set(pids())) == 1


def test_what_a_coroutine_raises_is_a_failed_attempt(crew):
    jobs = {kind: bodies.die_awaiting.delay(kind) for kind in bodies.KINDS}
    [worker] = crew(work=f"-c 1 {TASKS}")
    wait_until(lambda: Job.objects.unfinished().count() == 0)
    for kind, job in jobs.items():
        assert row(job).state == State.DEAD
        assert f"{bodies.KINDS[kind].__name__}: " in row(job).error.splitlines()[-1]
    assert worker.process.poll() is None


def test_what_a_plain_looking_body_returns_is_run_or_refused():
    jobs = {kind: bodies.looks_plain.delay(kind) for kind in ("coroutine", "generator", "stream")}
    drain()
    assert row(jobs["coroutine"]).state == State.SUCCEEDED
    for kind in ("generator", "stream"):
        assert (row(jobs[kind]).state, row(jobs[kind]).attempts) == (State.DEAD, 1)
        assert "a generator, whose code nobody runs" in row(jobs[kind]).error
    assert effects() == ["later"]


def test_a_generator_is_refused_where_it_is_defined():
    def items():
        yield

    async def stream():
        yield

    for body in (items, stream):
        with pytest.raises(TypeError, match=r"bodies\.refused is a generator \('yield'\)"):
            current_app.task(base=JobTask, name="tests.bodies.refused", lazy=False)(body)
        del current_app.tasks["tests.bodies.refused"]


def test_a_coroutine_called_directly_is_the_callers_to_await():
    async def caller():
        return await bodies.told(1)

    with pytest.raises(AssertionError):  # `side` asks for the request, and there is none
        asyncio.run(caller())
