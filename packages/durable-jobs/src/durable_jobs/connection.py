"""A run's own connection, and what others see of it."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from django.db import connections

from durable_jobs.conf import conf
from durable_jobs.heartbeat import heartbeat, still_mine

if TYPE_CHECKING:
    from durable_jobs.run import Run

logger = logging.getLogger("durable_jobs.run")


def seen_by_others(mine: "Run") -> bool:
    """Return whether the job is the run's in what is committed: as another connection sees it.

    If it is, and its own transaction finds it deleted or cancelled, that transaction did it. All
    others have to wait for it, so committing it ends the job.
    """
    if heartbeat.manual:  # a test, in which nobody else works
        return True

    def look() -> bool:
        try:
            return bool(still_mine([mine]))
        finally:
            connections[conf.DATABASE].close()

    with ThreadPoolExecutor(1) as other:
        return other.submit(look).result()


def autocommit_again() -> None:
    """Undo a task's `set_autocommit(False)`, or how it ended would be rolled back, too."""
    connection = connections[conf.DATABASE]
    if not connection.in_atomic_block and connection.connection and not connection.autocommit:
        logger.warning(
            "durable_jobs: a task left autocommit off; what it had not committed is lost"
        )
        connection.close()
