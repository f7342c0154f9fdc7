"""Can a release run what another one sends? It compares names, parameters and queues."""

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

from celery import current_app
from django.apps import apps

POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
KEYWORD = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
VARIABLE = ("VAR_POSITIONAL", "VAR_KEYWORD")


class Parameter(NamedTuple):
    """A parameter of a task: name, name of its `inspect` kind, and if a call may leave it out."""

    name: str
    kind: str
    optional: bool


def tasks() -> dict[str, list[Parameter]]:
    """Return the parameters of each task of this project, Celery's own left out."""
    current_app.loader.import_default_modules()
    return {
        name: [
            Parameter(p.name, p.kind.name, p.default is not p.empty or p.kind.name in VARIABLE)
            for p in inspect.signature(task.run).parameters.values()
        ]
        for name, task in sorted(current_app.tasks.items())
        if not name.startswith("celery.")
    }


def queues() -> list[str]:
    """Return the names of the queues of this release: those that are probed, else all declared."""
    if apps.is_installed("queue_probes"):
        from queue_probes.conf import queues as probed

        return probed()
    declared = current_app.conf.task_queues or [current_app.conf.task_default_queue]
    return sorted(getattr(queue, "name", queue) for queue in declared)


def unfinished(**how: Any) -> int:
    """Return how many durable jobs are not finished; 0 where there are no durable jobs."""
    if not apps.is_installed("durable_jobs"):
        return 0
    from durable_jobs import Job

    return Job.objects.unfinished().filter(**how).count()


def stranded() -> list[str]:
    """Return the queues on which durable jobs wait, and which this release does not have."""
    if not apps.is_installed("durable_jobs"):
        return []
    from durable_jobs import Job

    found = Job.objects.unfinished().exclude(queue__in=queues()).values_list("queue", flat=True)
    return sorted(set(found[:10_000]))


def refusals(old: Iterable[Parameter], new: Iterable[Parameter]) -> list[str]:
    """Say which calls that were right for parameters `old` are wrong for `new`: [] when none is."""
    old, new = [Parameter(*p) for p in old], [Parameter(*p) for p in new]
    kinds = {p.kind for p in new}
    names = {p.name for p in new if p.kind in KEYWORD}
    places = [p.name for p in new if p.kind in POSITIONAL]
    found = []
    for p in old:
        if p.kind in VARIABLE:
            if p.kind not in kinds:
                found.append(f"no longer takes `{'*' if p.kind == VARIABLE[0] else '**'}{p.name}`")
        elif p.kind in KEYWORD and p.name in places and p.name not in names:
            found.append(f"no longer takes `{p.name}` by its name")
        elif p.kind in KEYWORD and p.name not in names and "VAR_KEYWORD" not in kinds:
            found.append(f"no longer takes `{p.name}`")
    for place, p in enumerate(p for p in old if p.kind in POSITIONAL):
        if place >= len(places):
            found.append(f"no longer takes `{p.name}` by its place")
        elif places[place] != p.name:
            found.append(f"takes `{places[place]}` where it took `{p.name}`")
    if any(p.kind == "VAR_POSITIONAL" for p in old):
        count = sum(p.kind in POSITIONAL for p in old)
        found += [f"takes `{name}` out of what `*` took" for name in places[count:]]
    required = {p.name for p in old if not p.optional}
    found += [f"now wants `{p.name}`" for p in new if not p.optional and p.name not in required]
    return found


def check(other: dict[str, Any], gone: set[str]) -> list[str]:
    """Return what of another release, its `tasks` and `queues`, this one could not run."""
    ours, found = tasks(), []
    for queue in sorted(set(other.get("queues", ())) - set(queues())):
        if queue not in gone:
            found.append(
                f"the queue {queue} does not exist, and the release that runs may still send to it;"
                f" after a release that does not: --gone {queue}"
            )
        elif count := unfinished(queue=queue):
            found.append(f"the queue {queue} is gone, and {count} jobs on it are not finished")
    for name, parameters in other.get("tasks", {}).items():
        if name not in ours and name not in gone:
            found.append(
                f"{name} does not exist, and the release that runs may still send it; after a"
                f" release that does not: --gone {name}"
            )
        elif name in ours and (why := refusals(parameters, ours[name])):
            found += [f"{name} {words}" for words in why]
            found.append(f"{name}: give what takes other arguments another name, beside this one")
    for name in sorted(gone - ours.keys()):
        if count := unfinished(task=name):
            found.append(f"{name} is gone, and {count} of its jobs are not finished")
    return found
