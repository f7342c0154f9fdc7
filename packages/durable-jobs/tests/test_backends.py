"""Django's tasks API, with jobs that are run in this process."""

from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.core.exceptions import SuspiciousOperation
from django.db import transaction
from django.utils import timezone

from durable_jobs.models import Job
from durable_jobs.testing import drain
from tests import tasks as celery_tasks

backends = pytest.importorskip("durable_jobs.backends", reason="needs Django 6 or django-tasks")
api = pytest.importorskip(backends.TaskResult.__module__.partition(".base")[0])
# The one name that the backport spells differently.
InvalidTask = getattr(api.exceptions, "InvalidTask", None) or api.exceptions.InvalidTaskError
Status = backends.TaskResultStatus
State = Job.State
pytestmark = pytest.mark.django_db(transaction=True)

BACKEND = "durable_jobs.backends.JobBackend"
TASKS = {
    "default": {"BACKEND": BACKEND, "QUEUES": ["default", "high"]},
    "once": {"BACKEND": BACKEND, "OPTIONS": {"max_attempts": 1}},
}


class Refused(Exception):  # noqa: N818
    pass


@api.task()
def nothing(*args, **kwargs):
    return None


@api.task
async def nothing_async(*args, **kwargs):
    return None


@api.task
def add(x, y=0):
    return x + y


@api.task
async def add_async(x, y=0):
    return x + y


@api.task
def pair():
    return {"pair": (1, 2)}


@api.task
def unserializable():
    return object()


@api.task
def fail(text="boom"):
    raise ValueError(text)


@api.task
def refuse():
    try:
        raise KeyError("first")
    except KeyError as error:
        raise Refused("two\nValueError: lines") from error


@api.task
def leave():
    raise SystemExit("bye")


@api.task(takes_context=True)
def about(context, *args):
    return [
        context.task_result.id,
        context.attempt,
        context.task_result.status,
        list(args),
    ]


@api.task(takes_context=True)
def third_time(context):
    if context.attempt < 3:
        raise ValueError(f"attempt {context.attempt}, errors {len(context.task_result.errors)}")
    return context.attempt


@pytest.fixture(autouse=True)
def own_tasks(settings):
    settings.TASKS = TASKS


@pytest.fixture
def sent():
    """Return what the signals said: name and status."""
    seen = []
    receivers = {}
    for name in ("task_enqueued", "task_started", "task_finished"):

        def receive(sender, task_result, name=name, **_):
            assert sender is backends.JobBackend
            seen.append((name, str(task_result.status), task_result.id))

        receivers[name] = receive
        getattr(backends, name).connect(receive)
    yield seen
    for name, receive in receivers.items():
        getattr(backends, name).disconnect(receive)


def ran(result):
    """Run what is due and return the refreshed result."""
    assert drain() == 1
    result.refresh()
    return result


@pytest.mark.parametrize("task", [nothing, nothing_async], ids=["sync", "async"])
@pytest.mark.parametrize("way", ["enqueue", "aenqueue"])
def test_an_enqueued_task_is_a_ready_result_and_a_row_under_its_own_name(task, way):
    enqueue = task.enqueue if way == "enqueue" else async_to_sync(task.aenqueue)
    before = timezone.now() - timedelta(milliseconds=1)
    result = enqueue(1, two=3)
    assert (result.status, result.is_finished, result.attempts) == (
        Status.READY,
        False,
        0,
    )
    assert (result.started_at, result.last_attempted_at, result.finished_at) == (
        None,
        None,
        None,
    )
    assert before <= result.enqueued_at <= timezone.now()
    assert (result.task, result.args, result.kwargs) == (task, [1], {"two": 3})
    assert (result.backend, result.errors, result.worker_ids) == ("default", [], [])
    with pytest.raises(ValueError, match="Task has not finished yet"):
        _ = result.return_value
    assert task.get_result(result.id) == result
    row = Job.objects.get()
    assert (str(row.pk), row.task, row.args, row.kwargs) == (
        result.id, task.module_path, [1], {"two": 3},
    )  # fmt: skip


@pytest.mark.parametrize("task", [add, add_async], ids=["sync", "async"])
def test_a_task_that_ran_is_successful_with_its_value_times_and_worker(task):
    result = ran(task.enqueue(40, y=2))
    assert (result.status, result.is_finished, result.return_value) == (
        Status.SUCCESSFUL,
        True,
        42,
    )
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert result.last_attempted_at == result.started_at
    assert (result.attempts, result.errors) == (1, [])
    assert result.worker_ids == [Job.objects.get().worker]


def test_async_code_gets_and_refreshes_results():
    async def scenario():
        result = await add.aenqueue(1)
        await Job.objects.aupdate(
            state=State.SUCCEEDED, due_at=None, finished_at=timezone.now(), result=1
        )
        assert result.status == Status.READY
        await result.arefresh()
        other = await add.aget_result(result.id)
        return result.return_value, other.return_value

    assert async_to_sync(scenario)() == (1, 1)


def test_a_value_is_returned_as_json_has_it():
    assert ran(pair.enqueue()).return_value == {"pair": [1, 2]}


def test_a_value_that_is_not_json_fails_at_once_because_the_work_is_done():
    result = ran(unserializable.enqueue())
    assert (result.status, result.attempts) == (Status.FAILED, 1)
    assert result.errors[0].exception_class is TypeError
    assert "Unsupported type" in result.errors[0].traceback


def test_a_failed_task_has_its_error_and_no_value():
    result = ran(fail.using(backend="once").enqueue())
    assert (result.status, result.is_finished, result.attempts) == (
        Status.FAILED,
        True,
        1,
    )
    with pytest.raises(ValueError, match="Task failed"):
        _ = result.return_value
    (error,) = result.errors
    assert error.exception_class is ValueError
    assert error.traceback.startswith("Traceback (most recent call last):\n")
    assert error.traceback.endswith("ValueError: boom\n")
    assert result.enqueued_at <= result.started_at <= result.finished_at


def test_an_error_keeps_its_class_through_chains_and_messages_of_several_lines():
    (error,) = ran(refuse.using(backend="once").enqueue()).errors
    assert error.exception_class is Refused
    assert "KeyError: 'first'" in error.traceback


@pytest.mark.parametrize("text", ["", "a: b", "x\n  y\nz", "ValueError(ValueError('x'))"])
def test_an_error_keeps_its_class_whatever_its_message(text):
    assert ran(fail.using(backend="once").enqueue(text)).errors[0].exception_class is ValueError


def test_system_exit_fails_the_attempt_and_not_the_worker():
    (error,) = ran(leave.using(backend="once").enqueue()).errors
    assert error.exception_class is backends.TaskExited
    assert error.traceback.endswith("SystemExit: bye\n")


def test_a_failed_attempt_is_ready_again_with_its_error_until_one_succeeds():
    result = third_time.enqueue()
    drain()
    result.refresh()
    assert (result.status, result.attempts, len(result.errors)) == (Status.READY, 1, 1)
    drain(everything=True)
    result.refresh()
    assert (result.status, result.return_value, result.attempts) == (
        Status.SUCCESSFUL,
        3,
        3,
    )
    assert len(result.worker_ids) == 3


def test_attempts_are_those_of_the_setting_or_of_the_backends_option():
    many, one = fail.enqueue(), fail.using(backend="once").enqueue()
    assert drain(everything=True) == 8 + 1
    many.refresh()
    assert (many.status, many.attempts) == (Status.FAILED, 8)
    one = api.task_backends["once"].get_result(one.id)
    assert (one.status, one.attempts, one.backend) == (Status.FAILED, 1, "once")


def test_a_task_that_takes_the_context_sees_its_own_running_result():
    result = ran(about.enqueue(7))
    assert result.return_value == [result.id, 1, "RUNNING", [7]]


def test_a_rollback_leaves_nothing():
    with transaction.atomic():
        result = nothing.enqueue()
        assert Job.objects.count() == 1
        transaction.set_rollback(True)
    assert Job.objects.count() == 0
    with pytest.raises(backends.TaskResultDoesNotExist):
        nothing.get_result(result.id)


def test_results_are_found_by_id_backend_and_task():
    result = add.enqueue(1)
    with pytest.raises(api.exceptions.TaskResultMismatch):
        nothing.get_result(result.id)
    unknown = [
        "123",
        "00000000-0000-7000-8000-000000000000",
        celery_tasks.noop.delay().id,
    ]
    for result_id in unknown:
        with pytest.raises(backends.TaskResultDoesNotExist):
            add.get_result(result_id)
        with pytest.raises(backends.TaskResultDoesNotExist):
            async_to_sync(add.aget_result)(result_id)
    with pytest.raises(backends.TaskResultDoesNotExist):
        api.task_backends["once"].get_result(result.id)


@pytest.mark.parametrize(
    ("path", "error"),
    [("subprocess.check_output", SuspiciousOperation), ("missing.task", ImportError)],
)
def test_a_row_that_names_no_django_task_runs_nothing(path, error):
    result = add.enqueue(1)
    Job.objects.update(task=path)
    with pytest.raises(error):
        add.get_result(result.id)


def test_a_cancelled_job_has_failed_as_revoked():
    result = add.enqueue(1)
    Job.objects.all().cancel()
    result.refresh()
    assert (result.status, result.attempts) == (Status.FAILED, 0)
    assert result.errors[0].exception_class.__name__ == "TaskRevokedError"
    assert result.errors[0].traceback == "cancelled\n"


def test_signals_tell_of_enqueueing_start_and_end(sent):
    good, bad = add.enqueue(1), fail.using(backend="once").enqueue()
    drain()
    assert sent == [
        ("task_enqueued", "READY", good.id),
        ("task_enqueued", "READY", bad.id),
        ("task_started", "RUNNING", good.id),
        ("task_finished", "SUCCESSFUL", good.id),
        ("task_started", "RUNNING", bad.id),
        ("task_finished", "FAILED", bad.id),
    ]


def test_a_task_is_finished_only_after_its_last_attempt(sent):
    third_time.enqueue()
    drain(everything=True)
    assert [name for name, *_ in sent] == [
        "task_enqueued",
        *["task_started"] * 3,
        "task_finished",
    ]


def test_a_receiver_that_raises_does_not_cost_the_job_an_attempt(caplog):
    def receive(**_):
        raise Refused("receiver")

    backends.task_started.connect(receive)
    backends.task_finished.connect(receive)
    try:
        result = ran(add.enqueue(1))
    finally:
        backends.task_started.disconnect(receive)
        backends.task_finished.disconnect(receive)
    assert (result.status, result.attempts) == (Status.SUCCESSFUL, 1)
