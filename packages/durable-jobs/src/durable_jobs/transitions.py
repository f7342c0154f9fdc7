"""Every arrow of a job's life, a verb each; the statements are in postgresql.py and sqlite.py.

    enqueue, enqueue_many, adopt           (nothing) -> queued, or scheduled for later
    claim                         queued, scheduled -> running     token + 1, attempts + 1
    renew                                   running -> running     a new lease
    finish                                  running -> succeeded
    fail                                    running -> scheduled, or dead
    release, release_boot                   running -> scheduled   the attempt does not count
    lose                                    running -> scheduled, or dead   the child died
    fire                       whatever timer fired -> queued, dead or cancelled
    cancel, revoke, retry, hasten, prune         the operator's

What was called again by its key while it ran goes to queued where it would have ended. Every verb
of a run carries the token of its claim, and changes nothing once somebody else has the job. Whoever
makes a job ready sends its wake-up hint, after the commit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from django.db import DataError, connections, models, transaction
from django.db.models import F, Q
from django.db.models.expressions import RawSQL
from django.db.models.functions import Cast, Coalesce, Now, RowNumber
from kombu.utils.json import dumps

from durable_jobs import attempt, database
from durable_jobs.attempt import Asked, Attempt, State
from durable_jobs.conf import conf
from durable_jobs.publisher import Hint, publisher
from durable_jobs.values import decode, storable

OVER = (State.DEAD, State.CANCELLED)
Row = Mapping[str, Any]


# ---- The caller's


def enqueue(row: Row, statement: str = "INSERT") -> UUID:
    """Write a row in the caller's transaction; return its id, or that of the job with its key."""
    found = database.run(statement, **row)
    return database.uuid(found[0][0]) if found else row["id"]


def known(job: UUID) -> bool:
    return bool(database.run("KNOWN", id=job))


def enqueue_many(rows: Sequence[Row], delay: float) -> None:
    """Write rows that have neither keys nor times of their own; on PostgreSQL only."""
    with connections[conf.DATABASE].cursor() as cursor:
        database.words().insert_many(cursor, rows, delay)


def adopt(row: Row) -> None:
    """Write the row of a message that has none, if nobody has done so yet."""
    database.run_anew("ADOPT", **row)


class _Commit(list[Hint]):
    """The hints of one transaction, or of one savepoint of it."""

    def __call__(self) -> None:
        publisher.send(self)


def hint_on_commit(hints: Sequence[Hint], delay: float = 0) -> None:
    """Hand hints to the publisher after the commit, with one callback per transaction."""
    connection = connections[conf.DATABASE]
    send = partial(publisher.later, hints, delay) if delay > 0 else partial(publisher.send, hints)
    if not connection.in_atomic_block:
        send()
        return
    if delay > 0:
        transaction.on_commit(send, using=conf.DATABASE, robust=True)
        return
    if connection.run_on_commit:
        savepoints, callback = connection.run_on_commit[-1][:2]
        # Only within one savepoint: its rollback drops the callback, and others' hints with it.
        if isinstance(callback, _Commit) and savepoints == set(connection.savepoint_ids):
            callback.extend(hints)
            return
    transaction.on_commit(_Commit(hints), using=conf.DATABASE, robust=True)


# ---- A run's


def claim(
    task: Any,
    ids: Sequence[UUID],
    *,
    alone: bool = False,
    along: int = 0,
    queue: str = "",
    limits: Iterable[float | None] = (),
) -> list[Attempt]:
    """Take those jobs that are free, in one statement.

    `along` looks at so many jobs enqueued after the last of them, and takes those of the same task,
    queue and time limits. `alone` takes jobs that failed before, too.
    """
    limits = list(limits)
    params = {
        "ids": list(ids),
        "task": task.name,
        "alone": alone,
        "worker": attempt.holder(),
        "after": max(ids),
        "along": along,
        "queue": queue,
        "limits": dumps(limits) if any(limits) else None,
    }
    found = database.run_anew("CLAIM_ALONG" if along else "CLAIM", **params)
    taken = [
        Attempt(task, database.uuid(job), token, attempts, limit, *map(decode, texts))
        for job, token, attempts, limit, *texts in found
    ]
    return sorted(taken, key=lambda mine: mine.id)


def renew(runs: Sequence[Attempt]) -> set[UUID]:
    """Renew those leases whose rows are free, and write the progress; return their ids."""

    def attempted() -> set[UUID]:
        told = {"progress": [mine.progress for mine in runs]}
        messages = [mine.message for mine in runs]
        found = database.run("RENEW", **told, messages=messages, **_fence(runs))
        return {database.uuid(job) for (job,) in found}

    try:
        return attempted()
    except (DataError, UnicodeError):  # what one job says must not cost the others their leases
        for mine in runs:
            mine.message = ""
        return attempted()


def still_mine(runs: Sequence[Attempt]) -> set[UUID]:
    return {database.uuid(job) for (job,) in database.run("STILL_MINE", **_fence(runs))}


def finish(runs: Sequence[Attempt], result: Any = None, *, wait: bool = False) -> set[UUID]:
    """End runs as succeeded; return the ids of those that could be ended.

    A row that is locked is left out, unless `wait`.
    """
    kept = None if result is None else dumps(result)
    found = _moved("FINISH" if wait else "FINISH_FREE", result=kept, **_fence(runs))
    if again := [hint for hint in found if hint.state == State.QUEUED]:
        # An atomic task's transaction is still open.
        transaction.on_commit(partial(publisher.send, again), using=conf.DATABASE)
    return {hint.id for hint in found}


def fail(
    mine: Attempt, error: str, pause: float, *, final: bool, eta: datetime | None = None
) -> str | None:
    """End an attempt that failed; return the state of the job, None if it was lost before.

    The next attempt comes in `pause` seconds, or at `eta`, as the body has asked for it.
    """
    asked: Asked = mine.asked
    changed = {name: getattr(asked, name) for name in ("args", "kwargs", "queue", "limit")}
    told = {"error": error, "final": final, "delay": pause, "eta": eta}
    found = _moved("FAIL", **told, **changed, **_fence([mine]))
    if not found:
        return None
    if found[0].state == State.QUEUED:
        publisher.send(found)
    elif found[0].state == State.SCHEDULED and eta is None:
        publisher.later(found, pause)
    return found[0].state


def release(runs: Sequence[Attempt], pause: float = 0, error: str | None = None) -> bool:
    """Hand jobs back unharmed; return whether any was.

    A locked row is left to its lease: this may run in the heartbeat's thread.
    """
    hints = _moved("RELEASE", delay=pause, error=error, **_fence(runs))
    publisher.later(hints, pause) if pause else publisher.send(hints)
    return bool(hints)


# ---- The worker's main process, which sends the hints itself: its publisher may have no time left


def lose(child: str, error: str) -> list[Hint]:
    """Fail the attempts of a child that died; return the hints."""
    return _moved("LOSE", worker=child, error=error, final=False, limit=0)


def release_boot() -> list[Hint]:
    """Hand back what the children of this start of a worker hold; return the hints."""
    # A `_` of a host's name is itself: as a wildcard it would cut the index short.
    boot = re.sub(r"([\\%_])", r"\\\1", attempt.boot())
    return _moved("RELEASE_BOOT", worker=f"{boot}/%", delay=0, error=None)


# ---- The loop's


def fire(limit: int) -> list[Hint]:
    """Act on so many jobs whose timers fired, and wake workers for those that are to run."""
    hints = _moved("FIRE", limit=limit)
    publisher.send(hint for hint in hints if hint.state == State.QUEUED)
    return hints


# ---- The operator's: `jobs` is a queryset


def cancel(jobs: Any, reason: str) -> int:
    """Finish unfinished jobs; a run in progress is fenced off at its next write."""
    ended = {"state": State.CANCELLED, "due_at": None, "finished_at": Now()}
    live = jobs.filter(due_at__isnull=False)
    return int(live.update(**ended, error=storable(reason)))


def retry(jobs: Any, spread: float) -> int:
    """Give jobs that are over a new budget, and end the pause of those that back off."""
    rows = jobs.model.objects
    start = RawSQL(database.words().SPREAD, [spread]) if spread else Now()  # noqa: S611 - ours
    # The states once more: a row may have changed while the update waited for its lock.
    paused = jobs.filter(backs_off()).order_by().values("pk")
    hurried = rows.filter(backs_off(), pk__in=paused).update(due_at=start, expires_at=None)
    taken = rows.filter(
        due_at__isnull=False, task=models.OuterRef("task"), key=models.OuterRef("key")
    )
    # One job for each key, or the unique index would refuse them all.
    newest = models.Window(
        RowNumber(),
        partition_by=["task", Coalesce("key", Cast("pk", models.CharField()))],
        order_by=F("pk").desc(),
    )
    over = jobs.filter(~models.Exists(taken), state__in=OVER).order_by()
    chosen = over.annotate(nth=newest).filter(nth=1).values("pk")
    anew = {"state": State.SCHEDULED, "due_at": start, "finished_at": None, "expires_at": None}
    found = rows.filter(pk__in=chosen, state__in=OVER).update(**anew, attempts=0, dirty=False)
    return int(hurried + found)


def revoke(jobs: Any, *, running: bool) -> None:
    """Cancel what waits, and what runs if `running`; else let its run be the last."""
    # First this, for those that change sides meanwhile: nobody claims what has expired.
    jobs.filter(due_at__isnull=False).update(expires_at=Now())
    cancel(jobs if running else jobs.exclude(state=State.RUNNING), "revoked")


def backs_off() -> Q:
    return Q(state=State.SCHEDULED, attempts__gt=0)


def retriable() -> Q:
    """Return the condition of what `retry` changes."""
    return backs_off() | Q(state__in=OVER)


def hasten(jobs: Any) -> int:
    """Let jobs that wait for their time start now."""
    return int(jobs.filter(state=State.SCHEDULED).update(due_at=Now()))


def prune(jobs: Any, batch: int) -> int:
    """Delete finished jobs past their retention, `batch` at a time: no lock is held long."""
    old = jobs.filter(
        Q(finished_at__lt=Now() - timedelta(seconds=conf.RETENTION_DEAD))
        | Q(finished_at__lt=Now() - timedelta(seconds=conf.RETENTION)) & ~Q(state=State.DEAD)
    ).order_by("finished_at")
    total = 0
    while pks := list(old.values_list("pk", flat=True)[:batch]):
        total += jobs.model.objects.filter(pk__in=pks, due_at=None)._raw_delete(jobs.db)
    return total


def _fence(runs: Sequence[Attempt]) -> dict[str, Any]:
    return {"ids": [mine.id for mine in runs], "tokens": [mine.token for mine in runs]}


def _moved(statement: str, **params: Any) -> list[Hint]:
    return [
        Hint(database.uuid(job), task, queue, decode(options), *rest)
        for job, task, queue, options, *rest in database.run_anew(statement, **params)
    ]
