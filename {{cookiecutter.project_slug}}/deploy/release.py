"""What a deploy asks of a release; `deploy/deploy` runs it inside the release, in its environment.

  python deploy/release.py tasks                  print its tasks and their parameters, as JSON
  python deploy/release.py check [GONE...]        can it run what another release sends? Reads the
                                                  other's `tasks`; GONE: tasks nobody sends any more
  python deploy/release.py migrate                apply migrations; wait for no lock for long
  python deploy/release.py workers NAME SECONDS   wait until release NAME has a worker on each queue
  python deploy/release.py queues NAME SECONDS    wait until NAME has answered a probe of each queue

Exit code 1: no, and the lines printed say why.
"""

import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
KEYWORD = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
VARIABLE = ("VAR_POSITIONAL", "VAR_KEYWORD")
LOCK_SECONDS = 5


class Parameter(NamedTuple):
    """A parameter of a task: name, name of its `inspect` kind, and if a call may leave it out."""

    name: str
    kind: str
    optional: bool


def tasks() -> dict[str, list[Parameter]]:
    """Return the parameters of each task of this project, Celery's own left out."""
    from celery import current_app

    current_app.loader.import_default_modules()
    return {
        name: [
            Parameter(p.name, p.kind.name, p.default is not p.empty or p.kind.name in VARIABLE)
            for p in inspect.signature(task.run).parameters.values()
        ]
        for name, task in sorted(current_app.tasks.items())
        if not name.startswith("celery.")
    }


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
    from durable_jobs import Job
    from probes.conf import queues

    ours, found = tasks(), []
    for queue in sorted(set(other.get("queues", ())) - set(queues())):
        if count := Job.objects.unfinished().filter(queue=queue).count():
            found.append(f"the queue {queue} is gone, and {count} jobs on it are not finished")
    for name, parameters in other.get("tasks", {}).items():
        if name not in ours and name not in gone:
            found.append(f"{name} does not exist; the release that runs may still send it")
        elif name in ours:
            found += [f"{name} {why}" for why in refusals(parameters, ours[name])]
    for name in sorted(gone - ours.keys()):
        if count := Job.objects.unfinished().filter(task=name).count():
            found.append(f"{name} is gone, and {count} of its jobs are not finished")
    return found


def no_broker() -> list[str]:
    """Return what is wrong with the broker, a line; [] when it answers."""
    from celery import current_app

    try:
        with current_app.connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
    except Exception as error:  # whatever its client raises
        return [f"the broker does not answer: {error!r}"]
    return []


def migrations() -> list[str]:
    """Return what of the migrations to come breaks the release that runs, a line each.

    That is what the linter of `manage.py lintmigrations` does not look at; and indexes that a
    migration has left behind unfinished, so that it cannot be repeated.
    """
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor
    from django_migration_linter import IgnoreMigration

    found = []
    executor = MigrationExecutor(connection)
    for migration, _ in executor.migration_plan(executor.loader.graph.leaf_nodes()):
        if any(isinstance(operation, IgnoreMigration) for operation in migration.operations):
            continue
        sql = "\n".join(executor.loader.collect_sql([(migration, False)]))
        added = set(re.findall(r'ADD COLUMN ("\w+")', sql))
        dropped = set(re.findall(r'ALTER COLUMN ("\w+") DROP DEFAULT', sql)) - added
        found += [f"{migration}: DROP DEFAULT of {column}" for column in sorted(dropped)]
        if re.search("ALTER TABLE .* ADD CONSTRAINT .* CHECK", sql):
            found.append(f"{migration}: ADD CONSTRAINT CHECK, which what runs may not keep to")
    with connection.cursor() as cursor:
        cursor.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
        names = [name for (name,) in cursor.fetchall()]
    return found + [f"an index was not finished: DROP INDEX CONCURRENTLY {name}" for name in names]


def limit_locks(connection: Any, **_: Any) -> None:
    """Give up waiting for a lock soon: behind a statement that waits everybody else waits, too."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")


def doubts() -> list[str]:
    """Return what is not well, a line each; that keeps nobody from deploying what mends it."""
    from probes.diagnosis import verdicts

    return [f"{v.queue}: {v.words}" for v in verdicts() if not v.fine]


def without_worker(release: str) -> list[str]:
    """Return the queues that no living worker of the release serves."""
    from django.db.models.functions import Now

    from probes.conf import conf, queues
    from probes.models import Node

    living = Node.objects.filter(
        release=release, seen_at__gt=Now() - timedelta(seconds=conf.NODE_TTL)
    )
    served = {queue for node in living for queue in node.queues}
    return [f"{queue}: no worker" for queue in queues() if queue not in served]


def without_answer(release: str) -> Callable[[], list[str]]:
    """Return a function that returns the queues whose newest probe, since now, others answered."""
    from django.db import connection

    from probes.conf import queues
    from probes.models import Queue

    with connection.cursor() as cursor:
        cursor.execute("SELECT CURRENT_TIMESTAMP")
        (since,) = cursor.fetchone()

    def look() -> list[str]:
        answered = set(
            Queue.objects.filter(release=release, answered_at__gt=since).values_list(
                "name", flat=True
            )
        )
        return [f"{name}: no probe answered" for name in queues() if name not in answered]

    return look


def wait(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Look until nothing is missing; return what is still missing after that many seconds."""
    deadline = time.monotonic() + seconds
    while (missing := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return missing


def main(command: str, *arguments: str) -> int:
    """Run one of the commands; return the exit code."""
    import django

    sys.path.insert(0, str(PROJECT))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()
    import config.celery  # noqa: F401 - the application whose tasks are meant

    if command == "tasks":
        from probes.conf import queues

        print(json.dumps({"tasks": tasks(), "queues": queues()}))
        return 0
    if command == "migrate":
        from django.core.management import call_command
        from django.db.backends.signals import connection_created

        connection_created.connect(limit_locks)
        call_command("migrate", interactive=False)
        return 0
    if command == "check":
        missing = no_broker()
        if other := json.load(sys.stdin):  # before the first deploy there are not even tables
            for line in doubts():
                print(f"not well before the deploy: {line}")
            missing += check(other, set(arguments)) + migrations()
    elif command == "workers":
        missing = wait(lambda: without_worker(arguments[0]), float(arguments[1]))
    else:
        missing = wait(without_answer(arguments[0]), float(arguments[1]))
    print("\n".join(missing))
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
