"""Django's tasks in real workers, which never heard of this module when they started."""

import time

import pytest
from django.db import transaction
from django.utils import timezone

from durable_jobs.models import Job
from durable_jobs.publisher import publisher
from tests.conftest import effects, wait_until
from tests.tasks import effect

backends = pytest.importorskip("durable_jobs.backends", reason="needs Django 6 or django-tasks")
api = pytest.importorskip(backends.TaskResult.__module__.partition(".base")[0])
Status = backends.TaskResultStatus
State = Job.State
pytestmark = pytest.mark.django_db(transaction=True)


@api.task
def add(x, y=0):
    return x + y


@api.task
async def add_async(x, y=0):
    return x + y


@api.task(takes_context=True)
def about(context, *args):
    return [context.task_result.id, context.attempt, context.task_result.status, list(args)]


@api.task(takes_context=True)
def write(context, note, seconds=0.0):
    effect(context.task_result.id, f"start {note}")
    time.sleep(seconds)
    effect(context.task_result.id, f"end {note}")
    return note


def test_a_worker_runs_tasks_of_modules_it_never_imported(start_worker):
    work = start_worker()
    assert __name__ not in work.log.read_text()
    results = [add.enqueue(1, 2), add_async.enqueue(3, 4), about.enqueue(5)]
    for result in results:
        wait_until(lambda result=result: result.refresh() or result.is_finished)
    assert [result.return_value for result in results[:2]] == [3, 7]
    assert results[2].return_value == [results[2].id, 1, "RUNNING", [5]]
    # Whatever the project's log format: name and id of the Django task, not of the hint's one.
    lines = [line for line in work.log.read_text().splitlines() if results[0].id in line]
    assert lines
    assert all(add.module_path in line for line in lines)


def test_a_task_whose_worker_is_killed_still_finishes(start_worker, control):
    work = start_worker()
    result = write.enqueue("x", seconds=2)
    wait_until(lambda: effects("start") == ["start x"])
    result.refresh()
    assert (result.status, result.attempts) == (Status.RUNNING, 1)
    work.kill()
    start_worker("second")
    wait_until(lambda: result.refresh() or result.is_finished)
    assert (result.status, result.return_value, result.attempts) == (
        Status.SUCCESSFUL,
        "x",
        2,
    )
    assert effects("end") == ["end x"]


def test_a_task_that_the_worker_cannot_import_waits_and_uses_no_attempt(start_worker, control):
    work = start_worker()
    with transaction.atomic():
        result = add.enqueue(1)
        Job.objects.update(task="mail.removed")
        transaction.on_commit(lambda: Job.objects.update(due_at=timezone.now()))
    wait_until(lambda: "has no Django task mail.removed" in work.log.read_text())
    row = Job.objects.get(pk=result.id)
    assert (row.state, row.attempts) == (State.QUEUED, 0)
    Job.objects.update(task=add.module_path)
    wait_until(lambda: result.refresh() or result.is_finished)
    assert (result.return_value, result.attempts) == (1, 1)


def test_jobs_that_share_a_hint_with_a_slow_one_are_handed_on_without_the_loop(start_worker):
    with transaction.atomic():
        results = [write.enqueue("slow", seconds=2)]
        results += [write.enqueue(str(number)) for number in range(40)]
    assert publisher.flush(5)
    start_worker("work", "-c", "3", "-Q", "default")
    wait_until(lambda: len(effects("end")) == len(results))
    assert len(effects("start")) == len(results)
