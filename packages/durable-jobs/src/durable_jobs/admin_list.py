"""The operator's list of jobs: its filters and the window of the table that they look at.

Every window is served by a partial index, so that a page costs the same with ten thousand rows
and with ten million. Jobs outside of it are found by search. What it does not bound: to find the
few running jobs, the index of all unfinished ones is read.
"""

from typing import Any

from django.contrib import admin
from django.contrib.admin.views.main import ChangeList
from django.db.models.functions import Right
from django.http import HttpRequest

from durable_jobs.models import Job, among

WINDOW = 10_000
# The last line of a traceback may be long, and starts with the name of the exception.
TAIL_CHARS = 1000
HEADLINE_CHARS = 150


def windows(state: str | None) -> list[Any]:
    """Return what the list looks at; None means unfinished and dead."""
    unfinished = Job.objects.filter(due_at__isnull=False).order_by("due_at")
    finished = Job.objects.filter(finished_at__isnull=False).order_by("-finished_at")
    dead = finished.filter(state=Job.State.DEAD)
    kinds: dict[str | None, list[Any]] = {
        None: [unfinished, dead],
        "dead": [dead],
        "succeeded": [finished],
        "cancelled": [finished],
    }
    return [jobs[:WINDOW] for jobs in kinds.get(state, [unfinished])]


def rows(state: str | None) -> list[Any]:
    """Return the windows for the rows: a few running jobs are found behind a long backlog."""
    if state not in (Job.State.SCHEDULED, Job.State.QUEUED, Job.State.RUNNING):
        return windows(state)
    jobs = Job.objects.filter(due_at__isnull=False, state=state)
    return [jobs.order_by("due_at")[:WINDOW]]


class StateFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Any:
        return [("unfinished", "Unfinished"), *((s.value, s.label) for s in Job.State)]

    def choices(self, changelist: Any) -> Any:
        default, *others = super().choices(changelist)
        return [{**default, "display": "Unfinished and dead"}, *others]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        if self.value() == "unfinished":
            return queryset.filter(due_at__isnull=False)
        return queryset.filter(state=self.value()) if self.value() else queryset


class ValuesInWindow(admin.SimpleListFilter):
    """Offers the values of the column `parameter_name` that the window holds."""

    parameter_name: str

    def lookups(self, request: HttpRequest, model_admin: Any) -> Any:
        seen: set[str] = set()
        for jobs in windows(request.GET.get("state")):
            seen.update(jobs.values_list(self.parameter_name, flat=True))
        return [(value, value) for value in sorted(seen)]

    def queryset(self, request: HttpRequest, queryset: Any) -> Any:
        return queryset.filter(**{self.parameter_name: self.value()}) if self.value() else queryset


class TaskFilter(ValuesInWindow):
    title = parameter_name = "task"


class QueueFilter(ValuesInWindow):
    title = parameter_name = "queue"


class JobChangeList(ChangeList):
    """The rows of one page without what only the detail page shows."""

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> Any:
        jobs = super().get_queryset(request, exclude_parameters)
        jobs = jobs.defer("args", "kwargs", "options", "result", "error").annotate(
            tail=Right("error", TAIL_CHARS)
        )
        if self.query:
            return jobs
        return jobs.filter(among(*rows(request.GET.get("state"))))
