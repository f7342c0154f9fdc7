"""`apply()`, `task_always_eager` and direct calls: as in Celery, in this process, without a row."""

import pytest
from celery import current_app, states
from celery.exceptions import Ignore
from django.contrib.auth.models import Group

from durable_jobs import Job, Unsupported
from tests import celery_tasks as tasks
from tests.conftest import effects
from tests.tasks import add, checkpoints, write_atomic

pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture(params=["apply", "always_eager"])
def call(request):
    """Return `call(task, args, **options)` of both ways to run a task in this process."""
    conf = current_app.conf
    before = conf.task_always_eager, conf.task_eager_propagates
    conf.task_eager_propagates = False
    if request.param == "apply":
        yield lambda task, args=(), **options: task.apply(args, **options)
    else:
        conf.task_always_eager = True
        yield lambda task, args=(), **options: task.apply_async(args, **options)
    conf.task_always_eager, conf.task_eager_propagates = before
    assert Job.objects.count() == 0


def test_a_result_is_there_at_once(call):
    assert call(add, (1, 2)).get() == 3
    greet = current_app.tasks["tests.greet_class"]
    assert call(greet, ("you",)).get() == "hello you! 0"


def test_the_rows_own_options_are_accepted_and_do_nothing(call):
    group = Group(pk=1, name="g")
    result = call(add, (1, 2), key="k", owner=group, max_attempts=2, countdown=60, expires=1)
    assert result.get() == 3


def test_retries_are_made_at_once_until_they_are_used_up(call):
    result = call(tasks.flaky, ("os",))
    assert effects() == ["flaky os 0", "flaky os 1", "flaky os 2"]
    assert isinstance(result.result, OSError)
    assert call(tasks.without_end).state == states.SUCCESS
    assert len(effects("without end")) == 10
    assert isinstance(call(tasks.only_once).result, ValueError)


def test_an_exception_that_is_not_to_be_retried_is_the_result(call):
    for kind, error in (("blocking", BlockingIOError), ("key", KeyError)):
        result = call(tasks.flaky, (kind,))
        assert (result.state, type(result.result)) == (states.FAILURE, error)
    assert len(effects("flaky")) == 2


def test_ignore_and_reject_end_the_task(call):
    assert call(tasks.ignore).state == states.IGNORED
    assert call(tasks.reject, (False,)).state == states.REJECTED


def test_the_job_of_the_task_writes_nothing(call):
    assert call(checkpoints, (1,)).state == states.SUCCESS
    assert effects() == ["step 0"]


def test_atomic_and_limits_leave_the_task_alone(call):
    assert call(write_atomic, ("x",)).state == states.SUCCESS
    assert effects() == ["atomic x"]


def test_a_canvas_is_refused_as_it_would_be_by_a_worker():
    conf = current_app.conf
    before, conf.task_always_eager = conf.task_always_eager, True
    try:
        with pytest.raises(Unsupported):
            add.apply_async((1, 2), link=add.s(3))
    finally:
        conf.task_always_eager = before


def test_a_direct_call_runs_the_function_and_raises_what_it_raises():
    assert add(1, 2) == 3
    with pytest.raises(KeyError):
        tasks.flaky("key")
    with pytest.raises(OSError, match="x"):
        tasks.flaky("os")
    with pytest.raises(Ignore):
        tasks.ignore()
    assert Job.objects.count() == 0


def test_an_id_that_is_no_uuid_has_a_job_as_well(call):
    assert call(checkpoints, (1,), task_id="my-own-name").state == states.SUCCESS
