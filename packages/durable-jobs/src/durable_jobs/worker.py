"""The worker's main process: it knows when a child dies, and hands back what it held.

Only when this process itself is killed do its jobs have to wait for their leases to end.
"""

import atexit
import logging
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import signals
from celery.worker import state
from celery.worker.request import Request
from django.db import close_old_connections, connections
from kombu.asynchronous import get_event_loop

from durable_jobs import attempt, revoke, session, transitions
from durable_jobs.conf import conf
from durable_jobs.exceptions import tellable
from durable_jobs.heartbeat import heartbeat
from durable_jobs.publisher import publisher
from durable_jobs.slices import NOTHING

logger = logging.getLogger("durable_jobs.worker")
REFUSED_POOLS = ("gevent", "eventlet")


class HintRequest(Request):
    """A wake-up hint in the main process; `jobs` is None for a message that has no row yet."""

    @property
    def jobs(self) -> Any:
        return self.request_dict.get("durable_jobs")

    def revoked(self) -> bool:
        """Never drop a hint for what this worker remembers: its rows say what is revoked."""
        if self.jobs is None:
            return bool(super().revoked())
        if known := revoke.early.intersection([*self.jobs, self.id]):
            revoke.settle_soon(None, known, None, tries=0)
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Leave the child alone, which may be at another job of the hint: see revoke.py."""
        if self.jobs is None:
            super().terminate(pool, signal)

    def send_event(self, type: str, **fields: Any) -> None:
        """Keep a hint that had nothing to do from showing the job as succeeded."""
        if type != "task-succeeded" or NOTHING not in str(fields.get("result")):
            super().send_event(type, **fields)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A hard limit is about to kill the child; its job fails this attempt once that is done.

        Until then, a tenth of a second or more, the body runs on, and no other may start.
        """
        super().on_timeout(soft, timeout)
        if not soft:
            lost = self.worker_pid, f"hard time limit ({timeout} s) exceeded"
            loop = get_event_loop()  # whose next turn comes when the pool has killed the child
            loop.call_soon(child_lost, *lost) if loop else child_lost(*lost)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> Any:
        """A lost child is the one failure its own process could not write.

        With `return_ok` that process itself reports, and lives.
        """
        raised = exc_info.exception
        error = raised.exc if isinstance(raised, ExceptionWithTraceback) else raised
        name = type(error).__name__
        lost = not return_ok and name in ("WorkerLostError", "Terminated", "SystemExit")
        if self.worker_pid and lost:
            child_lost(self.worker_pid, f"{name}: {error}")
        if isinstance(error, MemoryError):  # in a plain canvas; it would end this process
            exc_info.exception = tellable(error)
        return super().on_failure(exc_info, send_failed_event, return_ok)


def child_lost(pid: int, error: str) -> None:
    """Give the jobs of a dead child to others.

    In the event loop's own thread: the pool is about to fork the next child, and a thread that is
    connecting or importing at that moment would leave its locks held in there for ever.
    """
    if state.should_terminate is not None or state.should_stop is not None:
        return  # ended by this worker's own stop, which hands everything back
    try:
        hints = transitions.lose(attempt.holder(pid), error)
        for hint in hints:
            # Celery itself reports the lost child as an error.
            logger.warning(
                "durable_jobs: %s[%s] is %s: %s", hint.task, hint.task_id, hint.state, error
            )
        # A due one starts at once; the others' hints find them not due, and the loop wakes them.
        publisher.publish([hint for hint in hints if hint.state != "dead"])
    except Exception as failure:  # their leases will end
        logger.warning("durable_jobs: could not release jobs of child %s: %r", pid, failure)
    finally:
        connections[conf.DATABASE].close()


@signals.worker_init.connect(weak=False)
def on_start(sender: Any = None, **_: Any) -> None:
    """Name this boot before the first child is forked."""
    pool = getattr(sender, "pool_cls", "")
    name = pool if isinstance(pool, str) else pool.__module__
    if any(refused in name for refused in REFUSED_POOLS):
        # Celery logs an exception of a receiver and goes on.
        raise SystemExit(
            f"durable_jobs does not run in the {name} pool: its heartbeat needs a real thread. "
            "Use --pool=prefork or --pool=threads."
        )
    attempt.start_boot()
    session.start()
    # Not `worker_shutdown`, which Celery sends on a warm stop only. The pool has ended by then.
    atexit.register(release_all)


def release_all() -> None:
    """Hand back what the children held when they were stopped; the attempt does not count."""
    try:
        publisher.publish(transitions.release_boot())
    except Exception as failure:
        logger.warning("durable_jobs: could not hand jobs back: %r", failure)
    finally:
        connections[conf.DATABASE].close()


@signals.task_prerun.connect(weak=False)
def on_prerun(task: Any = None, **_: Any) -> None:
    """Let a plain task find its database again: CELERY_DB_REUSE_MAX keeps a dead connection.

    A job's claim has done so already.
    """
    if not task.request.is_eager and attempt.current(task.request.id) is None:
        close_old_connections()


@signals.task_postrun.connect(weak=False)
def on_postrun(task: Any = None, **_: Any) -> None:
    """Let the next task find a clean session, whatever kind either is of."""
    if not task.request.is_eager:
        session.clean()


@signals.worker_process_shutdown.connect(weak=False)
def on_child_stop(**_: Any) -> None:
    heartbeat.flush()
    publisher.flush()
