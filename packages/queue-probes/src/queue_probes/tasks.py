"""The probe as a task: plain Celery, since what it proves is that messages arrive."""

import os
from typing import Any

from celery import shared_task

from queue_probes.probe import ProbeTask, arrived

RELEASE = os.environ.get("RELEASE", "")


@shared_task(
    base=ProbeTask,
    bind=True,
    name="queue_probes.probe",
    ignore_result=True,
    acks_late=False,
    time_limit=30,
    soft_time_limit=20,
)
def probe(self: Any, queue: str = "", asked: str = "") -> None:
    """Note the arrival of a probe; called without arguments, by beat, it sends them."""
    arrived(queue, asked, self.request.hostname or "", RELEASE)
