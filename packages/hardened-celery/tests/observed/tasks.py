"""Tasks that end in every way there is. Each takes more arguments, which nobody should ever see.

They are plain ones; the durable ones are in `jobs.py`.
"""

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from celery import shared_task
from celery.contrib.django.task import DjangoTask as Task
from celery.exceptions import SoftTimeLimitExceeded

logger = logging.getLogger(__name__)


class ExpectedError(Exception):
    """What a task declares in `throws`."""


@shared_task(base=Task)
def fail(*_secrets: Any, **_more: Any) -> None:
    raise ValueError("on purpose")


@shared_task(base=Task)
def fail_slowly(*_secrets: Any, **_more: Any) -> None:
    """Keep a process busy, so that the next task goes to another one."""
    time.sleep(1)
    raise ValueError("slowly")


@shared_task(base=Task, throws=(ExpectedError,))
def fail_as_expected(*_secrets: Any, **_more: Any) -> None:
    raise ExpectedError("nothing to report")


@shared_task(base=Task, bind=True, max_retries=1, default_retry_delay=0)
def succeed_at_second_attempt(self: Task, *_secrets: Any, **_more: Any) -> None:
    if not self.request.retries:
        raise self.retry()


@shared_task(base=Task, bind=True, max_retries=1, default_retry_delay=0)
def fail_at_second_attempt(self: Task, *_secrets: Any, **_more: Any) -> None:
    try:
        raise ValueError("again")
    except ValueError as error:
        raise self.retry(exc=error) from error


@shared_task(base=Task)
def sleep(*_secrets: Any, **_more: Any) -> None:
    time.sleep(60)


@shared_task(base=Task)
def ignore_soft_limit(*_secrets: Any, **_more: Any) -> None:
    while True:
        with suppress(SoftTimeLimitExceeded):
            time.sleep(60)


@shared_task(base=Task, max_retries=0)
def die(*_secrets: Any, **_more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=Task, max_retries=1, default_retry_delay=0)
def die_twice(*_secrets: Any, **_more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=Task, retry_on_worker_lost=False, bind=True)
def die_once(self: Task, *_secrets: Any, **_more: Any) -> None:
    """Be given back to the broker once."""
    if not self.request.delivery_info["redelivered"]:
        os.kill(os.getpid(), signal.SIGKILL)


@shared_task(base=Task, max_retries=0)
def leave(*_secrets: Any, **_more: Any) -> None:
    sys.exit(1)


@shared_task(base=Task)
def speak(text: str, *_secrets: Any, **_more: Any) -> None:
    """Log a line from within."""
    logger.info(text)


@shared_task(base=Task)
def speak_twice(text: str, *_secrets: Any, **_more: Any) -> None:
    """Log a line with a field of its own, and let another task log one more."""
    logger.info(text, extra={"order": 7})
    speak.delay("from a task", *_secrets)
