"""Signs of life of a release: does it serve each queue, and does work move on each?

Read from what `queue_probes` keeps in the database. Where that is not installed workers are asked
over the broker, and that work moves is not shown.
"""

import time
from collections.abc import Callable
from datetime import datetime, timedelta

from celery import current_app
from django.apps import apps
from django.db import Error, connection
from django.db.models.functions import Now

from rollout.tasks import queues

Found = tuple[list[str], list[str]]


def probed() -> bool:
    """Tell whether a probe goes through the queues."""
    return apps.is_installed("queue_probes")


def unwell() -> list[str]:
    """Return the queues that are not well, a line each."""
    if not probed():
        return []
    from queue_probes.diagnosis import verdicts

    return [f"{found.queue}: {found.words}" for found in verdicts() if found.state != "ok"]


def without_worker(release: str, _since: datetime) -> Found:
    """Return the queues that no living worker of the release serves; and []."""
    served = served_by(release) if probed() else said_to_be_served_by(release)
    return [f"{queue}: no worker" for queue in queues() if queue not in served], []


def served_by(release: str) -> set[str]:
    """Return the queues of the workers of a release that have told the database of themselves."""
    from queue_probes.conf import conf
    from queue_probes.models import Node

    # Sooner than for others, whom a late report would alarm: what was killed leaves its row behind.
    seen = Now() - timedelta(seconds=1.5 * conf.NODE)
    living = Node.objects.filter(release=release, seen_at__gt=seen)
    return {queue for node in living for queue in node.queues}


def said_to_be_served_by(release: str) -> set[str]:
    """Return the queues of the workers that answer, and whose name has `.<release>@` in it."""
    answers = current_app.control.inspect(timeout=1).active_queues() or {}
    ours = [found for node, found in answers.items() if f".{release}@" in node]
    return {queue["name"] for found in ours for queue in found}


def without_answer(release: str, since: datetime) -> Found:
    """Return the queues that nothing shows to move, and those that move and are too busy.

    The proof is a probe that the release has answered since then. While one waits that beat has
    sent, it is proof as well that the release's workers, and no others, have started tasks since
    then, or that all of their processes run some.
    """
    if not probed():
        return [], ["queue_probes is not installed: nothing shows that work moves"]
    from queue_probes.conf import conf
    from queue_probes.diagnosis import full, judge
    from queue_probes.models import Node, Queue

    missing, busy = [], []
    rows = {row.name: row for row in Queue.objects.annotate(now=Now())}
    nodes = list(Node.objects.annotate(now=Now()))
    for name in queues():
        row = rows.get(name, Queue(name=name))
        if row.release == release and row.answered_at and row.answered_at > since:
            continue
        verdict = judge(name, rows.get(name), nodes)
        serving = [node for node in nodes if name in node.queues and node.seen_at > since]
        ours = [node for node in serving if node.release == release]
        # Which worker has moved a queue is not noted.
        moves = ours == serving and row.moved_at and row.moved_at > since
        sent = row.seen_at and row.seen_at > since and not row.failing_since
        waits = sent and (verdict.outstanding or 0) > conf.INTERVAL
        if waits and ours and (moves or all(map(full, ours))):
            busy.append(f"{name}: its workers start tasks, the probe waits behind them")
        elif verdict.state in ("ok", "busy", "backlogged"):
            missing.append(f"{name}: no probe answered yet; --patience SECONDS waits longer")
        else:
            missing.append(f"{name}: no probe answered: {verdict.words}")
    return missing, busy


def wait(look: Callable[[datetime], Found], seconds: float) -> Found:
    """Look until nothing is missing, or for that many seconds; return what was seen last.

    `look` is told when this began, in the database's time, and returns first what is missing.
    """
    deadline = time.monotonic() + seconds
    since = None
    while True:
        try:
            since = since or now()
            missing, rest = look(since)
        except Error as error:  # a database that restarts meanwhile
            connection.close()
            missing, rest = [f"the database does not answer: {str(error).strip()}"], []
        if not missing or time.monotonic() >= deadline:
            return missing, rest
        time.sleep(0.2)


def now() -> datetime:
    """Return the database's time."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT CURRENT_TIMESTAMP")
        moment: datetime = cursor.fetchone()[0]
    return moment
