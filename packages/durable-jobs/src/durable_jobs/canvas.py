"""What a durable task is in a canvas: a call of its own, the last step of a chain, or a callback.

Everywhere else the rest of the canvas would live in a message, or the canvas would wait for a
result that no backend holds; so Celery's preparation of it raises `Unsupported`, in the caller.
A signature made by name (`app.signature("mail.send")`) knows nothing of this: it fails in the
worker that comes to it.
"""

from typing import Any

from celery.canvas import Signature

from durable_jobs.exceptions import Unsupported


@Signature.register_type("durable_jobs")
class JobSignature(Signature):
    """The signature of a durable task; `freeze` is where a canvas gives a step its place."""

    def __init__(self, task: Any = None, *args: Any, **options: Any) -> None:
        super().__init__(task, *args, **options)
        self.subtask_type = "durable_jobs"

    @classmethod
    def from_dict(cls, d: dict[str, Any], app: Any = None) -> "JobSignature":
        return cls(d, app=app)

    def freeze(self, _id: str | None = None, *given: Any, **place: Any) -> Any:
        """Take an id; a place before another step, in a group or in a chord header is refused."""
        # A chain names the root alone for every step but its last.
        if _id is None and set(place) == {"root_id"}:
            raise Unsupported(self.task, "a next step in a chain")
        if place.get("group_index") is not None or place.get("chord"):
            raise Unsupported(self.task, "a place in a group or chord header")
        # The body of a chord needs no group; what its group is for has been done by then.
        return super().freeze(_id, *given, **{**place, "group_id": None})

    _freeze = freeze

    def link_error(self, errback: Any) -> Any:
        if "task_id" in self.options:  # a chain hands its own to each step, after freezing it
            raise Unsupported(self.task, "link_error")
        return super().link_error(errback)
