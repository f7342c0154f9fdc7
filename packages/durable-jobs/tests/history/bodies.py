"""Import it in a worker: its children write down when bodies begin and end."""

from typing import Any

from celery import current_app, signals

from tests.history.recorder import watched


@signals.worker_process_init.connect(weak=False)
def watch_bodies(**_: Any) -> None:
    """Have a child's tasks write down when their bodies begin and end."""
    for task in current_app.tasks.values():
        if getattr(task, "durable", False):
            task.run = watched(task)
