"""The table of jobs. A row is the truth about a job; a Celery message only wakes somebody up.

`due_at` is the job's only timer: the moment the reconcile loop acts on the row unless somebody
moved it. It is set exactly while the job is unfinished. `token` grows with each claim and every
later write of the run carries it, so a run that lost its job can change nothing.
"""

from contextlib import suppress
from functools import reduce
from operator import or_
from typing import Any, Self
from uuid import UUID

from django.contrib.contenttypes.fields import GenericForeignKey
from django.contrib.contenttypes.models import ContentType
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from durable_jobs import transitions
from durable_jobs.attempt import State
from durable_jobs.database import ago
from durable_jobs.fields import SentJSON
from durable_jobs.ids import uuid7
from durable_jobs.transitions import retriable
from durable_jobs.values import (
    ID_MAX_CHARS,
    KEY_MAX_CHARS,
    OWNER_MAX_CHARS,
    QUEUE_MAX_CHARS,
    TASK_MAX_CHARS,
    owner_key,
)

# A bulk retry may not become the next outage: more than RETRY_AT_ONCE jobs start at this pace.
RETRY_AT_ONCE = 100
RETRY_PER_SECOND = 10


class Among(models.Func):
    """True for the rows whose `pk` a query selects."""

    # The planner takes "= ANY(ARRAY(...))" for a few lookups by primary key. It may answer
    # "IN (...)" of as many rows by reading the table.
    arg_joiner = " IN "
    template = "%(expressions)s"
    output_field = models.BooleanField()

    def as_postgresql(self, compiler: Any, connection: Any, **_: Any) -> Any:
        return self.as_sql(
            compiler, connection, template="%(expressions)s)", arg_joiner=" = ANY(ARRAY"
        )


def among(*selections: models.QuerySet[Any]) -> Q:
    """Return the condition that a job is one of those that these queries select."""
    chosen = (Q(Among(F("pk"), models.Subquery(jobs.values("pk")))) for jobs in selections)
    return reduce(or_, chosen)


class JobQuerySet(models.QuerySet["Job"]):
    """Filters and the operator's verbs, which return how many rows they changed."""

    def for_owner(self, owner: models.Model) -> Self:
        return self.filter(
            owner_type=ContentType.objects.get_for_model(owner), owner_id=owner_key(owner)
        )

    def with_id(self, task_id: object) -> Self:
        """Return the jobs of that id, as calls were given it or as it is a row's key."""
        found = Q(given_id=str(task_id))
        with suppress(ValueError):
            found |= Q(pk=UUID(str(task_id)))
        return self.filter(found)

    def unfinished(self) -> Self:
        return self.filter(due_at__isnull=False)

    def overdue(self, seconds: float) -> Self:
        """Return jobs whose timer fired that long ago: the loop lags, or does not run."""
        return self.filter(due_at__lt=ago(seconds))

    @staticmethod
    def loop_age() -> float | None:
        """Return the seconds since a pass of the loop ended; None when none ever did."""
        found = LoopPass.objects.annotate(age=Now() - F("at")).values_list("age", flat=True).first()
        return None if found is None else max(0.0, found.total_seconds())

    def among(self, *selections: models.QuerySet[Any]) -> Self:
        """Return the jobs that one of these queries selects, which may be slices."""
        return self.filter(among(*selections))

    def cancel(self, reason: str = "cancelled") -> int:
        """Finish unfinished jobs; a run in progress is fenced off at its next write."""
        return transitions.cancel(self, reason)

    @staticmethod
    def pace(jobs: int) -> float:
        """Return the seconds over which `retry` spreads so many jobs, unless it is told."""
        return 0 if jobs <= RETRY_AT_ONCE else jobs / RETRY_PER_SECOND

    def retry(self, spread: float | None = None) -> int:
        """Give dead and cancelled jobs a new budget, and end the pause of those that back off.

        They start spread over that many seconds, also those that have expired. A job whose key is
        held by a live one stays as it is: that one does its work.
        """
        if spread is None:
            spread = self.pace(self.filter(retriable()).count())
        return transitions.retry(self, spread)

    def prune(self, batch: int = 10_000) -> int:
        """Delete finished jobs past their retention, `batch` at a time: no lock is held long."""
        return transitions.prune(self, batch)


# As the database holds it: a timer while the job is unfinished, an end from then on.
_LIVE = Q(due_at__isnull=False, finished_at__isnull=True, state__in=State.values[:3])
_OVER = Q(due_at__isnull=True, finished_at__isnull=False, state__in=State.values[3:])
_KEY = Q(key__isnull=False, due_at__isnull=False)


class Job(models.Model):
    """One call of a task, from the transaction that asked for it to its end."""

    State = State

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    given_id = models.CharField(  # noqa: DJ001
        max_length=ID_MAX_CHARS, null=True, blank=True, editable=False
    )
    task = models.CharField(max_length=TASK_MAX_CHARS)
    args = SentJSON(default=list)
    kwargs = SentJSON(default=dict)
    queue = models.CharField(max_length=QUEUE_MAX_CHARS)
    options = models.JSONField(
        default=dict, help_text="Priority, time limits and headers that follow the job."
    )
    key = models.CharField(max_length=KEY_MAX_CHARS, null=True, blank=True)  # noqa: DJ001
    owner_type = models.ForeignKey(
        ContentType, null=True, blank=True, on_delete=models.CASCADE, db_index=False
    )
    owner_id = models.CharField(max_length=OWNER_MAX_CHARS, null=True, blank=True)  # noqa: DJ001
    owner = GenericForeignKey("owner_type", "owner_id")
    state = models.CharField(max_length=10, choices=State, default=State.QUEUED)
    due_at = models.DateTimeField(null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    token = models.IntegerField(db_default=0)
    attempts = models.SmallIntegerField(db_default=0)
    max_attempts = models.SmallIntegerField(db_default=8)
    dirty = models.BooleanField(db_default=False)
    progress = models.SmallIntegerField(db_default=0)
    message = models.CharField(max_length=200, db_default="", blank=True)
    error = models.TextField(db_default="", blank=True)
    result = SentJSON(null=True, blank=True)
    worker = models.CharField(max_length=200, db_default="", blank=True)
    created_at = models.DateTimeField(db_default=Now())
    queued_at = models.DateTimeField(db_default=Now())
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)

    objects = JobQuerySet.as_manager()

    class Meta:
        # Finished rows stay out of the loop's index, so that they cost it nothing.
        indexes = [
            models.Index("due_at", name="durable_job_due", condition=Q(due_at__isnull=False)),
            models.Index(
                "given_id", name="durable_job_given_id", condition=Q(given_id__isnull=False)
            ),
            models.Index(
                "owner_type",
                "owner_id",
                name="durable_job_owner",
                condition=Q(owner_id__isnull=False),
            ),
            models.Index(
                "finished_at", name="durable_job_finished", condition=Q(finished_at__isnull=False)
            ),
            models.Index("finished_at", name="durable_job_dead", condition=Q(state="dead")),
            # Whose child dies, or who stops, finds the few jobs it holds; also by a prefix. Spelled
            # so that who asks for state = 'running', as each end of a run does, cannot take it: it
            # is full of what ran a moment ago.
            models.Index(
                fields=["worker"],
                name="durable_job_worker",
                condition=Q(state__startswith="running"),
                opclasses=["varchar_pattern_ops"],
            ),
        ]
        constraints = [
            models.UniqueConstraint("task", "key", name="durable_job_key", condition=_KEY),
            models.CheckConstraint(
                name="durable_job_has_a_timer_or_an_end", condition=_LIVE | _OVER
            ),
        ]

    def __str__(self) -> str:
        return f"{self.task}[{self.task_id}] {self.state}"

    @property
    def task_id(self) -> str:
        """What Celery calls it: the id that the call was given, or the row's."""
        return self.given_id or str(self.id)

    @property
    def finished(self) -> bool:
        return self.due_at is None

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this job: give it to the system that must not act twice."""
        return f"job-{self.id}"


class LoopPass(models.Model):
    """When a pass of the loop last ended, whoever did it: one row."""

    id = models.SmallIntegerField(primary_key=True, default=1)
    at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return f"last pass of the loop at {self.at}"
