"""Once a minute, how many durable jobs are in which state: the curves of the status page.

Does nothing where `durable_jobs` is not installed.
"""

from datetime import timedelta
from typing import Any

from django.apps import apps
from django.db.models import Count, Q
from django.db.models.functions import Now

from queue_probes.conf import conf
from queue_probes.models import JobSample, Queue

UNFINISHED = ("running", "queued", "scheduled")
# A sample looks at so many unfinished jobs, and so many dead ones, and does not count further.
LIMIT = 100_000


def job_model() -> Any:
    """Return the model of durable jobs, None where they are not installed."""
    return apps.get_model("durable_jobs", "Job") if apps.is_installed("durable_jobs") else None


def unfinished() -> Any:
    """Return unfinished jobs in the order of their index, which holds no others."""
    return job_model().objects.filter(due_at__isnull=False).order_by("due_at")


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
