"""Every setting with its default: `QUEUE_PROBES = {"THRESHOLD": 30, ...}` in Django's settings.

Spans are seconds.
"""

import os
import re
from typing import Any

from celery import current_app
from django.conf import settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured

RELEASE = os.environ.get("RELEASE", "")
DEFAULTS: dict[str, Any] = {
    # How often beat sends a probe to each queue that has answered the last one.
    "INTERVAL": 10.0,
    # A probe that is on its way for longer makes its queue late; by queue, where one may be slower.
    "THRESHOLD": 30.0,
    "THRESHOLDS": {},
    # A late queue whose workers start tasks is busy; after so many thresholds that is a fault, too.
    "BUSY_FACTOR": 10,
    # Tasks that fill every process of its workers are work; when none has started for so many
    # thresholds, they hang, or the processes are too few.
    "FULL_FACTOR": 3,
    # A probe without an answer is sent again after this time, then at doubled intervals.
    # The first time soon: a single lost message is no late queue.
    "RESEND": 12.0,
    "RESEND_MAX": 900.0,
    # How often a worker says that it lives, and after what silence it does not.
    "NODE": 5.0,
    "NODE_TTL": 20.0,
    # Which queues; by default all that CELERY_TASK_QUEUES declares.
    "QUEUES": None,
    # How long a health check waits for the database.
    "TIMEOUT": 2.0,
    # Latencies and numbers of jobs are kept so long, for the status page.
    "RETENTION": 86400.0,
    # Who hears of a late queue, once, and of its recovery: Django's ADMINS, and this URL by POST.
    "WEBHOOK": "",
    # Set it to let /healthz/queues and /metrics answer only to `Authorization: Bearer <token>`.
    "TOKEN": None,
}


class Conf:
    """`conf.THRESHOLD` reads the setting, or its default."""

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise AttributeError(name)
        return getattr(settings, "QUEUE_PROBES", {}).get(name, DEFAULTS[name])


conf = Conf()


def queues() -> list[str]:
    """Return the names of the queues that are probed."""
    if conf.QUEUES is not None:
        return sorted(conf.QUEUES)
    # Not `app.amqp.queues`: that one grows in each process by what it creates on the fly.
    declared = current_app.conf.task_queues or [current_app.conf.task_default_queue]
    return sorted(getattr(queue, "name", queue) for queue in declared)


def known(queue: str) -> bool:
    """Tell whether Celery sends to the queue: it is declared, or made on the fly."""
    return current_app.conf.task_create_missing_queues or queue in current_app.amqp.queues


def check_queues(**_: Any) -> list[checks.CheckMessage]:
    """Return an error for each name in `QUEUE_PROBES["QUEUES"]` that Celery would refuse."""
    text = "QUEUE_PROBES['QUEUES'] names %r, which CELERY_TASK_QUEUES does not declare."
    wrong = (name for name in queues() if not known(name))
    return [checks.Error(text % name, id="queue_probes.E001") for name in wrong]


def refuse_token() -> None:
    """Raise ImproperlyConfigured for a token that protects nothing, or that nobody can give."""
    # What a header carries: no space, which ends a token, and nothing but ASCII.
    if conf.TOKEN is not None and not re.fullmatch("[!-~]+", str(conf.TOKEN)):
        raise ImproperlyConfigured(
            "QUEUE_PROBES['TOKEN'] is empty, or has a space or a letter that no header carries;"
            " leave it out to let everybody see health and metrics"
        )


def threshold(queue: str) -> float:
    """Return after how many seconds a probe of the queue is late."""
    return float(conf.THRESHOLDS.get(queue, conf.THRESHOLD))
