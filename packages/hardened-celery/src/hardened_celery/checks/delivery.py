"""Valid settings that together lose tasks, run them twice or forever, or let them wait."""

import os
from collections.abc import Iterator

from celery import Celery

from hardened_celery.checks.options import (
    REDIS,
    Messages,
    beat_entries,
    fault,
    owners,
    setting,
    spelled,
    transport,
)

REDIS_VISIBILITY_TIMEOUT = 3600  # kombu's default
RETRY_BACKOFF_MAX = 600  # Celery's default


def visibility(app: Celery) -> Messages:
    """No message is delivered again while its task still runs or waits."""
    if transport(app) not in REDIS:
        return
    options = app.conf.broker_transport_options
    timeout = options.get("visibility_timeout") or REDIS_VISIBILITY_TIMEOUT
    name = f"the visibility_timeout in {spelled(app, 'broker_transport_options')}"
    for owner in owners(app, "time_limit", "acks_late"):
        limit = (owner.values["time_limit"] or 0) + app.conf.worker_soft_shutdown_timeout
        if owner.values["acks_late"] and limit >= timeout:
            text = f"{owner.name('time_limit')} allows {limit:g} s, {name} is {timeout:g} s:"
            hint = f"Set {name} to {2 * limit + 300:g}, in all processes, or the limit lower."
            yield fault("E005", f"{text} a task runs a second time while it still runs.", hint)
    for place, countdown in countdowns(app):
        if countdown and countdown >= timeout:
            text = f"{place} is {countdown:g} s, {name} is {timeout:g} s: what waits is delivered"
            hint = "Make the delay less, or store when it is due and let beat look for it."
            yield fault("E006", f"{text} again before, and runs more than once.", hint)


def countdowns(app: Celery) -> Iterator[tuple[str, float | None]]:
    """Yield every place that delays tasks, and the seconds."""
    for owner in owners(app, "default_retry_delay"):
        yield owner.name("default_retry_delay"), owner.values["default_retry_delay"]
    for owner in owners(app, "retry_backoff", "retry_backoff_max"):
        if owner.values["retry_backoff"]:
            longest = owner.values["retry_backoff_max"] or RETRY_BACKOFF_MAX
            yield owner.name("retry_backoff_max"), longest
    for label, _entry, options in beat_entries(app):
        yield f"`countdown` of the {label}", options.get("countdown")


def endless(app: Celery) -> Messages:
    """A task that fails each time comes to an end."""
    for owner in owners(app, "retry_on_worker_lost", "max_retries"):
        if owner.values["retry_on_worker_lost"] and owner.values["max_retries"] is None:
            text = f"{owner.name('max_retries')} is None, and it is retried when its process dies:"
            hint = "Give it a number, or set retry_on_worker_lost and reject_on_worker_lost False."
            yield fault("E007", f"{text} a task that kills its process does so forever.", hint)
    for owner in owners(app, "acks_late", "acks_on_timeout"):
        if owner.values["acks_late"] and owner.values["acks_on_timeout"] is False:
            text = f"{owner.name('acks_on_timeout')} is False: a task that takes longer than its"
            hint = "Remove it, also as acks_on_failure_or_timeout; True is the default."
            yield fault("E009", f"{text} time limit is started again forever.", hint)


def lost(app: Celery) -> Messages:
    """A task survives the death of its process, and its process survives the task."""
    remapped = os.environ.get("REMAP_SIGTERM") == "SIGQUIT"
    for owner in owners(app, "acks_late", "reject_on_worker_lost", "retry_on_worker_lost"):
        late, reject, retry = owner.values.values()
        acks, retries = owner.name("acks_late"), owner.name("retry_on_worker_lost")
        hint = f"Set {retries} to True, and reject_on_worker_lost for when that cannot be sent."
        if not late and remapped:
            text = f"{acks} is {late}, and REMAP_SIGTERM is SIGQUIT: what runs when a worker stops"
            hint = f"Set {acks} to True, or remove REMAP_SIGTERM from the environment."
            yield fault("E008", f"{text} is lost.", hint)
        elif not late and not owner.task:
            text = f"{acks} is {late}: what runs when a worker is killed is lost."
            yield fault("W004", text, f"Set {acks} to True; tasks then may run twice.")
        elif late and not reject and not retry:
            text = f"{acks} is True, and yet a task is lost when its process is killed."
            yield fault("W005", text, hint)
        elif late and not retry:
            text = f"{owner.name('reject_on_worker_lost')} is True, and {retries} is not:"
            yield fault("W003", f"{text} a task that kills its process does so forever.", hint)


def waiting(app: Celery) -> Messages:
    """No task holds a process, or other tasks, forever."""
    if not app.conf.task_time_limit:
        text = f"{setting(app, 'task_time_limit')}: each task that hangs takes a process with it."
        yield fault("W006", text, "Set it, to 300 say; a task may have a time_limit of its own.")
    if app.conf.task_acks_late and app.conf.worker_prefetch_multiplier != 1:
        text = f"{setting(app, 'worker_prefetch_multiplier')}: tasks wait behind a long one,"
        yield fault("W009", f"{text} though other processes are idle.", "Set it to 1.")
