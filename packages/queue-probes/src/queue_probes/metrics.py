"""`/metrics` for Prometheus: what the rows say at this moment.

Nothing is counted in this process, so every process of gunicorn says the same and a restart loses
nothing. What takes time is counting unfinished jobs. When half of `TIMEOUT` is too short for them,
`jobs_counted` is 0, `jobs_unfinished`, `jobs_oldest_age_seconds` and `jobs_dead` are missing, and
all the rest is there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any

from django.apps import apps
from django.db import OperationalError, connections, transaction
from django.db.models import Count, Min
from django.db.models.functions import Now
from django.http import HttpRequest, HttpResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from queue_probes.conf import conf, queues
from queue_probes.diagnosis import WORDS, verdicts
from queue_probes.models import BOUNDS, DURATIONS, Finished, Node, Queue
from queue_probes.tally import OTHER, TASKS
from queue_probes.views import allowed, within

Families = Iterator[Metric]


@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """Answer with all metrics; 503 when the database does not answer in time."""
    reply = partial(HttpResponse, content_type=CONTENT_TYPE_PLAIN_0_0_4)
    if not allowed(request):
        return reply("unauthorized\n", status=401)
    text, error = within("facts", lambda: generate_latest(registry))
    return reply(f"# database: {error}\n", status=503) if error else reply(text)


class Rows(Collector):
    """Reads the database whenever it is asked."""

    def collect(self) -> Families:
        yield from of_queues()
        yield from of_workers()
        if apps.is_installed("durable_jobs"):
            yield from of_ends()
            yield from of_timers()
            yield from of_jobs()


registry = CollectorRegistry()
registry.register(Rows())


def of_queues() -> Families:
    """The probes, and what is concluded from them."""
    up = GaugeMetricFamily("queue_up", "1 when the queue moves.", labels=["queue"])
    state = GaugeMetricFamily(
        "queue_state", "1 for the state the queue is in.", labels=["queue", "state"]
    )
    depth = GaugeMetricFamily("queue_depth", "Messages in the broker.", labels=["queue"])
    outstanding = GaugeMetricFamily(
        "queue_probe_outstanding_seconds",
        "How long a probe has been on its way; 0 when none is.",
        labels=["queue"],
    )
    age = GaugeMetricFamily(
        "queue_probe_age_seconds", "Time since a probe arrived.", labels=["queue"]
    )
    for verdict in verdicts():
        name = [verdict.queue]
        up.add_metric(name, verdict.fine)
        outstanding.add_metric(name, verdict.outstanding or 0)
        for word in WORDS:
            state.add_metric([*name, word], verdict.state == word)
        if verdict.depth is not None:
            depth.add_metric(name, verdict.depth)
        if verdict.age is not None:
            age.add_metric(name, verdict.age)
    yield from (up, state, depth, outstanding, age)
    latency = HistogramMetricFamily(
        "queue_probe_latency_seconds", "From sending a probe to its arrival.", labels=["queue"]
    )
    for row in Queue.objects.filter(name__in=queues()):
        latency.add_metric([row.name], cumulated(BOUNDS, row.buckets), row.seconds)
    yield latency


def of_workers() -> Families:
    """What each worker said of itself."""
    active = GaugeMetricFamily("worker_active_tasks", "Tasks it runs.", labels=["worker"])
    slots = GaugeMetricFamily("worker_slots", "Tasks it can run at once.", labels=["worker"])
    oldest = GaugeMetricFamily(
        "worker_oldest_task_age_seconds",
        "How long its longest task has run; 0 when it runs none.",
        labels=["worker"],
    )
    seen = GaugeMetricFamily(
        "worker_seen_age_seconds", "Time since it reported.", labels=["worker"]
    )
    for node in Node.objects.annotate(now=Now()):
        name = [node.name]
        active.add_metric(name, node.active)
        slots.add_metric(name, node.slots)
        oldest.add_metric(name, seconds(node.now - node.oldest_at) if node.oldest_at else 0)
        seen.add_metric(name, seconds(node.now - node.seen_at))
    yield from (active, slots, oldest, seen)


def of_ends() -> Families:
    """How jobs ended, since the app was installed."""
    labels = ["task", "queue", "state"]
    finished = CounterMetricFamily("jobs_finished", "Jobs by how they ended.", labels=labels)
    attempts = CounterMetricFamily("jobs_attempts", "Attempts of jobs that ended.", labels=labels)
    duration = HistogramMetricFamily(
        "jobs_duration_seconds",
        "The last attempt of jobs that succeeded or died.",
        labels=labels,
    )
    for row in Finished.objects.all():
        names = [row.task, row.queue, row.state]
        finished.add_metric(names, row.count)
        attempts.add_metric(names, row.attempts)
        if any(row.buckets):
            duration.add_metric(names, cumulated(DURATIONS, row.buckets), row.seconds)
    yield from (finished, attempts, duration)


def of_timers() -> Families:
    """The most overdue timer: the first entry of an index, however many jobs there are."""
    from durable_jobs.models import Job

    late = Job.objects.unfinished().aggregate(late=Now() - Min("due_at"))["late"]
    yield GaugeMetricFamily(
        "jobs_overdue_seconds",
        "How long ago the most overdue timer fired: whether the loop is alive.",
        value=seconds(late) if late else 0,
    )


def of_jobs() -> Families:
    """What has to be counted: unfinished jobs, and dead ones that are still kept."""
    labels = ["queue", "state"]
    unfinished = GaugeMetricFamily("jobs_unfinished", "Jobs to be done.", labels=labels)
    oldest = GaugeMetricFamily(
        "jobs_oldest_age_seconds", "Time since the oldest of them was enqueued.", labels=labels
    )
    dead = GaugeMetricFamily("jobs_dead", "Dead jobs that are kept.", labels=["task"])
    try:
        live, lost = counted()
    except OperationalError:
        live, lost = None, Counter[str]()
    yield GaugeMetricFamily(
        "jobs_counted", "1 when there was time to count jobs.", value=live is not None
    )
    if live is None:
        return
    for names, (count, age) in live.items():
        unfinished.add_metric(names, count)
        oldest.add_metric(names, age)
    for task, count in lost.items():
        dead.add_metric([task], count)
    yield from (unfinished, oldest, dead)


def counted() -> tuple[dict[tuple[str, str], tuple[int, float]], Counter[str]]:
    """Return number and oldest age of unfinished jobs, by queue and state; dead jobs by task."""
    from durable_jobs.models import Job

    states = (Job.State.SCHEDULED, Job.State.QUEUED, Job.State.RUNNING)
    live = {(queue, state.value): (0, 0.0) for queue in queues() for state in states}
    dead: Counter[str] = Counter()
    jobs = Job.objects.unfinished().values_list("queue", "state")
    gone = Job.objects.filter(state=Job.State.DEAD, finished_at__isnull=False)
    connection = connections[Job.objects.db]
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET LOCAL statement_timeout = %s", [int(conf.TIMEOUT * 500)])
        counts = jobs.annotate(count=Count("*"), age=Now() - Min("created_at"))
        for queue, state, count, age in counts:
            live[queue, state] = (count, seconds(age))
        tasks = gone.values_list("task").annotate(count=Count("*")).order_by("-count", "task")
        for place, (task, count) in enumerate(tasks):
            dead[task if place < TASKS else OTHER] += count
    return live, dead


def cumulated(bounds: Iterable[float], counts: list[int]) -> list[Any]:
    """Return buckets as Prometheus wants them: each counts all that is below its bound."""
    return list(zip(map(floatToGoString, bounds), accumulate(counts), strict=True))


def seconds(span: timedelta) -> float:
    return max(0.0, span.total_seconds())
