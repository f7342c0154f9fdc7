"""Schedulers of beat for tests: with `-S` one is loaded, and ends a beat that hangs sooner."""

import os
import time
from pathlib import Path

from celery.beat import PersistentScheduler

from hardened_celery import liveness

liveness.HANG_SECONDS = 6


class Impatient(PersistentScheduler):
    """The usual one."""


class Hanging(PersistentScheduler):
    """Hangs as soon as the file named by `HANG_FILE` exists."""

    def tick(self, *arguments: object, **options: object) -> float:
        while Path(os.environ["HANG_FILE"]).exists():
            time.sleep(1)
        return super().tick(*arguments, **options)
