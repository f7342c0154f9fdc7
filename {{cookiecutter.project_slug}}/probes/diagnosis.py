"""From facts to a verdict for each queue: does it move, and if not, why."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from celery import current_app
from django.db import connection
from django.db.models.functions import Now

from probes.conf import conf, queues, threshold
from probes.models import Node, Queue

WORDS = {
    "ok": "probes arrive",
    "busy": "late, but its workers start tasks",
    "backlogged": "its workers start tasks, far too few for what waits",
    "beat_dead": "beat has not looked at it: beat is dead or hangs",
    "broker_down": "beat cannot reach the broker, or is refused there",
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
    release: str = ""
    worker: str = ""

    @property
    def fine(self) -> bool:
        return self.state in FINE

    @property
    def words(self) -> str:
        return WORDS[self.state]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "words": self.words}


def verdicts() -> list[Verdict]:
    """Return the verdict of every queue that is probed; two queries, three when one is late."""
    rows = {row.name: row for row in Queue.objects.annotate(now=Now())}
    nodes = list(Node.objects.annotate(now=Now()))
    return [judge(name, rows.get(name), nodes) for name in queues()]


def judge(name: str, row: Any, nodes: Iterable[Any]) -> Verdict:
    """Return the verdict of one queue; `row` and `nodes` know the database's `now`."""
    limit = threshold(name)
    if row is None:
        return Verdict(name, "beat_dead", limit)

    def since(moment: datetime | None) -> float | None:
        return None if moment is None else max(0.0, (row.now - moment).total_seconds())

    outstanding, failing = since(row.outstanding_since), since(row.failing_since)
    seen, moved = since(row.seen_at), since(row.moved_at)
    if seen is None or seen > max(limit, 3 * conf.INTERVAL):
        state = "beat_dead"
    elif failing is not None and (failing > conf.INTERVAL or (outstanding or 0) > limit):
        state = "broker_down"
    elif outstanding is None or outstanding <= limit:
        state = "ok"
    else:
        state = _why_late(name, outstanding > limit * conf.BUSY_FACTOR, moved, limit, nodes)
    return Verdict(
        queue=name,
        state=state,
        threshold=limit,
        outstanding=outstanding,
        age=since(row.answered_at),
        latency=row.latency,
        depth=row.depth,
        moved=moved,
        release=row.release,
        worker=row.worker,
    )


def _why_late(
    name: str, very: bool, moved: float | None, limit: float, nodes: Iterable[Any]
) -> str:
    serving = [node for node in nodes if name in node.queues]
    if not serving:
        return "no_worker"
    if not any((node.now - node.seen_at).total_seconds() < conf.NODE_TTL for node in serving):
        return "worker_stopped" if any_session(serving) else "worker_dead"
    # Nothing starts while every process runs a long task: that is work, up to the time limit.
    if (moved is None or moved > max(limit, 2 * conf.NODE)) and not any(map(full, serving)):
        return "wedged"
    return "backlogged" if very else "busy"


def full(node: Any) -> bool:
    """Tell whether all processes of a worker that lives run tasks, none of them for too long."""
    limit = current_app.conf.task_time_limit
    if (node.now - node.seen_at).total_seconds() >= conf.NODE_TTL or not node.oldest_at:
        return False
    running = (node.now - node.oldest_at).total_seconds()
    return 0 < node.slots <= node.active and (not limit or running < limit + conf.NODE_TTL)


def any_session(nodes: Iterable[Any]) -> bool:
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
