"""Logging: one JSON object per line in production, readable lines in development.

structlog and the standard library end in one formatter, which adds the ids that are bound:
`request_id` in a request and in every task it leads to, `task_id` and `task` in a task, `user_id`.
Addresses, user agents, query strings and arguments of tasks stay out; text and `extra` of your own
log calls, and messages of exceptions, are written as they are.
"""

import logging
import sys
import time
from typing import Any

import structlog
from celery import Task
from celery.signals import setup_logging, worker_init
from django.http import HttpRequest
from django_structlog.celery.receivers import CeleryReceiver
from django_structlog.celery.signals import (
    bind_extra_task_metadata,
    modify_context_before_task_publish,
)
from django_structlog.signals import (
    bind_extra_request_finished_metadata,
    bind_extra_request_metadata,
)
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from hardened_celery import routine

LEVELS: tuple[str, ...] = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")
PRIVATE = ("data", "user_agent", "fingerprint")
# What a task inherits. Not more: each message and each row carries it.
INHERITED = ("request_id", "correlation_id", "user_id", "parent_task_id")
# One receiver for all processes: a second one would log the sending of each task twice.
TASKS = CeleryReceiver()
MOST = 200  # characters of an id; who numbers our requests may send thousands


def logging_config(*, json_lines: bool, level: str) -> dict[str, Any]:
    """Return a configuration for `logging.config.dictConfig`: all to stderr, in one format."""
    to_root: dict[str, Any] = {"handlers": [], "propagate": True}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "celery_reports": {"()": lambda: keep_report},
            "routine": {"()": lambda: without_routine},
            "message_dumps": {"()": lambda: without_dump},
        },
        "formatters": {
            "line": {
                "()": ProcessorFormatter,
                "foreign_pre_chain": [structlog.stdlib.ExtraAdder(), *_PREPARE],
                "processors": [ProcessorFormatter.remove_processors_meta, *_render(json_lines)],
            }
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {
            "celery.app.trace": {"filters": ["celery_reports"]},
            "celery.beat": {"filters": ["routine"]},
            "celery.worker.strategy": {"filters": ["celery_reports"]},
            "celery.worker.consumer.consumer": {"filters": ["message_dumps"]},
            "django": to_root,
            "django.server": to_root,
            # django-structlog logs the same failures with their ids
            "django.request": {"level": "CRITICAL"},
            "gunicorn.error": to_root,
            # `request_finished` says the same with its ids; its level here wins over gunicorn's
            "gunicorn.access": to_root | {"level": "CRITICAL"},
            # billiard's; it stops propagation to the root on first use
            "multiprocessing": {"level": "ERROR", "handlers": ["stderr"], "propagate": False},
        },
    }


def configure(*, json_lines: bool, level: str) -> dict[str, Any]:
    """Return what belongs into Django's LOGGING; lead structlog and Python's warnings there."""
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            drop_routine,
            *_PREPARE,
            to_standard_library,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    bind_extra_request_metadata.connect(start_clock)
    bind_extra_request_finished_metadata.connect(stop_clock)
    return logging_config(json_lines=json_lines, level=level)


def connect() -> None:
    """Carry ids from who sends a task to the task, and keep Celery's own handlers away."""
    setup_logging.connect(leave_to_django)
    TASKS.connect_signals()
    # not in other processes: an eager task would wipe the ids of the request that runs it
    worker_init.connect(connect_worker)
    bind_extra_task_metadata.connect(bind_task)
    modify_context_before_task_publish.connect(keep_inherited)


def leave_to_django(**_signal: object) -> None:
    """Do nothing: with a receiver of `setup_logging`, Celery configures no logging itself."""


def connect_worker(**_signal: object) -> None:
    TASKS.connect_worker_signals()


def bind_task(task: Task, **_signal: object) -> None:
    structlog.contextvars.bind_contextvars(task=task.name)


def keep_inherited(context: dict[str, Any], **_signal: object) -> None:
    """Leave only what a task inherits from its sender, as what every message and row can hold."""
    for key in list(context):
        value = context.pop(key)
        if key in INHERITED and (plain := as_plain(value)) is not None:
            context[key] = plain


def as_plain(value: object) -> str | int | None:
    """Return a value as a short text or a small number; None where it has no text of its own."""
    if type(value) is int and abs(value) < 2**53:  # more than that JSON does not promise
        return value
    if value is None:
        return None
    try:
        text = str(value)[:MOST].encode("utf-8", "backslashreplace").decode()
    except Exception:  # a key may be of any class
        return None
    return text.replace("\0", "")  # which no column holds


def start_clock(request: HttpRequest, **_signal: object) -> None:
    request._started = time.monotonic()  # type: ignore[attr-defined]


def stop_clock(request: HttpRequest, log_kwargs: dict[str, Any], **_signal: object) -> None:
    """Add to the line on a finished request how long it took."""
    log_kwargs["duration_ms"] = round((time.monotonic() - request._started) * 1000)  # type: ignore[attr-defined]


def keep_report(record: logging.LogRecord) -> bool:
    """Drop Celery's reports on tasks: django-structlog writes them with ids, without arguments."""
    return not hasattr(record, "data") or record.levelno >= logging.CRITICAL


def without_dump(record: logging.LogRecord) -> bool:
    """Shorten what Celery says of a message it cannot use: the rest holds body and headers."""
    if isinstance(record.msg, str) and "body" in record.msg:
        # %s, as the repr of a decoding error holds the bytes
        record.msg = record.msg.partition("\n")[0].partition(" [")[0].replace("%r", "%s")
        record.args = tuple(record.args or ())[: record.msg.count("%s")]
    return True


def without_routine(record: logging.LogRecord) -> bool:
    """Drop beat's line on a routine task that it sends."""
    return record.levelno > logging.INFO or routine.TASKS.isdisjoint(map(str, record.args or ()))


def drop_routine(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Drop the lines on health checks, scrapes and routine tasks that went well."""
    path = str(event.get("request")).partition(" ")[2]
    if event.get("code") == 200 and path.startswith(routine.PATHS):
        raise structlog.DropEvent
    task = event.get("child_task_name") or structlog.contextvars.get_contextvars().get("task")
    if method == "info" and task in routine.TASKS and str(event.get("event")).startswith("task_"):
        raise structlog.DropEvent
    return event


def drop_private(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Remove what says more about people and their data than a log needs to."""
    for key in PRIVATE:
        event.pop(key, None)
    if "request" in event:
        # a query string may hold tokens and addresses
        event["request"] = str(event["request"]).partition("?")[0]
    return event


def to_standard_library(logger: WrappedLogger, name: str, event: EventDict) -> Any:
    """Wrap an event for the formatter; keep the exception where other handlers look for it."""
    args, kwargs = ProcessorFormatter.wrap_for_formatter(logger, name, event)
    return args, {**kwargs, "exc_info": event.get("exc_info")}


_PREPARE: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    drop_private,
]


def _render(json_lines: bool) -> list[Processor]:
    if json_lines:
        return [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=repr),
        ]
    # plain: the pretty tracebacks print local variables
    return [
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    ]
