"""Where the time of a job goes: marks on its way, and profiles of the worker's processes.

BENCH_MARKS=1 switches the marks on, BENCH_PROFILE=FOLDER the profiles. Both cost time themselves:
the figures of the table are measured without.
"""

import atexit
import cProfile
import importlib
import os
from pathlib import Path

from body import tell
from celery import signals
from celery.concurrency.base import BasePool

# Functions of durable_jobs on the way; one that is gone in a later version is left out.
OURS = (
    ("durable_jobs.publisher", "publisher.publish", "publisher woke", "hint published"),
    ("durable_jobs.slices", "trace", "pool process has it", None),
    ("durable_jobs.slices", "claim", "claim begins", "claimed"),
)


def switch_on(*, durable: bool) -> None:
    """Patch this process and those it forks, as the environment says."""
    if os.environ.get("BENCH_MARKS"):
        _mark(BasePool, "apply_async", "main process passes it on", "handed to the pool")
        signals.task_received.connect(_on_received, weak=False)
        signals.task_prerun.connect(_on_prerun, weak=False)
        for module, path, before, after in OURS if durable else ():
            *parents, name = path.split(".")
            owner = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            if hasattr(owner, name):
                _mark(owner, name, before, after)
    if folder := os.environ.get("BENCH_PROFILE"):
        signals.worker_init.connect(lambda **_: _profile(folder, "main"), weak=False)
        signals.worker_process_init.connect(lambda **_: _profile(folder, "child"), weak=False)
        signals.worker_process_shutdown.connect(lambda **_: _dump(), weak=False)
        atexit.register(_dump)


def _mark(owner, name, before, after):
    real = getattr(owner, name)

    def marked(*args, **kwargs):
        tell(before)
        try:
            return real(*args, **kwargs)
        finally:
            if after:
                tell(after)

    setattr(owner, name, marked)


def _on_received(**_):
    tell("main process has it")


def _on_prerun(**_):
    tell("prerun")


_running: list[tuple[cProfile.Profile, Path]] = []


def _profile(folder, role):
    if _running:  # the parent's, in a forked child
        _running.pop()[0].disable()
    profile = cProfile.Profile()
    _running.append((profile, Path(folder) / f"{role}-{os.getpid()}"))
    profile.enable()


def _dump():
    if _running:
        profile, path = _running.pop()
        profile.disable()
        profile.dump_stats(path)
