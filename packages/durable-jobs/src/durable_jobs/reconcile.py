"""The loop: acts on every timer that fired, until none is left.

One statement is outbox relay, delayed start, retry, lost message, lost worker and expiry. Any
number of passes may run at once, in beat's task and in `manage.py reconcile --loop`; rows another
one holds are skipped. A broker that is down does not stop a pass: states are healed, hints follow.
"""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from celery import current_app
from django.db.models.functions import Now
from django.utils.module_loading import import_string

from durable_jobs import reconcilers, transitions
from durable_jobs.database import ago
from durable_jobs.models import Job, LoopPass
from durable_jobs.publisher import Hint

logger = logging.getLogger("durable_jobs.reconcile")
BATCH = 1000
PRUNE_SECONDS = 600.0
UNKNOWN_AFTER_SECONDS = 86400.0


@dataclass
class Pass:
    """What one pass did: rows by the state it gave them, and jobs inserted by reconcilers."""

    moved: Counter[str] = field(default_factory=Counter)
    inserted: int = 0
    pruned: int = 0

    def __str__(self) -> str:
        moved = ", ".join(f"{count} {state}" for state, count in sorted(self.moved.items()))
        return f"{moved or 'nothing due'}; {self.inserted} inserted; {self.pruned} pruned"


class Loop:
    """Passes, with what is done only now and then."""

    def __init__(self) -> None:
        self.next_prune = 0.0

    def run_once(self) -> Pass:
        """Do one pass."""
        done = Pass(moved=fire_timers())
        done.inserted = reconcilers.run_all()
        # One statement outside of a transaction: who is frozen here holds no lock.
        if not LoopPass.objects.update(at=Now()):
            LoopPass.objects.get_or_create()
        if time.monotonic() >= self.next_prune:
            self.next_prune = time.monotonic() + PRUNE_SECONDS
            done.pruned = Job.objects.prune()
            report_unknown()
        return done


def fire_timers() -> Counter[str]:
    """Act on all rows that are due and publish hints for those that are to run."""
    moved: Counter[str] = Counter()
    while True:
        hints = transitions.fire(BATCH)
        moved.update(hint.state for hint in hints)
        for hint in hints:
            if hint.state == Job.State.DEAD:
                report_dead(hint)
        if len(hints) < BATCH:
            return moved


def report_dead(hint: Hint) -> None:
    about = {"task": hint.task, "task_id": hint.task_id, "queue": hint.queue}
    text = "durable_jobs: %s[%s] is dead: its workers died"
    logger.error(text, hint.task, hint.task_id, extra=about)


def unknown_tasks() -> dict[str, int]:
    """Return how many jobs have waited for a day for a task this project does not know."""
    waiting = Job.objects.unfinished().filter(
        created_at__lt=ago(UNKNOWN_AFTER_SECONDS), state=Job.State.QUEUED
    )
    names = Counter(waiting.values_list("task", "options__via")[:10_000])
    return {
        name: count
        for (name, via), count in names.items()
        if (via or name) not in current_app.tasks or (via and not importable(name))
    }


def importable(path: str) -> bool:
    """Return whether a Django task, which is registered nowhere, can still be found."""
    try:
        import_string(path)
    except Exception:  # whatever its module raises
        return False
    return True


def report_unknown() -> None:
    for name, count in unknown_tasks().items():
        text = "durable_jobs: %s jobs wait for %s, which is not registered"
        one_issue = ["celery", "unknown task", name]  # for Sentry, as of the worker's own line
        logger.error(text, count, name, extra={"task": name, "fingerprint": one_issue})


loop = Loop()
