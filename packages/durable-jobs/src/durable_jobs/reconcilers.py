"""Desired state: a job for every object that is not as it should be, however that came about.

    @reconciler(lambda: Note.objects.filter(indexed=False), resync=timedelta(hours=1))
    @shared_task
    def index_note(pk): ...

Each pass inserts a job for each object of the queryset that has none. A signal that was skipped, a
row changed by SQL or a restored backup is found within a tick. When an object's job is dead or was
cancelled, the object rests for `resync` and is tried again: retries give up, the system does not.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.contrib.contenttypes.models import ContentType
from django.db.models import CharField, Exists, Model, OuterRef, Q, QuerySet, Value
from django.db.models.functions import Cast, Concat

from durable_jobs.conf import conf
from durable_jobs.database import LockedError, ago, brief_locks
from durable_jobs.models import Job

logger = logging.getLogger("durable_jobs.reconcilers")
BATCH = 1000
# A key in somebody's open transaction is waited for so long, all those of a reconciler so long.
LOCK_SECONDS = 0.1
LOCKS_SECONDS = 1.0
_registered: dict[str, "Reconciler"] = {}


@dataclass(frozen=True)
class Reconciler:
    """A task and the objects it has yet to bring in order."""

    task: Any
    unconverged: Callable[[], QuerySet[Any]]
    resync: timedelta

    def key(self, pk: object) -> str:
        return f"{self.task.name}:{pk}"

    def pending(self) -> QuerySet[Any]:
        """Return the objects that need a job and have none."""
        queryset = self.unconverged()
        pk = Cast(OuterRef("pk"), CharField())
        live = Job.objects.filter(
            task=self.task.name,
            key=Concat(Value(f"{self.task.name}:"), pk, output_field=CharField()),
            due_at__isnull=False,
        )
        owner_type = ContentType.objects.get_for_model(queryset.model)
        # A task that succeeds and changes nothing comes again each tick, not in a hot loop.
        rests = Job.objects.filter(
            Q(state__in=[Job.State.DEAD, Job.State.CANCELLED])
            & Q(finished_at__gt=ago(self.resync.total_seconds()))
            | Q(finished_at__gt=ago(conf.TICK)),
            task=self.task.name,
            owner_type=owner_type,
            owner_id=pk,
        )
        return queryset.filter(~Exists(live), ~Exists(rests))

    def run(self) -> int:
        """Insert the jobs; return how many."""
        total, before = 0, object()
        while pks := list(self.pending().values_list("pk", flat=True)[:BATCH]):
            if pks[0] == before:  # eager mode: the tasks have run, and no rows were written
                break
            before = pks[0]
            inserted = self._insert(pks, time.monotonic() + LOCKS_SECONDS)
            total += inserted
            if inserted < len(pks):
                text = "durable_jobs: %s jobs of %s wait for the next pass: their keys are locked"
                logger.warning(text, len(pks) - inserted, self.task.name)
            if inserted < BATCH:
                break
        return total

    def _insert(self, pks: list[Any], until: float) -> int:
        """Insert jobs, but those whose keys an open transaction holds; return how many."""
        model = self.unconverged().model
        try:
            with brief_locks(LOCK_SECONDS):
                self.task.enqueue_many(
                    [[pk] for pk in pks],
                    key=lambda item: self.key(item[0]),
                    owner=lambda item: model(pk=item[0]),
                )
            return len(pks)
        except LockedError:
            if len(pks) == 1:
                return 0
        # In halves, of which most will do; in any order, so that none is behind the locked ones.
        random.shuffle(pks)
        half = len(pks) // 2
        return sum(
            self._insert(part, until)
            for part in (pks[:half], pks[half:])
            if time.monotonic() < until
        )


def reconciler(
    unconverged: Callable[[], QuerySet[Any]], *, resync: timedelta = timedelta(hours=1)
) -> Callable[[Any], Any]:
    """Register the task for the objects of `unconverged`; it is called with a primary key."""

    def register(task: Any) -> Any:
        _registered[task.name] = Reconciler(task, unconverged, resync)
        return task

    return register


def run_all() -> int:
    """Run every reconciler; one that fails is logged and does not hold up the others."""
    inserted = 0
    for name, each in list(_registered.items()):
        try:
            inserted += each.run()
        except Exception:
            logger.exception("durable_jobs: reconciler of %s failed", name)
    return inserted


def enqueue_for(task: Any, owner: Model) -> Any:
    """Enqueue the reconciler's task for one object now, without waiting for the next pass."""
    return task.apply_async([owner.pk], key=_registered[task.name].key(owner.pk), owner=owner)
