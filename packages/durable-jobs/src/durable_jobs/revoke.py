"""Celery's `revoke`, written to rows: what a worker remembers ends with the worker.

What waits is cancelled. What runs goes on to its end and has no other attempt; with `terminate` it
is cancelled too, and its child killed as soon as that has no other job in hand. Every worker is
told, and nobody while none is up: `result.revoke()` and `jobs cancel` write the row themselves.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

from celery.platforms import signals
from celery.utils.functional import maybe_list
from celery.worker import control, state
from celery.worker.request import Request
from django.db import connections

from durable_jobs import attempt, transitions
from durable_jobs.conf import conf
from durable_jobs.database import ago, brief_locks
from durable_jobs.models import Job

logger = logging.getLogger("durable_jobs.revoke")
LOCK_SECONDS = 0.2
# Again after 0.5 s, 1 s and so on, for two minutes: while the database is away, a row is locked or
# not committed yet, or a child has other jobs in hand.
AGAIN_SECONDS, TRIES = 0.5, 8
# Ids without a row: should it be committed yet, its first hint is the moment to cancel it.
early: set[str] = set()
Wanted = Iterable[str] | Mapping[str, Any]


def settle(wanted: Wanted, *, running: bool = False) -> dict[UUID, str]:
    """Revoke jobs by their ids, or by stamps, in their rows; return them."""
    ids = stamped(wanted) if isinstance(wanted, Mapping) else named(wanted)
    jobs = Job.objects.filter(pk__in=ids)
    with brief_locks(LOCK_SECONDS):
        transitions.revoke(jobs, running=running)
    if not isinstance(wanted, Mapping):
        early.update(wanted)
    early.difference_update(ids.values())
    return ids


def named(wanted: Iterable[str]) -> dict[UUID, str]:
    """Return the jobs of these ids, as calls were given them or as they are rows' keys."""
    jobs = Job.objects
    return {pk: each for each in wanted for pk in jobs.with_id(each).values_list("pk", flat=True)}


def stamped(stamps: Mapping[str, Any]) -> dict[UUID, str]:
    """Return the unfinished jobs that carry one of these stamps."""
    jobs = Job.objects.unfinished().filter(options__headers__has_key="stamps")
    found = jobs.values_list("pk", "options__headers__stamps")
    pairs = [(name, value) for name, some in stamps.items() for value in maybe_list(some)]
    return {
        pk: str(pk)
        for pk, has in found
        if any(value in maybe_list(has.get(name) or ()) for name, value in pairs)
    }


def settle_soon(
    consumer: Any, wanted: Wanted, number: int | None, tries: int = TRIES, among: Any = None
) -> None:
    """Revoke now, and again until it is done: `number` is the signal that ends a child."""
    again = True
    try:
        ids = settle(wanted, running=number is not None)
        wanted = set(ids.values() if isinstance(wanted, Mapping) else wanted)
        among = kill(consumer.pool, ids, number, among) if number else None
        again = bool(among or early & wanted)
    except Exception as error:
        logger.warning("durable_jobs: a revoke could not be written yet: %r", error)
    finally:
        connections[conf.DATABASE].close()  # or the next child inherits it
    if again and tries:
        pause = AGAIN_SECONDS * 2 ** (TRIES - tries)
        consumer.timer.call_after(pause, settle_soon, (consumer, wanted, number, tries - 1, among))
    else:  # no job, or not within the time that a transaction takes
        early.difference_update(wanted)


def kill(pool: Any, ids: Mapping[UUID, str], number: int, among: Any) -> list[Any]:
    """End the children that run these jobs; return the hints whose child has others in hand."""
    if among is None:
        ended = Job.objects.filter(pk__in=ids, state=Job.State.CANCELLED, finished_at__gt=ago(300))
        holders = set(ended.values_list("worker", flat=True))
        among = [
            hint
            for hint in list(state.active_requests)
            if getattr(hint, "jobs", None) and attempt.holder(hint.worker_pid) in holders
        ]
    left = []
    for hint in among:
        if hint not in state.active_requests or hint.worker_pid == os.getpid():
            continue  # over; or in a thread, which learns it at its next write
        holder = attempt.holder(hint.worker_pid)
        if Job.objects.filter(worker=holder, state__startswith=Job.State.RUNNING).exists():
            left.append(hint)
        elif hint.id in ids.values():
            Request.terminate(hint, pool, number)
        else:  # the hint bears another job's id, of which nobody must hear that it was revoked
            hint._already_cancelled = True
            hint.acknowledge()
            pool.terminate_job(hint.worker_pid, number)
    return left


def told(name: str, panel: Any, **given: Any) -> Any:
    """Write to the rows what a control command says, and let Celery do its part."""
    wanted = given.get("headers") or set(maybe_list(given.get("task_id")) or ())
    if isinstance(wanted, list):  # from the command line
        wanted = dict(each.split("=", 1) for each in wanted)
    ends = name == "terminate" or given.get("terminate")
    number = int(signals.signum(given.get("signal") or control.TERM_SIGNAME)) if ends else None
    settle_soon(panel.consumer, wanted, number)
    return getattr(control, name)(panel, **given)


for name in ("revoke", "terminate", "revoke_by_stamped_headers"):
    control.Panel.data[name] = partial(told, name)
