"""From a hint to its jobs: claim them, run them through Celery's tracer, pass on what is held up.

A hint names jobs. As many as can be run in a moment are claimed in one statement and run one after
the other, each as a task of its own to Celery: signals, hooks and `self.request` are those of a
normal run. A hint whose jobs are taken or done costs one statement.
"""

import threading
import time
from collections import deque
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid5

from celery.app.trace import trace_ok_t
from celery.utils.saferepr import saferepr
from django.db import connections
from kombu.utils.json import dumps

from durable_jobs import dialect, identity, statements
from durable_jobs.conf import conf
from durable_jobs.dialect import Hint
from durable_jobs.enqueue import Call
from durable_jobs.heartbeat import heartbeat
from durable_jobs.publisher import publisher
from durable_jobs.run import Run, give_back, running

NOTHING = "nothing to do: the job is done, or somebody else has it"


class Slice:
    """The jobs of one hint, claimed as many at a time as can be run in a moment."""

    def __init__(self, task: Any, tracer: Any, request: dict[str, Any], ids: list[str]) -> None:
        self.task = task
        self.tracer = tracer
        self.request = request
        self.unclaimed = deque(UUID(job) for job in ids)
        self.claimed: deque[Run] = deque()
        self.lock = threading.Lock()
        self.started = 0.0

    def work(self) -> Any:
        """Run them all; return what Celery's tracer said about the last, or nothing."""
        outcome = trace_ok_t(None, None, 0.0, NOTHING)
        several = len(self.unclaimed) > 1
        if several:
            heartbeat.watch(self)
        try:
            while mine := self._next():
                mine.shared = several
                outcome = self._trace(mine)
        finally:
            heartbeat.unwatch(self)
            if self.claimed or self.unclaimed:  # the process is on its way out
                self._surrender()
            if several:
                heartbeat.flush()
        return outcome

    def _next(self) -> Run | None:
        with self.lock:
            self.started = time.monotonic()
            if self.claimed:
                return self.claimed.popleft()
        size = self._size()
        if size == 1 and self.task.seconds is not None:
            self._surrender(keep=1)
        while True:
            with self.lock:
                chunk = [self.unclaimed.popleft() for _ in range(min(size, len(self.unclaimed)))]
            if not chunk:
                return None
            runs = claim(self.task, chunk)
            with self.lock:
                self.claimed.extend(runs)
                self.started = time.monotonic()
                if self.claimed:
                    return self.claimed.popleft()

    def _size(self) -> int:
        if self.task.seconds is None or not self.task.slices:
            return 1
        fit = int(conf.SLICE_SECONDS / max(self.task.seconds, 1e-5))
        return max(1, min(int(conf.SLICE_MAX), fit))

    def _trace(self, mine: Run) -> Any:
        begin = time.monotonic()
        try:
            with running(mine):
                return self.tracer(str(mine.id), mine.args, mine.kwargs, self._request(mine))
        finally:
            if not mine.shared or mine.lost or mine not in heartbeat.finished:
                heartbeat.drop(mine)
            took = time.monotonic() - begin
            before = self.task.seconds
            # Slow at once, fast by and by: one long run is a reason to be careful.
            type(self.task).seconds = (
                took if before is None or took > before else (3 * before + took) / 4
            )

    def _request(self, mine: Run) -> dict[str, Any]:
        options = mine.options
        job = str(mine.id)
        return {
            **self.request,
            "id": job,
            "root_id": options.get("root_id") or job,
            "parent_id": options.get("parent_id"),
            "correlation_id": job,
            "retries": mine.attempts - 1,
            "args": mine.args,
            "kwargs": mine.kwargs,
            "argsrepr": saferepr(tuple(mine.args)),
            "kwargsrepr": saferepr(mine.kwargs),
            "ignore_result": True,
            **options.get("headers", {}),
        }

    def surrender_if_slow(self, patience: float) -> None:
        """Give the jobs not yet started to others, when the current one holds them up."""
        if time.monotonic() - self.started > patience:
            self._surrender()

    def _surrender(self, keep: int = 0) -> None:
        with self.lock:
            runs = list(self.claimed)
            self.claimed.clear()
            rest = list(self.unclaimed)[keep:]
            self.unclaimed = deque(list(self.unclaimed)[:keep])
        if runs:
            for mine in runs:
                heartbeat.drop(mine)
            give_back(runs)
        info = self.request.get("delivery_info") or {}
        options = {
            "priority": info.get("priority"),
            "timelimit": self.request.get("timelimit"),
            "via": self.task.via,
        }
        queue = info.get("routing_key") or ""
        publisher.send([Hint(job, self.task.name, queue, options, "[]", "{}") for job in rest])


def claim(task: Any, ids: list[UUID]) -> list[Run]:
    """Take those jobs that are free, in one statement, and keep them alive from now on."""
    # Celery closes a connection only now and then (CELERY_DB_REUSE_MAX); this one may be stale.
    connections[conf.DATABASE].close_if_unusable_or_obsolete()
    found = dialect.run(
        statements.CLAIM,
        ids=ids,
        task=task.name,
        alone=len(ids) == 1,
        worker=identity.child(),
    )
    runs = [
        Run(
            task,
            dialect.uuid(job),
            token,
            attempts,
            max_attempts,
            args,
            kwargs,
            options,
        )
        for job, token, args, kwargs, options, attempts, max_attempts, *_ in found
    ]
    if runs:
        heartbeat.add(runs)
    return sorted(runs, key=lambda run: run.id)


def trace(
    task: Any,
    tracer: Any,
    task_id: str,
    args: Any,
    kwargs: Any,
    request: dict[str, Any],
) -> Any:
    """What the worker calls instead of Celery's tracer, which runs each job of the hint."""
    ids = request.pop("durable_jobs", None)
    if ids is None and any(request.get(name) for name in ("callbacks", "chain", "chord", "group")):
        return tracer(task_id, args, kwargs, request)  # part of a plain canvas: as plain as it came
    if ids is None:
        ids = [str(_adopt(task, task_id, args, kwargs, request))]
    return Slice(task, tracer, request, ids).work()


def _adopt(task: Any, task_id: str, args: Any, kwargs: Any, request: dict[str, Any]) -> UUID:
    """Make a row of a message that has none: sent by name, or before the task became durable."""
    try:
        job = UUID(task_id)
    except ValueError:
        job = uuid5(NAMESPACE_OID, task_id)
    queue = (request.get("delivery_info") or {}).get("routing_key") or ""
    Call(task.name, task.max_attempts, job, dumps(args), dumps(kwargs), queue=queue).insert(
        adopt=True
    )
    return job
