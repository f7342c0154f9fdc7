"""Django's own tasks API: `TASKS = {"default": {"BACKEND": "durable_jobs.backends.JobBackend"}}`.

For `django.tasks` (Django 6) and the `django-tasks` backport before it. A Django task is registered
nowhere, so a worker cannot know its name when it starts: hints of such jobs go to one Celery task,
`run_django_task`, which imports the task on demand and hands the jobs to a `DjangoTask` of its own
name. So rows, admin, logs, Flower, Sentry and CELERY_TASK_ROUTES all show `mail.tasks.send_letter`.

Not covered: `task_finished` is not sent for a job that dies with its worker or is cancelled.
"""

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from inspect import signature
from typing import TYPE_CHECKING, Any
from uuid import UUID

import django
from celery import current_app, shared_task
from celery.app import trace
from celery.result import EagerResult
from django.core import checks
from django.core.exceptions import SuspiciousOperation
from django.utils import timezone
from django.utils.module_loading import import_string

from durable_jobs import attempt, coroutines
from durable_jobs.exceptions import stops
from durable_jobs.ids import uuid7
from durable_jobs.models import Job
from durable_jobs.slices import NOTHING
from durable_jobs.task import JobTask
from durable_jobs.values import describe

if TYPE_CHECKING or django.VERSION >= (6,):
    from django.tasks import TaskContext, TaskResult, TaskResultStatus
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.base import DEFAULT_TASK_QUEUE_NAME, Task, TaskError
    from django.tasks.exceptions import TaskResultDoesNotExist
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
else:
    from django_tasks import TaskContext, TaskResult, TaskResultStatus
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.base import DEFAULT_TASK_QUEUE_NAME, Task, TaskError
    from django_tasks.exceptions import TaskResultDoesNotExist
    from django_tasks.signals import task_enqueued, task_finished, task_started
    from django_tasks.utils import normalize_json

logger = logging.getLogger("durable_jobs.backends")
DOOR = "durable_jobs.run_django_task"
# The header that keeps with the row what Celery has no word for.
CALL = "django_task"
MAKING = threading.Lock()
OPTIONS = {"max_attempts", "expires", "time_limit", "soft_time_limit"}
STATUS = {
    Job.State.RUNNING: TaskResultStatus.RUNNING,
    Job.State.SUCCEEDED: TaskResultStatus.SUCCESSFUL,
    Job.State.DEAD: TaskResultStatus.FAILED,
    Job.State.CANCELLED: TaskResultStatus.FAILED,
}
# The class of the last traceback: the first line after its frames.
RAISED = re.compile(r"(?s:.*)^Traceback \(most recent call last\):\n(?:\s.*\n)*([\w.]+)", re.M)


class TaskExited(Exception):  # noqa: N818
    """The task raised SystemExit, which fails its attempt and spares the worker's child."""


class JobBackend(BaseTaskBackend):
    """Writes jobs for Django tasks and reads their results; OPTIONS go to each `apply_async`."""

    supports_defer = supports_async_task = supports_get_result = supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self.priorities: set[int] = set()

    def validate_task(self, task: Task) -> None:
        super().validate_task(task)
        self.priorities.add(task.priority)

    def enqueue(self, task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TaskResult:
        """Write the job in the caller's transaction; TypeError when the arguments do not fit."""
        self.validate_task(task)
        call = {name: getattr(task, name) for name in ("backend", "queue_name", "priority")}
        call["run_after"] = task.run_after and task.run_after.isoformat()
        options = {**self.options, "headers": {CALL: call}, "eta": task.run_after}
        if task.run_after and timezone.is_naive(task.run_after):  # Django's, with USE_TZ = False
            options["eta"] = timezone.make_aware(task.run_after)
        # Django's default queue has no name of its own here: Celery's routes decide.
        if task.queue_name != DEFAULT_TASK_QUEUE_NAME:
            options["queue"] = task.queue_name
        if task.priority:
            options["priority"] = broker_priority(task.priority)
        # Before there is a row: it refuses what is no JSON.
        checked, name = new_result(task, uuid7(), args, kwargs), None
        if current_app.conf.task_always_eager:
            name = checked.id
            # Here a failure is a result, whatever CELERY_TASK_EAGER_PROPAGATES says.
            options["throw"] = False
        job = celery_task(task.module_path)
        sent = job.apply_async(checked.args, checked.kwargs, name, **options)
        result = new_result(task, UUID(sent.id), checked.args, checked.kwargs)
        task_enqueued.send(type(self), task_result=result)
        if isinstance(sent, EagerResult):
            settle(result, sent.result)
        return result

    def get_result(self, result_id: str) -> TaskResult:
        """Return the job's present state; of several errors the last is kept."""
        try:
            job = Job.objects.get(pk=UUID(str(result_id)))
            call = job.options["headers"][CALL]
        except (ValueError, KeyError, Job.DoesNotExist):
            call = {"backend": None}
        if call["backend"] != self.alias:
            raise TaskResultDoesNotExist(result_id)
        result = new_result(called_task(job.task, call), job.pk, job.args, job.kwargs)
        update(
            result,
            status=STATUS.get(Job.State(job.state), TaskResultStatus.READY),
            started_at=job.started_at,
            last_attempted_at=job.started_at,
            finished_at=job.finished_at,
            errors=errors(job),
            worker_ids=["earlier attempt"] * (job.attempts - 1) + [job.worker] * (job.attempts > 0),
            _return_value=job.result,
        )
        return result

    def check(self, **_: Any) -> list[checks.CheckMessage]:
        found: list[checks.CheckMessage] = []
        where = f"TASKS[{self.alias!r}]"
        if unknown := sorted(set(self.options) - OPTIONS):
            text = f"{where}['OPTIONS'] has unknown names: {unknown}."
            hint = f"Known: {sorted(OPTIONS)}."
            found.append(checks.Error(text, hint=hint, id="durable_jobs.E020"))
        queues = current_app.amqp.queues if current_app.conf.task_queues else self.queues
        if unknown := sorted(self.queues - set(queues) - {DEFAULT_TASK_QUEUE_NAME}):
            text = f"{where}['QUEUES'] has queues that CELERY_TASK_QUEUES has not: {unknown}."
            hint = "No worker would read them: name queues that workers consume."
            found.append(checks.Error(text, hint=hint, id="durable_jobs.E021"))
        usual = current_app.conf.task_default_priority or 0
        if flat := sorted(p for p in self.priorities if p and broker_priority(p) == usual):
            text = f"Tasks of {where} have priorities without effect: {flat}."
            hint = "The broker has no room beside its default: CELERY_TASK_DEFAULT_PRIORITY = 5."
            found.append(checks.Warning(text, hint=hint, id="durable_jobs.W020"))
        return found


class DjangoTask(JobTask):
    """What Celery sees of one Django task: a durable task under the Django task's name."""

    abstract = True
    via = DOOR
    ignore_result = False
    django_task: Task

    def __header__(self, *args: Any, **kwargs: Any) -> None:
        context = (None,) if self.django_task.takes_context else ()
        signature(self.django_task.func).bind(*context, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        task = called_task(self.name, getattr(request, CALL, None) or request.headers[CALL])
        backend = task.get_backend()
        if self.job.attempts > 1:
            result = backend.get_result(request.id)
        else:
            result = new_result(task, UUID(request.id), args, kwargs)
            now = timezone.now()
            update(result, status=TaskResultStatus.RUNNING, started_at=now, last_attempted_at=now)
            result.worker_ids.append(attempt.holder())
        request.task_result = result
        task_started.send_robust(type(backend), task_result=result)
        context = (TaskContext(task_result=result),) if task.takes_context else ()
        try:
            value = coroutines.done(task.func(*context, *args, **kwargs))
        except SystemExit as error:
            if stops(error):
                raise
            raise TaskExited(f"SystemExit: {error.code}") from error
        try:
            return normalize_json(value)
        except (TypeError, ValueError):
            # The work is done; another attempt would do it again and return the same.
            self.job.asked.final = True
            raise

    def on_success(self, retval: Any, *_: Any) -> None:
        self._finished(retval)

    def on_failure(self, exc: BaseException, *_: Any) -> None:
        self._finished(exc)

    def _finished(self, value: Any) -> None:
        if result := getattr(self.request, "task_result", None):
            settle(result, value)
            task_finished.send_robust(type(result.task.get_backend()), task_result=result)


class Door(JobTask):
    """Runs the jobs of a hint as the Django task which the hint's shadow names."""

    abstract = True

    def _trace_hint(self, uuid: str, args: Any, kwargs: Any, request: dict[str, Any]) -> Any:
        try:
            task = celery_task(request["shadow"])
        except Exception:  # whatever a module raises at import: the job waits for another worker
            name = request["shadow"]
            queue = (request.get("delivery_info") or {}).get("routing_key")
            about = {"task": name, "task_id": uuid, "queue": queue}
            about["fingerprint"] = ["celery", "unknown task", name]
            logger.exception("durable_jobs: this worker has no Django task %s", name, extra=about)
            return trace.trace_ok_t(None, None, 0.0, NOTHING)
        if task._tracer is None:
            # Through the module, because that is where Sentry hooks in.
            host = request.get("hostname")
            tracer = trace.build_tracer(task.name, task, self.app.loader, host, app=self.app)
            task.__trace__ = tracer
        return task._trace_hint(uuid, args, kwargs, request)


@shared_task(base=Door, name=DOOR)
def run_django_task() -> None:
    """Never called: the jobs belong to the tasks that `Door` finds."""


def celery_task(path: str) -> DjangoTask:
    """Return the Celery task that runs the Django task at `path`; it is made at its first use."""
    tasks = current_app.tasks
    if path not in tasks:
        found = import_string(path)  # not under the lock: a module may enqueue while it loads
        if not isinstance(found, Task):
            raise SuspiciousOperation(f"{path} is {found!r}, not a Django task")
        made = type(path.rpartition(".")[2], (DjangoTask,), {"name": path, "django_task": found})
        with MAKING:
            if path not in tasks:
                current_app.register_task(made())
    if not isinstance(known := tasks[path], DjangoTask):
        raise SuspiciousOperation(f"{path} is a task of Celery, not of Django")
    return known


def called_task(path: str, call: Mapping[str, Any]) -> Task:
    """Return the task as it was when it was called, with what `.using()` had changed."""
    run_after = call["run_after"] and datetime.fromisoformat(call["run_after"])
    return celery_task(path).django_task.using(**{**call, "run_after": run_after})


def new_result(task: Task, job: UUID, args: Any, kwargs: Any) -> TaskResult:
    times: dict[str, Any] = dict.fromkeys(("started_at", "last_attempted_at", "finished_at"))
    # The id carries the moment, so that neither side needs to ask the database for it.
    times["enqueued_at"] = datetime.fromtimestamp((job.int >> 80) / 1000, UTC)
    given: dict[str, Any] = {"args": args, "kwargs": kwargs, "errors": [], "worker_ids": []}
    given |= {"id": str(job), "backend": task.backend, "status": TaskResultStatus.READY}
    return TaskResult(task=task, **given, **times)


def update(result: TaskResult, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(result, name, value)


def settle(result: TaskResult, value: Any) -> None:
    """Enter how the run ended: with a value or with an exception."""
    update(result, finished_at=timezone.now(), status=TaskResultStatus.SUCCESSFUL)
    if not isinstance(value, BaseException):
        update(result, _return_value=value)
        return
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    result.errors.append(TaskError(exception_class_path=path, traceback=f"{describe(value)}\n"))
    update(result, status=TaskResultStatus.FAILED)


def errors(job: Job) -> list[TaskError]:
    path = "celery.exceptions.WorkerLostError"
    if job.state == Job.State.CANCELLED:
        path = "celery.exceptions.TaskRevokedError"
    elif found := RAISED.match(job.error):
        path = found[1] if "." in found[1] else f"builtins.{found[1]}"
    elif job.state != Job.State.DEAD:
        return []
    return [TaskError(exception_class_path=path, traceback=f"{job.error}\n")]


def broker_priority(priority: int) -> int:
    """Place -100..100 between the broker's last, Celery's default and the broker's first."""
    conf = current_app.conf
    first, last = conf.task_queue_max_priority or 0, 0
    if re.search("redis|valkey|sentinel", current_app.connection_for_write().transport_cls):
        first, last = 0, max(conf.broker_transport_options.get("priority_steps", [9]))
    usual = conf.task_default_priority or 0
    end = first if priority > 0 else last
    return int(usual + round((end - usual) * abs(priority) / 100))
