"""What a deploy asks of a release; `deploy/deploy` runs it inside the release, in its environment.

  python deploy/release.py tasks                  print its tasks and their parameters, as JSON
  python deploy/release.py check [GONE...]        can it run, and run what another release sends?
                                                  Reads the other's `tasks`; GONE: tasks and queues
                                                  to which nobody sends any more
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
# Warnings of Django with which every page is an error, or sessions are open to guesses.
FATAL = ("security.W009", "security.W020")
# What rewrites a table when a column is added to it, and holds everybody up for so long.
REWRITES = (
    r"GENERATED ALWAYS AS .* STORED|DEFAULT [^,;]*(random|uuid|clock_timestamp|nextval)[^,;]*\("
)


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
        if queue not in gone:
            found.append(
                f"the queue {queue} does not exist, and the release that runs may still send to it;"
                f" after a release that does not: --gone {queue}"
            )
        elif count := Job.objects.unfinished().filter(queue=queue).count():
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
        if count := Job.objects.unfinished().filter(task=name).count():
            found.append(f"{name} is gone, and {count} of its jobs are not finished")
    return found


def found_in_settings() -> tuple[list[str], list[str]]:
    """Return what `manage.py check --deploy` finds: what makes the site useless, and the rest."""
    from django.core import checks

    useless: list[str] = []
    rest: list[str] = []
    for message in checks.run_checks(include_deployment_checks=True):
        if not message.is_silenced():
            line = f"settings, {message.id}: {message.msg}".partition(". ")[0]
            fatal = message.level >= checks.ERROR or message.id in FATAL
            (useless if fatal else rest).append(line)
    return useless, rest


def no_database() -> list[str]:
    """Return what is wrong with the database, a line; [] when it answers."""
    from django.db import Error, connection

    try:
        connection.ensure_connection()
    except Error as error:
        return [f"the database does not answer: {str(error).strip().splitlines()[-1]}"]
    return []


def no_broker() -> list[str]:
    """Return what is wrong with the broker, a line; [] when it answers."""
    from celery import current_app

    try:
        with current_app.connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
    except Exception as error:  # whatever its client raises
        return [f"the broker does not answer: {error!r}"]
    return []


def breaking(sql: str, created: set[str]) -> list[str]:
    """Say what of a migration breaks what runs; the tables it makes are added to `created`."""
    created.update(re.findall(r'CREATE TABLE ("[^"]+")', sql))
    column = r'ALTER TABLE ("[^"]+") (?:ALTER|ADD) COLUMN ("[^"]+")'
    added = set(re.findall(column.replace("ALTER|", ""), sql))
    dropped = set(re.findall(f"{column} DROP DEFAULT", sql)) - added
    found = [(table, f"DROP DEFAULT of {name} of {table}") for table, name in sorted(dropped)]
    found += [
        (table, f"the value of {name} rewrites all of {table}, which nobody can use meanwhile")
        for table, name, *_ in re.findall(f"{column} .*(?:{REWRITES})", sql, re.IGNORECASE)
    ]
    found += [
        (table, f"ADD CONSTRAINT CHECK on {table}, which what runs may not keep to")
        for table in re.findall(r'ALTER TABLE ("[^"]+") .*ADD CONSTRAINT .* CHECK', sql)
    ]
    return [why for table, why in found if table not in created]


def migrations() -> list[str]:
    """Return what of the migrations to come breaks the release that runs, a line each.

    That is what the linter of `manage.py lintmigrations` does not look at; and indexes that a
    migration has left behind unfinished, so that it cannot be repeated.
    """
    from django.conf import settings
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor
    from django_migration_linter import IgnoreMigration

    found = []
    created: set[str] = set()
    left_out = getattr(settings, "MIGRATION_LINTER_OPTIONS", {}).get("exclude_apps", ())
    executor = MigrationExecutor(connection)
    for migration, _ in executor.migration_plan(executor.loader.graph.leaf_nodes()):
        if migration.app_label in left_out:
            continue
        if any(isinstance(operation, IgnoreMigration) for operation in migration.operations):
            continue
        sql = "\n".join(executor.loader.collect_sql([(migration, False)]))
        found += [f"{migration}: {why}" for why in breaking(sql, created)]
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
    from durable_jobs import Job
    from probes.conf import queues
    from probes.diagnosis import verdicts

    found = [f"{v.queue}: {v.words}" for v in verdicts() if not v.fine]
    lost = Job.objects.unfinished().exclude(queue__in=queues())
    for queue in sorted(set(lost.values_list("queue", flat=True)[:10_000])):
        found.append(f"{queue}: jobs wait on this queue, which this release does not have")
    return found


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

    since: list[Any] = []

    def look() -> list[str]:
        if not since:
            with connection.cursor() as cursor:
                cursor.execute("SELECT CURRENT_TIMESTAMP")
                since.extend(cursor.fetchone())
        answered = set(
            Queue.objects.filter(release=release, answered_at__gt=since[0]).values_list(
                "name", flat=True
            )
        )
        return [f"{name}: no probe answered" for name in queues() if name not in answered]

    return look


def wait(look: Callable[[], list[str]], seconds: float) -> list[str]:
    """Look until nothing is missing; return what is still missing after that many seconds."""
    from django.db import Error, connection

    deadline = time.monotonic() + seconds
    while True:
        try:
            missing = look()
        except Error as error:  # a database that restarts meanwhile
            connection.close()
            missing = [f"the database does not answer: {str(error).strip()}"]
        if not missing or time.monotonic() >= deadline:
            return missing
        time.sleep(0.2)


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
        missing, rest = found_in_settings()
        missing += no_broker() + no_database()
        # Before the first deploy there are not even tables.
        if (other := json.load(sys.stdin)) and not missing:
            rest += [f"not well before the deploy: {line}" for line in doubts()]
            for name in sorted(set(arguments) - {*other["tasks"], *other["queues"]}):
                rest.append(f"--gone {name}: the release that runs has no such task or queue")
            missing = check(other, set(arguments)) + migrations()
        if not missing:
            print("\n".join(rest))
    elif command == "workers":
        missing = wait(lambda: without_worker(arguments[0]), float(arguments[1]))
    else:
        missing = wait(without_answer(arguments[0]), float(arguments[1]))
    print("\n".join(missing))
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
