"""Errors go to Sentry when `SENTRY_DSN` is set; without it the SDK is not even imported.

A failure of a task is one event with the tags `task` and `celery_task_id`, whoever notices it: the
pool process that raised, or Celery's main process when a pool process was lost or ran out of time.
Arguments of tasks, local variables, query strings, bodies, cookies and users are not sent; your own
log calls and messages of exceptions are. Not seen: a worker that dies as a whole, or hangs.
"""

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Task
from celery.exceptions import Retry
from celery.signals import task_failure, task_rejected, task_retry, worker_process_init

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint

COLLECT: Any = {
    "cookies": {"mode": "off"},
    "database_query_data": False,
    "gen_ai": {"inputs": False, "outputs": False},
    "graphql": {"document": False, "variables": False},
    "http_bodies": [],
    "http_headers": {"request": {"mode": "allowlist", "terms": ["host", "content-", "request-id"]}},
    "queues": False,
    # arguments of tasks are variables of their frames
    "stack_frame_variables": False,
    "url_query_params": {"mode": "off"},
    "user_info": False,
}


def init() -> None:
    """Start the SDK when `SENTRY_DSN` is set.

    Also read: `SENTRY_ENVIRONMENT` (by the SDK), `SENTRY_RELEASE` or `RELEASE`,
    `SENTRY_TRACES_SAMPLE_RATE` (above 0 to 1, else no tracing) and `SENTRY_MONITOR_BEAT_TASKS`
    (1: a monitor for each beat entry).
    """
    if not (dsn := os.environ.get("SENTRY_DSN")):
        return
    import sentry_sdk
    from sentry_sdk.integrations.argv import ArgvIntegration
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.integrations.django import DjangoIntegration
    from sentry_sdk.integrations.logging import ignore_logger

    rate = float(os.environ.get("SENTRY_TRACES_SAMPLE_RATE") or 0)
    monitor = os.environ.get("SENTRY_MONITOR_BEAT_TASKS") == "1"
    sentry_sdk.init(
        dsn=dsn,
        release=os.environ.get("SENTRY_RELEASE") or os.environ.get("RELEASE"),
        data_collection=COLLECT,
        before_send=before_send,
        shutdown_timeout=5,
        traces_sampler=(lambda context: sample(context, rate)) if rate else None,
        integrations=[DjangoIntegration(), CeleryIntegration(monitor_beat_tasks=monitor)],
        # command lines hold passwords, Flower's for one
        disabled_integrations=[ArgvIntegration()],
    )
    # the integrations have sent what it logs
    ignore_logger("django_structlog.*")
    # any scanner can cause these
    ignore_logger("django.security.DisallowedHost")
    worker_process_init.connect(after_fork)
    task_failure.connect(report_lost_process)
    task_retry.connect(report_lost_process)
    task_rejected.connect(report_deleted_message)


def after_fork(**_signal: object) -> None:
    """Give a forked process a transport of its own; call it in each, right after the fork.

    The inherited one waits on a lock of a thread that stayed in the parent, and keeps its first
    event until a second one comes: https://github.com/getsentry/sentry-python/issues/6164. What
    the parent has not sent yet is in it as well, and would be sent twice.
    """
    if "sentry_sdk" not in sys.modules:
        return
    import sentry_sdk
    from sentry_sdk.transport import make_transport

    client = sentry_sdk.get_client()
    if client.is_active():
        # 0.2 ms; a second `init` takes 300 ms
        client.transport = make_transport(client.options)


def sample(context: dict[str, Any], rate: float) -> float:
    """Return the probability of tracing: none for what machines ask, else the caller's decision."""
    path = context.get("wsgi_environ", {}).get("PATH_INFO", "")
    if path.startswith(("/healthz/", "/metrics")):
        return 0
    caller = context.get("parent_sampled")
    return rate if caller is None else float(caller)


def report_lost_process(
    sender: Task,
    exception: BaseException | None = None,
    task_id: str = "",
    reason: Retry | None = None,
    **signal: Any,
) -> None:
    """Report a task whose pool process was lost, be it the end of the task or one more attempt."""
    import sentry_sdk

    lost = reason.exc if reason else exception
    if isinstance(lost, WorkerLostError):
        lost.reported = True
        with sentry_sdk.new_scope() as scope:
            scope.set_tag("task", sender.name)
            scope.set_tag("celery_task_id", signal["request"].id if reason else task_id)
            scope.fingerprint = ["celery", "WorkerLostError", sender.name]
            sentry_sdk.capture_exception(lost)


def report_deleted_message(exc: BaseException | None = None, **_signal: object) -> None:
    """Report a message that is no task and was deleted: Celery only warns of it."""
    import sentry_sdk

    if exc is None:
        sentry_sdk.capture_message("Celery deleted a message that is no task", level="error")


def before_send(event: "Event", hint: "Hint") -> "Event | None":
    """Name the task of an event, and turn Celery's log lines on one failure into one event."""
    job: Any = event.get("extra", {}).get("celery-job")
    if job:
        event.setdefault("tags", {})["task"] = job["task_name"]
    record = hint.get("log_record")
    return _from_log(event, record) if record else event


def _from_log(event: "Event", record: logging.LogRecord) -> "Event | None":
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ExceptionWithTraceback):
        error = error.exc
    # Django's, query string included
    event.get("extra", {}).pop("request", None)
    if isinstance(record.msg, dict):  # structlog's
        event["logentry"] = {"message": str(record.msg.get("event"))}
    match record.name:
        case "multiprocessing" if error is None:
            return None  # a process exited: its task is reported, an idle one has lost nothing
        case "celery.worker.request" if isinstance(error, TimeLimitExceeded):
            return None  # a second line has no exception, but the names
        case "celery.worker.request" if getattr(error, "reported", False):
            return None
        case "celery.worker.request" if error is None and isinstance(record.args, tuple):
            task, task_id = map(str, record.args[1:])
            event["fingerprint"] = ["celery", "TimeLimitExceeded", task]
            event.setdefault("tags", {}).update(task=task, celery_task_id=task_id)
        case "celery.worker.consumer.consumer" if isinstance(error, KeyError):
            event["fingerprint"] = ["celery", "unknown task", str(error.args[0])]
            event.setdefault("tags", {})["task"] = str(error.args[0])
        case "celery.worker.consumer.consumer" if error:
            # not by its text, which says at which byte
            event["fingerprint"] = ["celery", "unusable message", type(error).__name__]
    return event
