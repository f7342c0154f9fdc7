"""Messages that have no row: sent by name, or before their task became durable."""

import time
from typing import Any
from uuid import UUID

from billiard.einfo import ExceptionInfo
from celery.app.trace import trace_ok_t
from celery.exceptions import Reject
from kombu.utils.json import dumps

from durable_jobs.enqueue import Call, call_options
from durable_jobs.ids import row_id

# What Celery's worker puts beside the headers of a message.
OF_THE_WORKER = frozenset(
    [
        "properties",
        "reply_to",
        "correlation_id",
        "hostname",
        "delivery_info",
        "args",
        "kwargs",
        "is_eager",
        "callbacks",
        "errbacks",
        "chain",
        "chord",
        "loglevel",
        "logfile",
        "headers",
    ]
)


def hand_back(task_id: str) -> Any:
    """Return an outcome that gives the message, which is all there is of the job, back."""
    time.sleep(1)  # or it would come back at once, again and again
    try:
        raise Reject(f"no database for {task_id}", requeue=True)
    except Reject:
        return trace_ok_t(1, ExceptionInfo(), 0.0, "")


def adopt(task: Any, task_id: str, args: Any, kwargs: Any, request: dict[str, Any]) -> UUID:
    """Make a row of a message that has none: sent by name, or before the task became durable."""
    job = row_id(task_id)
    info = request.get("delivery_info") or {}
    call = Call(task.name, task.max_attempts, job, dumps(args), dumps(kwargs))
    call.queue = info.get("routing_key") or ""
    headers = {name: value for name, value in request.items() if name not in OF_THE_WORKER}
    call.options = call_options({"timelimit": (), "parent_id": None, **headers}, info)
    call.insert(adopt=True)
    return job
