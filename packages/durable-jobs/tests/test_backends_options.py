"""What Django's tasks API lets a caller set, and what is refused at the call or by a check."""

from datetime import UTC, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from celery import current_app
from celery.app.routes import prepare
from django.core.exceptions import SuspiciousOperation
from django.utils import timezone

from durable_jobs.models import Job
from durable_jobs.testing import drain

backends = pytest.importorskip("durable_jobs.backends", reason="needs Django 6 or django-tasks")
api = pytest.importorskip(backends.TaskResult.__module__.partition(".base")[0])
# The one name that the backport spells differently.
InvalidTask = getattr(api.exceptions, "InvalidTask", None) or api.exceptions.InvalidTaskError
Status = backends.TaskResultStatus
State = Job.State
pytestmark = pytest.mark.django_db(transaction=True)

BACKEND = "durable_jobs.backends.JobBackend"


@api.task
def nothing(*args, **kwargs):
    return None


@api.task
def add(x, y=0):
    return x + y


@api.task
def fail():
    raise ValueError("boom")


@api.task(takes_context=True)
def about(context, *args):
    return [context.task_result.id, context.attempt, context.task_result.status, list(args)]


def not_a_task():
    return None


@pytest.fixture(autouse=True)
def own_tasks(settings):
    settings.TASKS = {"default": {"BACKEND": BACKEND, "QUEUES": ["default", "high"]}}


@pytest.fixture
def celery():
    """Change Celery's configuration; tasks made under it are forgotten."""
    conf = current_app.conf
    before = {}

    def change(**values):
        before.update({name: conf[name] for name in values})
        conf.update(values)
        current_app.tasks.pop(add.module_path, None)

    yield change
    conf.update(before)
    current_app.tasks.pop(add.module_path, None)


def test_arguments_that_are_not_json_are_refused_at_the_call():
    with pytest.raises(TypeError, match="Unsupported type"):
        nothing.enqueue(timezone.now())
    with pytest.raises(TypeError, match="Unsupported type"):
        async_to_sync(nothing.aenqueue)(timezone.now())
    assert Job.objects.count() == 0


@pytest.mark.parametrize("call", [lambda: add.enqueue(), lambda: about.enqueue(nobody=1)])
def test_arguments_that_do_not_fit_the_signature_are_refused_at_the_call(call):
    with pytest.raises(TypeError):
        call()
    assert Job.objects.count() == 0


def test_run_after_is_the_timer_of_the_row():
    moment = timezone.now() + timedelta(hours=1)
    result = nothing.using(run_after=moment).enqueue()
    row = Job.objects.get()
    assert (row.state, row.due_at, result.status) == (
        State.SCHEDULED,
        moment,
        Status.READY,
    )
    assert nothing.get_result(result.id).task.run_after == moment
    assert drain() == 0
    assert drain(everything=True) == 1


def test_a_naive_run_after_is_invalid():
    with pytest.raises(InvalidTask, match="aware"):
        nothing.using(run_after=datetime.now(UTC).replace(tzinfo=None))


@pytest.mark.parametrize(
    ("usual", "priority", "expected"),
    [(None, 0, None), (None, -100, 9), (None, -50, 4), (None, 50, 0), (5, 100, 0), (5, 40, 3),
     (5, 0, 5), (5, -50, 7), (5, -100, 9)],
)  # fmt: skip
def test_a_priority_is_placed_around_the_default_of_the_broker(usual, priority, expected, celery):
    celery(task_default_priority=usual)
    result = add.using(priority=priority).enqueue(1)
    assert Job.objects.get().options.get("priority") == expected
    assert add.get_result(result.id).task.priority == priority


@pytest.mark.parametrize(("priority", "expected"), [(100, 10), (50, 5), (-100, 0)])
def test_on_rabbitmq_the_highest_number_is_served_first(priority, expected, celery):
    celery(broker_write_url="amqp://nobody@127.0.0.1:1//", task_queue_max_priority=10)
    assert backends.broker_priority(priority) == expected


@pytest.mark.parametrize("priority", [-101, 101, 3.1])
def test_a_priority_out_of_range_is_invalid(priority):
    with pytest.raises(InvalidTask, match="priority must be a whole number"):
        nothing.using(priority=priority)


def test_a_named_queue_is_celerys_and_the_default_one_follows_celerys_routes(
    monkeypatch,
):
    result = nothing.using(queue_name="high").enqueue()
    assert Job.objects.get().queue == "high"
    assert nothing.get_result(result.id).task.queue_name == "high"
    routes = prepare({nothing.module_path: {"queue": "low"}})
    monkeypatch.setattr(current_app.amqp.router, "routes", routes)
    result = nothing.enqueue()
    assert Job.objects.get(pk=result.id).queue == "low"
    assert nothing.get_result(result.id).task.queue_name == "default"


def test_a_queue_the_backend_does_not_have_is_invalid(settings):
    with pytest.raises(InvalidTask, match="Queue 'slow' is not valid for backend"):
        nothing.using(queue_name="slow")
    high = nothing.using(queue_name="high")
    settings.TASKS = {"default": {"BACKEND": BACKEND}}
    with pytest.raises(InvalidTask, match="Queue 'high'"):
        high.enqueue()
    with pytest.raises(InvalidTask, match="Queue 'high'"):
        async_to_sync(high.aenqueue)()
    assert Job.objects.count() == 0


def test_functions_that_a_worker_could_not_find_are_invalid():
    with pytest.raises(InvalidTask, match="module level"):
        api.task()(lambda: None)
    with pytest.raises(InvalidTask, match="context"):
        api.task(takes_context=True)(not_a_task)
    with pytest.raises(SuspiciousOperation, match="not a Django task"):
        api.task(not_a_task).enqueue()
    assert Job.objects.count() == 0


def test_check_finds_nothing_in_good_settings():
    assert list(api.task_backends["default"].check()) == []


def test_check_names_every_fault(settings):
    settings.TASKS = {
        "default": {
            "BACKEND": BACKEND,
            "QUEUES": ["default", "slow"],
            "OPTIONS": {"retries": 1},
        }
    }
    nothing.using(priority=10)
    found = list(api.task_backends["default"].check())
    assert [message.id for message in found] == [
        "durable_jobs.E020", "durable_jobs.E021", "durable_jobs.W020",
    ]  # fmt: skip
    assert "'retries'" in found[0].msg
    assert "'slow'" in found[1].msg
    assert "[10]" in found[2].msg


def test_check_accepts_priorities_that_have_room(celery):
    celery(task_default_priority=5)
    nothing.using(priority=50)
    assert list(api.task_backends["default"].check()) == []


def test_eager_mode_runs_the_task_at_the_call(celery):
    celery(task_always_eager=True)
    result = add.enqueue(40, 2)
    assert (result.status, result.return_value) == (Status.SUCCESSFUL, 42)
    failed = fail.enqueue()
    assert (failed.status, failed.errors[0].exception_class) == (
        Status.FAILED,
        ValueError,
    )
    assert Job.objects.count() == 0
