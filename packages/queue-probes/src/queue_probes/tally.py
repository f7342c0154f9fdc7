"""Adds the durable jobs that ended to `Finished`, a batch with each visit of beat.

Counters of Prometheus may only grow, while rows of jobs are deleted in the end. The watermark says
up to which instant all ends are counted. It is locked while both change in one transaction, so a
crash changes neither, and of two beats one does nothing.

An end shows with its commit, later than the instant it carries. So the watermark keeps behind the
clock, and on PostgreSQL also behind every transaction that has written, though not for long: a
nightly import must not stop the counters. Not counted is what is committed later than that, and
what somebody deletes or retries before it is counted. Nothing is counted twice; but a dead job that
is retried ends again, and counts again.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from django.db import connections, transaction
from django.db.models import Case, Count, F, Q, Sum, Value, When
from django.db.models.functions import Now

from queue_probes.jobs import job_model
from queue_probes.models import DURATIONS, Finished, Watermark

BATCH = 100_000
# Spans are seconds.
MARGIN = 10.0
# So long the watermark waits for a transaction that has written and is not committed.
PATIENCE = 60.0
# So many tasks are told apart, the first ones; the values of a label must not grow for ever.
TASKS = 50
OTHER = "other"
# A statement's instant may be that of its transaction: stay a moment before it.
_SETTLED = """
SELECT least(statement_timestamp() - %s * interval '1s',
             greatest(coalesce(min(xact_start) - interval '1us', statement_timestamp()),
                      statement_timestamp() - %s * interval '1s'))
  FROM pg_stat_activity
 WHERE backend_xid IS NOT NULL AND datname = current_database() AND pid <> pg_backend_pid()"""


def tally() -> int:
    """Count a batch and return how many jobs it was; 0 where there are no durable jobs."""
    if job_model() is None:
        return 0
    Watermark.objects.bulk_create([Watermark(pk=1)], ignore_conflicts=True)
    with transaction.atomic():
        # Not waiting: another beat may be frozen while it holds the row.
        locked = Watermark.objects.select_for_update(skip_locked=True)
        mark = locked.annotate(now=Now()).filter(pk=1).first()
        if mark is None:
            return 0
        since, mark.until = mark.until, max(mark.until, settled(mark.now))
        ends = ended(since, mark.until).order_by("finished_at")
        # What one statement ended has one instant, and is counted together.
        mark.until = ends.values_list("finished_at", flat=True)[BATCH - 1 :].first() or mark.until
        counted = add(summed(ended(since, mark.until)))
        mark.save()
    return counted


def settled(now: datetime) -> datetime:
    """Return the instant up to which all ends show; `now` is the database's."""
    connection = connections[job_model().objects.db]
    if connection.vendor != "postgresql":
        return now - timedelta(seconds=MARGIN)
    with connection.cursor() as cursor:
        cursor.execute(_SETTLED, [MARGIN, PATIENCE])
        instant: datetime = cursor.fetchone()[0]
    return instant


def ended(since: datetime, until: datetime) -> Any:
    """Return the jobs that ended after `since`, up to `until`."""
    return job_model().objects.filter(finished_at__gt=since, finished_at__lte=until)


def summed(jobs: Any) -> Any:
    """Return task, queue, state and bucket, with jobs, attempts and duration of each group."""
    # Who cancels a job may do so hours after its last attempt.
    untimed = Q(state="cancelled") | Q(started_at=None)
    bounds = [
        When(ran__lte=timedelta(seconds=bound), then=Value(number))
        for number, bound in enumerate(DURATIONS[:-1])
    ]
    bucket = Case(When(untimed, then=None), *bounds, default=Value(len(DURATIONS) - 1))
    jobs = jobs.annotate(ran=F("finished_at") - F("started_at"), bucket=bucket).order_by()
    return jobs.values_list("task", "queue", "state", "bucket").annotate(
        count=Count("*"), tries=Sum("attempts"), total=Sum("ran")
    )


def add(groups: Iterable[tuple[Any, ...]]) -> int:
    """Add the groups to the rows of `Finished`; return how many jobs they are."""
    rows = {(row.task, row.queue, row.state): row for row in Finished.objects.all()}
    tasks = {task for task, _, _ in rows}
    changed, counted = {}, 0
    for task, queue, state, bucket, count, attempts, ran in groups:
        name = task if task in tasks or len(tasks) < TASKS else OTHER
        tasks.add(name)
        key = (name, queue, state)
        row = changed[key] = rows.setdefault(key, Finished(task=name, queue=queue, state=state))
        row.count += count
        row.attempts += attempts
        counted += count
        if bucket is not None:
            row.buckets[bucket] += count
            row.seconds += ran.total_seconds()
    for row in changed.values():
        row.save()
    return counted
