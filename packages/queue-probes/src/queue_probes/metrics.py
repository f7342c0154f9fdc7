"""`/metrics` for Prometheus: what the rows say at this moment.

Nothing is counted in this process, so every process of gunicorn says the same and a restart loses
nothing. What takes time is counting unfinished jobs. When half of `TIMEOUT` is too short for them,
`jobs_counted` is 0, `jobs_unfinished`, `jobs_oldest_age_seconds` and `jobs_dead` are missing, and
all the rest is there.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any

from django.db import OperationalError, connections, transaction
from django.db.models import Count, Min
from django.db.models.functions import Now
from django.http import HttpRequest, HttpResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily as Counter
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from queue_probes.conf import conf, queues
from queue_probes.diagnosis import WORDS, verdicts
from queue_probes.jobs import UNFINISHED, dead, job_model
from queue_probes.models import BOUNDS, DURATIONS, Finished, Node, Queue
from queue_probes.tally import OTHER, TASKS
from queue_probes.views import allowed, within

# By metric: the values of its labels, then its own.
Samples = dict[str, Iterable[tuple[Any, ...]]]
QUEUE, WORKER, ENDS, LIVE = ["queue"], ["worker"], ["task", "queue", "state"], ["queue", "state"]
METRICS: dict[str, tuple[Any, list[str], str]] = {
    "queue_up": (Gauge, QUEUE, "1 when the queue moves."),
    "queue_state": (Gauge, LIVE, "1 for the state the queue is in."),
    "queue_depth": (Gauge, QUEUE, "Messages in the broker."),
    "queue_probe_outstanding_seconds": (Gauge, QUEUE, "Since when a probe is on its way, or 0."),
    "queue_probe_age_seconds": (Gauge, QUEUE, "Time since a probe arrived."),
    "queue_probe_latency_seconds": (Histogram, QUEUE, "From sending a probe to its arrival."),
    "worker_active_tasks": (Gauge, WORKER, "Tasks it runs."),
    "worker_slots": (Gauge, WORKER, "Tasks it can run at once."),
    "worker_oldest_task_age_seconds": (Gauge, WORKER, "How long its longest task has run, or 0."),
    "worker_seen_age_seconds": (Gauge, WORKER, "Time since it reported."),
    "jobs_finished": (Counter, ENDS, "Jobs by how they ended."),
    "jobs_attempts": (Counter, ENDS, "Attempts of jobs that ended."),
    "jobs_duration_seconds": (Histogram, ENDS, "Last attempt of jobs that succeeded or died."),
    "jobs_overdue_seconds": (Gauge, [], "How late the latest timer is."),
    "jobs_loop_age_seconds": (Gauge, [], "Time since the loop ended a pass; +Inf: it never did."),
    "jobs_counted": (Gauge, [], "1 when there was time to count jobs."),
    "jobs_unfinished": (Gauge, LIVE, "Jobs to be done."),
    "jobs_oldest_age_seconds": (Gauge, LIVE, "Time since the oldest of them was enqueued."),
    "jobs_dead": (Gauge, ["task"], "Dead jobs that are kept."),
}


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

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; of a sample come the values of its labels first, then its own."""
        jobs = (of_ends, of_timers, of_jobs) if job_model() else ()
        for samples in (of_queues, of_workers, *jobs):
            for name, found in samples().items():
                kind, labels, text = METRICS[name]
                made = kind(name, text, labels=labels)
                for sample in found:
                    made.add_metric(sample[: len(labels)], *sample[len(labels) :])
                yield made


registry = CollectorRegistry()
registry.register(Rows())


def of_queues() -> Samples:
    """The probes, and what is concluded from them."""
    found, rows = verdicts(), Queue.objects.filter(name__in=queues())
    return {
        "queue_up": [(v.queue, v.fine) for v in found],
        "queue_state": [(v.queue, word, v.state == word) for v in found for word in WORDS],
        "queue_depth": [(v.queue, v.depth) for v in found if v.depth is not None],
        "queue_probe_outstanding_seconds": [(v.queue, v.outstanding or 0) for v in found],
        "queue_probe_age_seconds": [(v.queue, v.age) for v in found if v.age is not None],
        "queue_probe_latency_seconds": [(row.name, *cumulated(BOUNDS, row)) for row in rows],
    }


def of_workers() -> Samples:
    """What each worker said of itself."""
    nodes: list[Any] = list(Node.objects.annotate(now=Now()))
    return {
        "worker_active_tasks": [(node.name, node.active) for node in nodes],
        "worker_slots": [(node.name, node.slots) for node in nodes],
        "worker_oldest_task_age_seconds": [
            (node.name, seconds(node.now - (node.oldest_at or node.now))) for node in nodes
        ],
        "worker_seen_age_seconds": [
            (node.name, seconds(node.now - node.seen_at)) for node in nodes
        ],
    }


def of_ends() -> Samples:
    """How jobs ended, since the app was installed."""
    rows = [((row.task, row.queue, row.state), row) for row in Finished.objects.all()]
    timed = [(key, cumulated(DURATIONS, row)) for key, row in rows if any(row.buckets)]
    return {
        "jobs_finished": [(*key, row.count) for key, row in rows],
        "jobs_attempts": [(*key, row.attempts) for key, row in rows],
        "jobs_duration_seconds": [(*key, *values) for key, values in timed],
    }


def of_timers() -> Samples:
    """The loop, and the latest timer: the first entry of an index, however many jobs there are."""
    late = job_model().objects.unfinished().aggregate(late=Now() - Min("due_at"))["late"]
    age = job_model().objects.loop_age()
    return {
        "jobs_overdue_seconds": [(seconds(late or timedelta()),)],
        "jobs_loop_age_seconds": [(math.inf if age is None else age,)],
    }


def of_jobs() -> Samples:
    """What has to be counted: unfinished jobs, and dead ones that are still kept."""
    try:
        live, lost = counted()
    except OperationalError:
        return {"jobs_counted": [(0,)]}
    return {
        "jobs_counted": [(1,)],
        "jobs_unfinished": [(*key, count) for key, (count, _) in live.items()],
        "jobs_oldest_age_seconds": [(*key, age) for key, (_, age) in live.items()],
        "jobs_dead": lost.items(),
    }


def counted() -> tuple[dict[tuple[str, str], tuple[int, float]], dict[str, int]]:
    """Return number and oldest age of unfinished jobs, by queue and state; dead jobs by task."""
    live = {(queue, state): (0, 0.0) for queue in queues() for state in UNFINISHED}
    lost: dict[str, int] = defaultdict(int)
    connection = connections[job_model().objects.db]
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET LOCAL statement_timeout = %s", [int(conf.TIMEOUT * 500)])
        jobs = job_model().objects.unfinished().values_list("queue", "state")
        numbers = jobs.annotate(count=Count("*"), age=Now() - Min("created_at"))
        for queue, state, count, age in numbers:
            live[queue, state] = (count, seconds(age))
        tasks = dead().values_list("task").annotate(count=Count("*")).order_by("-count", "task")
        for place, (task, count) in enumerate(tasks):
            lost[task if place < TASKS else OTHER] += count
    return live, lost


def cumulated(bounds: Iterable[float], row: Queue | Finished) -> tuple[list[Any], float]:
    """Return a row's buckets as Prometheus wants them, each with all below its bound, and sum."""
    names = map(floatToGoString, bounds)
    return list(zip(names, accumulate(row.buckets), strict=True)), row.seconds


def seconds(span: timedelta) -> float:
    return max(0.0, span.total_seconds())
