"""Errors go to Sentry when `SENTRY_DSN` is set; without it the SDK is not even imported.

A failure of a task is one event with the tags `task`, `celery_task_id` and `queue`, whoever notices
it: the pool process that raised, Celery's main process when a pool process was lost or ran out of
time, or who logs an error with `extra={"task": ..., "task_id": ..., "queue": ...}`. An attempt that
raised and will be repeated is none; a process that was lost is one each time. Arguments of tasks,
local variables, query strings, bodies, cookies and users are not sent; your own log calls and
messages of exceptions are. What dies or hangs as a whole reports nothing: then the monitors miss
their check-ins.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Task, current_task
from celery.exceptions import Retry
from celery.signals import (
    after_task_publish,
    task_rejected,
    task_retry,
    task_success,
    worker_process_init,
)
from celery.worker.request import Request
from django.utils.text import slugify
from kombu import Message

from hardened_celery import env, routine

if TYPE_CHECKING:
    from sentry_sdk.types import Event, Hint

# One missed minute may be a deployment; after the second the monitor is red, some 4 minutes in all.
MONITOR: Any = {
    "schedule": {"type": "interval", "value": 1, "unit": "minute"},
    "checkin_margin": 2,
    "max_runtime": 2,
    "failure_issue_threshold": 2,
    "recovery_threshold": 1,
    "timezone": "UTC",
}
CHECK_IN_SECONDS = 60
checked_in: dict[str, float] = {}
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
    from sentry_sdk.utils import Dsn

    rate = env.number("SENTRY_TRACES_SAMPLE_RATE", 0, most=1)
    monitor = env.flag("SENTRY_MONITOR_BEAT_TASKS")
    try:
        Dsn(dsn)
    except ValueError:  # its words hold a part of it
        raise ValueError("SENTRY_DSN is no URL like https://KEY@HOST/NUMBER") from None
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
    task_retry.connect(report_lost_process)
    task_rejected.connect(report_deleted_message)
    after_task_publish.connect(check_in_beat)
    task_success.connect(check_in_worker)


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
    """Return the probability of tracing: none for routine, else the caller's decision or `rate`."""
    path = context.get("wsgi_environ", {}).get("PATH_INFO", "")
    task = context.get("celery_job", {}).get("task")
    if path.startswith(routine.PATHS) or task in routine.TASKS:
        return 0
    caller = context.get("parent_sampled")
    return rate if caller is None else float(caller)


def report_lost_process(reason: Retry | None = None, **_signal: object) -> None:
    # Celery logs only those it gives up, not those whose task it sends again
    import sentry_sdk

    if reason and isinstance(reason.exc, WorkerLostError):
        sentry_sdk.capture_exception(reason.exc)


def report_deleted_message(exc: BaseException | None = None, **_signal: object) -> None:
    # Celery only warns of it
    import sentry_sdk

    if exc is None:
        sentry_sdk.capture_message("Celery deleted a message that is no task", level="error")


def check_in_beat(sender: str, **_signal: object) -> None:
    # it has sent the loop's task, so it turns and has its broker
    if sender == routine.LOOP:
        check_in("beat")


def check_in_worker(sender: Task, **_signal: object) -> None:
    if sender.name == routine.LOOP:
        check_in("reconcile")
    elif sender.name == routine.PROBE:
        check_in(f"probe-{sender.request.delivery_info['routing_key']}")


def check_in(slug: str) -> None:
    """Tell a monitor that all is well, once a minute from each process; Sentry makes it if new.

    `CeleryIntegration` has monitors of its own, but none for what runs more than once a minute.
    """
    from sentry_sdk.crons import capture_checkin

    now = time.monotonic()
    if now >= checked_in.get(slug, -math.inf) + CHECK_IN_SECONDS:
        checked_in[slug] = now
        capture_checkin(slugify(slug)[:50], status="ok", monitor_config=MONITOR)


def before_send(event: "Event", hint: "Hint") -> "Event | None":
    """Name task, job and queue of an event, and turn log lines on one failure into one event."""
    record = hint.get("log_record")
    error = unwrapped(hint.get("exc_info") or (record and record.exc_info))
    if record and said_elsewhere(record, error):
        return None
    tags = event.setdefault("tags", {})
    for name, value in (named_in(record) or subject()).items():
        tags.pop(name, None)
        if value:
            tags[name] = str(value)[:200]
    if record:
        # Django's, query string included
        event.get("extra", {}).pop("request", None)
        if isinstance(record.msg, dict):  # structlog's
            event["logentry"] = {"message": str(record.msg.get("event"))}
    if group := group_of(record, error, tags):
        event["fingerprint"] = group
    return event


def unwrapped(found: Any) -> BaseException | None:
    error = found[1] if found else None
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def said_elsewhere(record: logging.LogRecord, error: BaseException | None) -> bool:
    """Tell whether another line, or the failure of a task, says the same."""
    if record.name == "multiprocessing":  # a process exited; an idle one has lost nothing
        return error is None
    from_request = (record.name, record.funcName) == ("celery.worker.request", "on_failure")
    return from_request and isinstance(error, TimeLimitExceeded)  # `on_timeout` has logged it


def group_of(
    record: logging.LogRecord | None, error: BaseException | None, tags: Mapping[str, Any]
) -> list[str]:
    """Return the fingerprint of an event, [] for Sentry's own.

    Of a log line it is that of `extra={"fingerprint": [...]}`; for a line of Celery it tells what
    failed; else it is the text and the task or queue it is about, or all tasks would be one issue.
    """
    task = str(tags.get("task"))
    if not record:
        return ["celery", "WorkerLostError", task] if isinstance(error, WorkerLostError) else []
    if own := vars(record).get("fingerprint"):
        return list(map(str, own))
    match record.name, record.funcName:
        case "celery.worker.request", "on_timeout":
            return ["celery", "TimeLimitExceeded", task]
        case "celery.worker.request", "on_failure":
            return ["celery", type(error).__name__, task]
        case "celery.worker.consumer.consumer", "on_unknown_task":
            return ["celery", "unknown task", task]
        case "celery.worker.consumer.consumer", _ if error:
            # not by its text, which says at which byte
            return ["celery", "unusable message", type(error).__name__]
    about = tags.get("task") or tags.get("queue")
    return ["{{ default }}", str(about)] if about and not error else []


def named_in(record: logging.LogRecord | None) -> dict[str, object]:
    """Return the tags that a log call names: who runs the loop logs of the jobs of others."""
    found = vars(record) if record else {}
    if not {"task", "queue"} & found.keys():
        return {}
    return tags_of(found.get("task"), found.get("task_id"), {"routing_key": found.get("queue")})


def subject() -> dict[str, object]:
    """Return the tags of the task that runs here, or that a worker's main process deals with.

    Of the latter the functions on the stack tell: what Celery logs does not name the queue.
    """
    if current_task:
        request = current_task.request
        return tags_of(current_task.name, request.id, request.delivery_info)
    frame: FrameType | None = sys._getframe()
    while frame:
        if str(frame.f_globals.get("__name__")).startswith("celery.worker."):
            request, message = frame.f_locals.get("self"), frame.f_locals.get("message")
            if isinstance(request, Request):
                return tags_of(request.name, request.id, request.delivery_info)
            if isinstance(message, Message):
                headers = message.headers or {}
                return tags_of(headers.get("task"), headers.get("id"), message.delivery_info)
        frame = frame.f_back
    return {}


def tags_of(task: object, job: object, delivery: Mapping[str, Any] | None) -> dict[str, object]:
    """Return the tags; the exchanges are direct ones, whose routing keys are names of queues."""
    return {"task": task, "celery_task_id": job, "queue": (delivery or {}).get("routing_key")}
