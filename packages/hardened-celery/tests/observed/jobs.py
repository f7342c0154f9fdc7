"""Durable jobs that end in every way there is; nobody should ever see their arguments."""

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded

from durable_jobs import JobTask
from tests.observed.tasks import ExpectedError


@shared_task(max_attempts=2)
def fail_twice(*_secrets: Any, **_more: Any) -> None:
    raise ValueError("on purpose")


@shared_task(bind=True)
def fail_once(self: JobTask, *_secrets: Any, **_more: Any) -> None:
    if self.job.attempts == 1:
        raise ValueError("on purpose")


@shared_task(throws=(ExpectedError,))
def fail_as_expected(*_secrets: Any, **_more: Any) -> None:
    raise ExpectedError("nothing to report")


@shared_task(bind=True, max_retries=1, default_retry_delay=0)
def exhaust_retries(self: JobTask, *_secrets: Any, **_more: Any) -> None:
    try:
        raise ValueError("again")
    except ValueError as error:
        raise self.retry(exc=error) from error


@shared_task(max_attempts=2, soft_time_limit=1)
def sleep_twice(*_secrets: Any, **_more: Any) -> None:
    time.sleep(60)


@shared_task(max_attempts=1, soft_time_limit=1, time_limit=2)
def ignore_soft_limit(*_secrets: Any, **_more: Any) -> None:
    while True:
        with suppress(SoftTimeLimitExceeded):
            time.sleep(60)


@shared_task(bind=True)
def die_once(self: JobTask, *_secrets: Any, **_more: Any) -> None:
    if self.job.attempts == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@shared_task(max_attempts=2)
def die_twice(*_secrets: Any, **_more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task(max_attempts=1)
def leave(*_secrets: Any, **_more: Any) -> None:
    sys.exit(1)


@shared_task
def never_run(*_secrets: Any, **_more: Any) -> None:
    """Stand for a job whose worker is gone."""
