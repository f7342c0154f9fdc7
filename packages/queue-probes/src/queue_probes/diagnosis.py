"""From facts to a verdict for each queue: does it move, and if not, why."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from celery import current_app
from celery.exceptions import QueueNotFound
from django.db import connection
from django.db.models.functions import Now

from queue_probes.conf import conf, queues, threshold
from queue_probes.models import Node, Queue

WORDS = {
    "ok": "probes arrive",
    "busy": "late, but its workers work",
    "full": "every process of its workers runs a task, the oldest for {oldest:.0f} s; none starts",
    "backlogged": "its workers start tasks, far too few for what waits",
    "beat_dead": "beat has not looked at it: beat is dead or hangs",
    "broker_down": "beat cannot reach the broker, or is refused there",
    "unknown": "CELERY_TASK_QUEUES does not declare it: a wrong name in QUEUE_PROBES['QUEUES']?",
    "no_worker": "no worker serves it",
    "worker_dead": "its workers were killed",
    "worker_stopped": "its workers are frozen",
    "wedged": "its workers live, and start nothing",
}
FINE = ("ok", "busy")


@dataclass(frozen=True)
class Verdict:
    """What is said of one queue; spans are seconds, None when there is nothing to measure."""

    queue: str
    state: str
    threshold: float
    outstanding: float | None = None
    age: float | None = None
    latency: float | None = None
    depth: int | None = None
    moved: float | None = None
    oldest: float | None = None
    release: str = ""
    worker: str = ""

    @property
    def fine(self) -> bool:
        return self.state in FINE

    @property
    def words(self) -> str:
        return WORDS[self.state].format(oldest=self.oldest or 0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "words": self.words}


def verdicts() -> list[Verdict]:
    """Return the verdict of every queue that is probed; two queries, three when one is late."""
    rows = {row.name: row for row in Queue.objects.annotate(now=Now())}
    nodes = list(Node.objects.annotate(now=Now()))
    return [judge(name, rows.get(name), nodes) for name in queues()]


def judge(name: str, row: Any, nodes: list[Any]) -> Verdict:
    """Return the verdict of one queue; `row` and `nodes` know the database's `now`."""
    limit = threshold(name)
    if row is None:
        return Verdict(name, "beat_dead", limit)

    def since(moment: datetime | None) -> float | None:
        return None if moment is None else max(0.0, (row.now - moment).total_seconds())

    outstanding, failing = since(row.outstanding_since), since(row.failing_since)
    seen, moved = since(row.seen_at), since(row.moved_at)
    serving = [node for node in nodes if name in node.queues]
    if seen is None or seen > max(limit, 3 * conf.INTERVAL):
        state = "beat_dead"
    elif failing is not None and row.failure == QueueNotFound.__name__:
        state = "unknown"
    elif failing is not None and (failing > conf.INTERVAL or (outstanding or 0) > limit):
        state = "broker_down"
    elif outstanding is None or outstanding <= limit:
        state = "ok"
    else:
        state = _why_late(outstanding, outstanding if moved is None else moved, limit, serving)
    return Verdict(
        queue=name,
        state=state,
        threshold=limit,
        outstanding=outstanding,
        age=since(row.answered_at),
        latency=row.latency,
        depth=row.depth,
        moved=moved,
        oldest=max((since(node.oldest_at) or 0 for node in serving if alive(node)), default=None),
        release=row.release,
        worker=row.worker,
    )


def _why_late(outstanding: float, idle: float, limit: float, serving: list[Any]) -> str:
    if not serving:
        return "no_worker"
    living = [full(node) for node in serving if alive(node)]
    if not living:
        return "worker_stopped" if any_session(serving) else "worker_dead"
    # Nothing starts while every process runs a long task: that is work, for a while.
    if idle > limit * conf.FULL_FACTOR and all(living):
        return "full"
    patience = limit * conf.FULL_FACTOR if any(living) else max(limit, 2 * conf.NODE)
    if idle > patience:
        return "wedged"
    return "backlogged" if outstanding > limit * conf.BUSY_FACTOR else "busy"


def alive(node: Any) -> bool:
    """Tell whether the worker has reported lately."""
    return bool((node.now - node.seen_at).total_seconds() < conf.NODE_TTL)


def full(node: Any) -> bool:
    """Tell whether every process of a worker runs a task: none is stopped, none over its time."""
    limit = current_app.conf.task_time_limit
    if not (node.oldest_at and 0 < node.slots <= node.active - node.stopped):
        return False
    return not limit or (node.now - node.oldest_at).total_seconds() < limit + conf.NODE_TTL


def any_session(nodes: list[Any]) -> bool:
    """Tell whether one of these workers, which are silent, still has its session at PostgreSQL."""
    held = {node.backend: node.seen_at for node in nodes if node.backend}
    if connection.vendor != "postgresql" or not held:
        return False
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = ANY(%s)", [list(held)]
        )
        # A number that was given to somebody else since is not that worker's.
        return any(start and start <= held[pid] for pid, start in cursor.fetchall())
