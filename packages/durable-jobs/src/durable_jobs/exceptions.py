"""What a task may raise to say how its job ends, and what it meets when it lost the job."""

from typing import Any


class Permanent(Exception):  # noqa: N818
    """Raised in a task: no attempt will ever succeed, the job is dead now."""


class LeaseLost(Exception):  # noqa: N818
    """The job was cancelled, deleted or given to another worker; this run writes nothing more."""


class NotYet(Exception):  # noqa: N818
    """It is too early for this job, or this worker: it comes back in `pause` seconds."""

    def __init__(self, pause: float, why: str) -> None:
        super().__init__(why)
        self.pause = pause


class JobDead(Exception):  # noqa: N818
    """Raised by `.get()` of a dead job: its error text."""


class Unsupported(NotImplementedError):  # noqa: N818
    """A Celery feature that would lose its meaning, or the job, when the task is durable."""

    def __init__(self, task: str, feature: Any) -> None:
        super().__init__(
            f"{task} is a durable job and does not take {feature}: what is left of a canvas is "
            "lost with its message. Enqueue the next step inside the task (atomic=True commits "
            "both together), many calls with enqueue_many, and let a @reconciler find what is "
            "ready; a task that must be in a canvas opts out: @shared_task(base=celery.Task)."
        )
