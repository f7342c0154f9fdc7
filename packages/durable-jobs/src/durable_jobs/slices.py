"""From a hint to its jobs: claim them, run them through Celery's tracer, pass on what is held up.

A hint names jobs. As many as can be run in a moment are claimed in one statement and run one after
the other, each as a task of its own to Celery: signals, hooks and `self.request` are those of a
normal run. A hint whose jobs are taken or done costs one statement.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from celery.app.trace import trace_ok_t
from celery.utils.saferepr import saferepr
from django.db import Error, InterfaceError, OperationalError, ProgrammingError, connections

from durable_jobs import run, transitions
from durable_jobs.adopt import adopt, refuse, requeue
from durable_jobs.attempt import Attempt, running
from durable_jobs.conf import conf
from durable_jobs.exceptions import escapes
from durable_jobs.heartbeat import heartbeat
from durable_jobs.publisher import Hint, publisher

logger = logging.getLogger("durable_jobs.slices")
# How long after its last job a worker counts as busy, and how many jobs it may know ahead.
BUSY_SECONDS = 0.02
ALONG_KEPT = 1000
NOTHING = "nothing to do: the job is done, or somebody else has it"


class Recent(threading.local):
    """What this thread did a moment ago."""

    def __init__(self) -> None:
        self.ended = 0.0
        # Jobs claimed before their hints came, each hint of which may be dropped unread, once: a
        # job that has to run again after all is published again by the loop.
        self.along: OrderedDict[UUID, bool] = OrderedDict()

    def remember(self, runs: Iterable[Attempt]) -> None:
        for mine in runs:
            self.along[mine.id] = True
        while len(self.along) > ALONG_KEPT:
            self.along.popitem(last=False)

    def knows(self, job: UUID) -> bool:
        """Return whether the hint is of a job claimed along, and forget it."""
        return self.along.pop(job, False)


recent = Recent()
# By task, how long a run takes in this process: a moving average, by which slices are sized.
usual_seconds: dict[str, float] = {}


class Slice:
    """The jobs of one hint, claimed as many at a time as can be run in a moment."""

    def __init__(self, task: Any, tracer: Any, request: dict[str, Any], ids: list[str]) -> None:
        self.task = task
        self.tracer = tracer
        self.request = request
        self.queue = (request.get("delivery_info") or {}).get("routing_key") or ""
        self.unclaimed = deque(job for job in map(UUID, ids) if not recent.knows(job))
        self.claimed: deque[Attempt] = deque()
        self.several = False
        self.lock = threading.Lock()
        self.started = 0.0
        self.limits = tuple(request.get("timelimit") or ())
        # A limit is the message's, and meant for one job: none may run on another's time.
        self.until = time.monotonic() + min(filter(None, self._limits()), default=3600) / 4

    def _limits(self) -> list[float | None]:
        task, usual = self.task, self.task.app.conf
        hard = task.time_limit or usual.task_time_limit
        return [*self.limits, hard, task.soft_time_limit or usual.task_soft_time_limit]

    def work(self) -> Any:
        """Run them all; return what Celery's tracer said about the last, or nothing."""
        outcome = trace_ok_t(None, None, 0.0, NOTHING)
        self._share(len(self.unclaimed))
        try:
            while mine := self._next():
                mine.shared = self.several
                outcome = self._trace(mine)
        finally:
            heartbeat.unwatch(self)
            if self.claimed or self.unclaimed:  # the process is on its way out
                self._release()
            if self.several:
                heartbeat.flush()
            recent.ended = time.monotonic()
        return outcome

    def _share(self, jobs: int) -> None:
        """Let the heartbeat thread commit ends together, and take back what is held up."""
        if jobs > 1 and not self.several:
            self.several = True
            heartbeat.watch(self)

    def _next(self) -> Attempt | None:
        if self.several and time.monotonic() > self.until:
            self._release()
        with self.lock:
            self.started = time.monotonic()
            if self.claimed:
                return self.claimed.popleft()
        size = self._size()
        if size == 1 and self.task.name in usual_seconds:
            self._release(keep=1)
        while True:
            with self.lock:
                chunk = [self.unclaimed.popleft() for _ in range(min(size, len(self.unclaimed)))]
            if not chunk:
                return None
            runs = self._claim(chunk, size)
            with self.lock:
                self.claimed.extend(runs)
                self.started = time.monotonic()
                if self.claimed:
                    return self.claimed.popleft()

    def _claim(self, chunk: list[UUID], size: int) -> list[Attempt]:
        # Only a busy worker looks for more: the first job after a pause starts sooner without.
        busy = time.monotonic() - recent.ended < BUSY_SECONDS
        more = size - len(chunk)
        if not busy or not more or not self.queue or self.request.get("retries"):
            return claim(self.task, chunk, alone=len(chunk) == 1)
        runs = claim(self.task, chunk, along=more, queue=self.queue, limits=self.limits)
        recent.remember(mine for mine in runs if mine.id not in chunk)
        self._share(len(runs))
        return runs

    def _size(self) -> int:
        usual = usual_seconds.get(self.task.name)
        if usual is None or not self.task.slices:
            return 1
        fit = int(conf.SLICE_SECONDS / max(usual, 1e-5))
        return max(1, min(int(conf.SLICE_MAX), fit))

    def _trace(self, mine: Attempt) -> Any:
        begin = time.monotonic()
        try:
            with running(mine):
                outcome = self.tracer(mine.task_id, mine.args, mine.kwargs, self._request(mine))
                if not mine.entered:
                    run.not_entered(mine, outcome.retval)
                return outcome
        except BaseException as error:
            if not escapes(error):
                raise
            # Out of a hook or a receiver; Celery's main process or pool would not get over it.
            if mine.entered:
                logger.exception("durable_jobs: raised after the body of %s", mine)
            else:
                run.write(mine, run.meaning(mine, error))
            return trace_ok_t(None, None, 0.0, NOTHING)
        finally:
            if not mine.ending:
                heartbeat.drop(mine)
            took = time.monotonic() - begin
            before = usual_seconds.get(self.task.name, 0.0)
            # Slow at once, fast by and by: one long run is a reason to be careful.
            usual_seconds[self.task.name] = max(took, (3 * before + took) / 4)

    def _request(self, mine: Attempt) -> dict[str, Any]:
        options = mine.options
        job = mine.task_id
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

    def release_if_slow(self, patience: float) -> None:
        """Give the jobs not yet started to others, when the current one holds them up."""
        if time.monotonic() - self.started > patience:
            self._release()

    def _release(self, keep: int = 0) -> None:
        with self.lock:
            runs = list(self.claimed)
            self.claimed.clear()
            rest = list(self.unclaimed)[keep:]
            self.unclaimed = deque(list(self.unclaimed)[:keep])
        for mine in runs:
            heartbeat.drop(mine)
        info = self.request.get("delivery_info") or {}
        options = {"priority": info.get("priority"), "timelimit": self.request.get("timelimit")}
        options["via"] = self.task.via
        name = self.task.name
        publisher.send([Hint(job, name, self.queue, options, "[]", "{}") for job in rest])
        if runs:
            transitions.release(runs)


def claim(task: Any, ids: list[UUID], **how: Any) -> list[Attempt]:
    """Take those jobs that are free, and keep them alive from now on."""
    runs = transitions.claim(task, ids, **how)
    for other in connections.all(initialized_only=True):
        if other.alias != conf.DATABASE:
            other.close_if_unusable_or_obsolete()
    if runs:
        heartbeat.add(runs)
    return runs


def trace(
    task: Any, tracer: Any, task_id: str, args: Any, kwargs: Any, request: dict[str, Any]
) -> Any:
    """What the worker calls instead of Celery's tracer, which runs each job of the hint."""
    ids = request.pop("durable_jobs", None)
    if ids is None and any(request.get(name) for name in ("callbacks", "chain", "chord", "group")):
        return tracer(task_id, args, kwargs, request)  # part of a plain canvas: as plain as it came
    if ids is None:
        try:
            ids = [str(adopt(task, task_id, args, kwargs, request))]
        except (OperationalError, InterfaceError, ProgrammingError):
            # The database is away, or its table not migrated yet.
            logger.exception("durable_jobs: no row can be made of message %s yet", task_id)
            return requeue(task_id)
        except (Error, TypeError, ValueError) as error:  # it would come back for ever
            return refuse(task, task_id, args, kwargs, request, error)
    try:
        return Slice(task, tracer, request, ids).work()
    except Error:
        # The rows are safe, and the loop sends another hint. Not raised, because a thread of a
        # pool would keep the message, and its place in the worker, for ever.
        logger.exception("durable_jobs: jobs of hint %s could not be claimed", task_id)
        return trace_ok_t(None, None, 0.0, NOTHING)
