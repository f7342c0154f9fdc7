"""Durable jobs: a sample of their numbers once a minute, and what the status page lists of them.

Every query reads a bounded number of rows through an index, however many jobs the table holds.
Where `durable_jobs` is not installed, `job_model` returns None and nobody asks for the rest.
"""

from collections import Counter
from datetime import timedelta
from typing import Any

from django.apps import apps
from django.db.models import Count, F, Q
from django.db.models.functions import Now, Right
from django.urls import NoReverseMatch, reverse

from queue_probes.conf import conf
from queue_probes.models import JobSample, Queue

UNFINISHED = ("running", "queued", "scheduled")
# A sample looks at so many unfinished jobs, and so many dead ones, and does not count further.
LIMIT = 100_000
# On the page counting ends sooner. Jobs that run or failed are looked for among so many unfinished
# ones: those whose timers fire first, and a running job's fires within its lease.
COUNTED = 5_000
# Dead jobs are grouped, and retried by group, among the newest of them.
DEAD = 1_000
SHOWN = 20
TAIL_CHARS = 1000
HEADLINE_CHARS = 150


def job_model() -> Any:
    """Return the model of durable jobs, None where they are not installed."""
    return apps.get_model("durable_jobs", "Job") if apps.is_installed("durable_jobs") else None


def unfinished() -> Any:
    """Return unfinished jobs in the order of their index, which holds no others."""
    return job_model().objects.unfinished().order_by("due_at")


def dead() -> Any:
    """Return dead jobs, newest first, in the order of their index."""
    jobs = job_model().objects.filter(state="dead", finished_at__isnull=False)
    return jobs.order_by("-finished_at")


def counts(limit: int) -> dict[str, int]:
    """Return the number of jobs by state, among the first `limit` unfinished and dead ones."""
    by_state = {state: Count("pk", filter=Q(state=state)) for state in UNFINISHED}
    return {**unfinished()[:limit].aggregate(**by_state), "dead": dead()[:limit].count()}


def sample() -> None:
    """Write the row of this minute unless it exists; any number of processes may call it."""
    now = Queue.objects.annotate(now=Now()).values_list("now", flat=True).first()
    if now is None or job_model() is None:
        return
    minute = now.replace(second=0, microsecond=0)
    if JobSample.objects.filter(at=minute).exists():
        return
    row = JobSample(at=minute, counts=counts(LIMIT))
    JobSample.objects.bulk_create([row], ignore_conflicts=True)
    JobSample.objects.filter(at__lt=Now() - timedelta(seconds=conf.RETENTION)).delete()


def running() -> list[dict[str, Any]]:
    """Return the jobs that started last, of those that run."""
    jobs = _soonest().filter(state="running").order_by("-started_at")
    return _listed(jobs, "worker", "progress", "message", span=Now() - F("started_at"))


def failing() -> list[dict[str, Any]]:
    """Return the jobs that failed and will be tried again, those with most attempts first."""
    jobs = _soonest().filter(state__in=("scheduled", "queued"), attempts__gt=0).exclude(error="")
    return _listed(jobs.order_by("-attempts", "due_at"), "state", span=F("due_at") - Now())


def died() -> dict[str, Any]:
    """Return the newest dead jobs by task, and of each task how many there are."""
    tasks = Counter(dead().values_list("task", flat=True)[:DEAD])
    groups: dict[str, list[dict[str, Any]]] = {task: [] for task in list(tasks)[:SHOWN]}
    for job in _listed(dead(), "finished_at"):
        groups[job["task"]].append(job)
    return {
        "capped": sum(tasks.values()) >= DEAD,
        "groups": [{"task": t, "count": tasks[t], "jobs": newest} for t, newest in groups.items()],
    }


def _soonest() -> Any:
    return job_model().objects.among(unfinished()[:COUNTED])


def _listed(jobs: Any, *names: str, **span: Any) -> list[dict[str, Any]]:
    """Return what is shown of the first jobs: names of fields, `seconds` of a span, and the rest.

    Neither arguments nor results are read, and of an error the last line.
    """
    known = ("id", "task", "queue", "attempts", *names)
    found = list(jobs.values(*known, **span, error_tail=Right("error", TAIL_CHARS))[:SHOWN])
    for row in found:
        lines = row.pop("error_tail").strip().splitlines() or [""]
        row |= {
            "error": lines[-1][:HEADLINE_CHARS],
            "url": admin_url("durable_jobs_job_change", row["id"]),
        }
        if passed := row.pop("span", None):
            row["seconds"] = max(0.0, passed.total_seconds())
    return found


def admin_url(view: str, *args: Any) -> str:
    """Return the URL of a page of the admin, "" where there is none."""
    try:
        return reverse(f"admin:{view}", args=args)
    except NoReverseMatch:
        return ""
