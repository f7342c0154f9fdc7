"""Messages that have no row: sent by name, or before their task became durable."""

import logging
import time
from typing import Any
from uuid import UUID

from billiard.einfo import ExceptionInfo
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Reject
from celery.states import FAILURE

from durable_jobs import transitions
from durable_jobs.enqueue import Call, call_options
from durable_jobs.ids import row_id
from durable_jobs.values import checked_id, to_json

logger = logging.getLogger("durable_jobs.adopt")
# What Celery's worker puts beside the headers of a message.
OF_THE_WORKER = frozenset((
    "properties", "reply_to", "correlation_id", "hostname", "delivery_info", "args", "kwargs",
    "is_eager", "callbacks", "errbacks", "chain", "chord", "loglevel", "logfile", "headers"
))  # fmt: skip


def requeue(task_id: str) -> Any:
    """Return an outcome that gives the message, which is all there is of the job, back."""
    time.sleep(1)  # or it would come back at once, again and again
    try:
        raise Reject(f"no database for {task_id}", requeue=True)
    except Reject:
        # Twice: the worker's main process asks the outcome, too, which exception it was.
        info = ExceptionInfo(internal=True)
        return trace_ok_t(info, info, 0.0, "")


def refuse(
    task: Any, task_id: str, args: Any, kwargs: Any, request: dict[str, Any], error: Exception
) -> Any:
    """Return the outcome of a message no database will ever take: it failed, and is gone."""
    about = {"task": task.name, "task_id": task_id}
    text = "durable_jobs: message %s of %s can never be a row and has failed: %s"
    logger.error(text, task_id, task.name, error, exc_info=error, extra=about)
    context = Context(request, id=task_id, args=args, kwargs=kwargs)
    info = TraceInfo(FAILURE, error).handle_failure(
        task, context, store_errors=not task.ignore_result
    )
    return trace_ok_t(info, info, 0.0, "")


def adopt(task: Any, task_id: str, args: Any, kwargs: Any, request: dict[str, Any]) -> UUID:
    """Make a row of a message that has none: sent by name, or before the task became durable."""
    job = row_id(task_id)
    info = request.get("delivery_info") or {}
    call = Call(task.name, task.max_attempts, job, to_json(args), to_json(kwargs))
    headers = {name: value for name, value in request.items() if name not in OF_THE_WORKER}
    options = call_options({"timelimit": (), "parent_id": None, **headers}, info)
    if str(job) != task_id:
        options["id"] = checked_id(task.name, task_id)
    call.route(info.get("routing_key") or "", options)
    transitions.adopt(call.row())
    return job
