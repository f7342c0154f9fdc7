"""Every setting with its default: `DURABLE_JOBS = {"LEASE": 30, ...}` in Django's settings.

Spans are seconds. A name that is not in the table is a system check error, so a typo cannot be
ignored in silence.
"""

from typing import Any

from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver

DEFAULTS: dict[str, Any] = {
    # How long a run may be silent before it counts as lost, and how often a live one is renewed.
    "LEASE": 30.0,
    "HEARTBEAT": 10.0,
    # How often the loop passes; its queue must not be one that a backlog can fill.
    "TICK": 5.0,
    "CONTROL_QUEUE": "control",
    # A job still queued after REPUBLISH gets a new wake-up hint, then at doubled intervals.
    "REPUBLISH": 60.0,
    "REPUBLISH_MAX": 900.0,
    # 1 means: no second attempt unless the task asks for it.
    "MAX_ATTEMPTS": 8,
    "BACKOFF_MIN": 10.0,
    "BACKOFF_MAX": 3600.0,
    # A child takes as many short jobs at once as it can run in SLICE_SECONDS, at most SLICE_MAX.
    "SLICE_MAX": 100,
    "SLICE_SECONDS": 0.1,
    "RETENTION": 7 * 86400.0,
    "RETENTION_DEAD": 90 * 86400.0,
    "ARGS_MAX_BYTES": 64 * 1024,
    "ERROR_MAX_CHARS": 8000,
    # The publisher thread: how many hints it holds, and how long it may delay the end of a process.
    "PUBLISH_BACKLOG": 100_000,
    "PUBLISH_FLUSH": 2.0,
    "DATABASE": "default",
}


class Conf:
    """`conf.LEASE` reads the setting, or its default, and remembers it."""

    def __getattr__(self, name: str) -> Any:
        if name not in DEFAULTS:
            raise AttributeError(name)
        value = getattr(settings, "DURABLE_JOBS", {}).get(name, DEFAULTS[name])
        vars(self)[name] = value
        return value


conf = Conf()


@receiver(setting_changed, weak=False)
def _forget(setting: str, **_: Any) -> None:
    if setting == "DURABLE_JOBS":
        vars(conf).clear()
