"""What a deploy asks of a release; `deploy/deploy` runs it inside the release, in its environment.

  python deploy/release.py tasks                  print its tasks and their parameters, as JSON
  python deploy/release.py check [GONE...]        can it run, and run what another release sends?
                                                  Reads the other's `tasks`; GONE: tasks and queues
                                                  to which nobody sends any more
  python deploy/release.py migrate                apply migrations; wait for no lock for long
  python deploy/release.py workers NAME SECONDS   wait until release NAME has a worker on each queue
  python deploy/release.py queues NAME SECONDS    wait until NAME has answered a probe of each queue

Exit code 1: no, and the lines printed say why. Else they say what is unusual.
"""

import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
KEYWORD = ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")
VARIABLE = ("VAR_POSITIONAL", "VAR_KEYWORD")
LOCK_SECONDS = 5
# Warnings of Django with which every page is an error, or sessions are open to guesses.
FATAL = ("security.W009", "security.W020")
# Variables that workers and web read by themselves, when they start; each has to be more than that.
NUMBERS: dict[str, tuple[type[int] | type[float], int]] = {
    "WORKER_GRACE_SECONDS": (float, 10),
    "WORKER_HANG_SECONDS": (float, 0),
    "WEB_CONCURRENCY": (int, 0),
    "GUNICORN_THREADS": (int, 0),
}


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
    from queue_probes.conf import queues

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

    useless = wrong_numbers()
    rest: list[str] = []
    for message in checks.run_checks(include_deployment_checks=True):
        if not message.is_silenced():
            line = f"settings, {message.id}: {message.msg}".partition(". ")[0]
            fatal = message.level >= checks.ERROR or message.id in FATAL
            (useless if fatal else rest).append(line)
    return useless, rest


def wrong_numbers() -> list[str]:
    """Return the variables that workers and web read by themselves, and could not start with."""
    found = []
    for name, (kind, least) in NUMBERS.items():
        if text := os.environ.get(name):
            with suppress(ValueError):
                if least < kind(text) < math.inf:
                    continue
            found.append(f"{name}: {text!r} is no {kind.__name__} above {least}")
    return found


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


def limit_locks(connection: Any, **_: Any) -> None:
    """Give up waiting for a lock soon: behind a statement that waits everybody else waits, too."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")


def doubts() -> list[str]:
    """Return what is not well, a line each; that keeps nobody from deploying what mends it."""
    from django.db import Error

    from durable_jobs import Job
    from queue_probes.conf import queues
    from queue_probes.diagnosis import verdicts

    try:
        found = [f"{v.queue}: {v.words}" for v in verdicts() if v.state != "ok"]
        lost = Job.objects.unfinished().exclude(queue__in=queues())
        names = sorted(set(lost.values_list("queue", flat=True)[:10_000]))
    except Error as error:  # a column that is yet to come, for one
        return [f"what the queues do cannot be read: {str(error).partition(chr(10))[0]}"]
    return found + [
        f"{name}: jobs wait on this queue, which this release does not have" for name in names
    ]


def without_worker(release: str, _since: datetime) -> tuple[list[str], list[str]]:
    """Return the queues that no living worker of the release serves; and []."""
    from django.db.models.functions import Now

    from queue_probes.conf import conf, queues
    from queue_probes.models import Node

    # Sooner than for others, whom a late report would alarm: what was killed leaves its row behind.
    living = Node.objects.filter(
        release=release, seen_at__gt=Now() - timedelta(seconds=1.5 * conf.NODE)
    )
    served = {queue for node in living for queue in node.queues}
    return [f"{queue}: no worker" for queue in queues() if queue not in served], []


def without_answer(release: str, since: datetime) -> tuple[list[str], list[str]]:
    """Return the queues that nothing shows to move, and those that move and are too busy.

    The proof is a probe that the release has answered since then. While one waits that beat has
    sent, it is proof as well that the release's workers, and no others, have started tasks since
    then, or that all of their processes run some.
    """
    from django.db.models.functions import Now

    from queue_probes.conf import conf, queues
    from queue_probes.diagnosis import full, judge
    from queue_probes.models import Node, Queue

    missing, busy = [], []
    rows = {row.name: row for row in Queue.objects.annotate(now=Now())}
    nodes = list(Node.objects.annotate(now=Now()))
    for name in queues():
        row = rows.get(name, Queue(name=name))
        if row.release == release and row.answered_at and row.answered_at > since:
            continue
        verdict = judge(name, rows.get(name), nodes)
        serving = [node for node in nodes if name in node.queues and node.seen_at > since]
        ours = [node for node in serving if node.release == release]
        # Which worker has moved a queue is not noted.
        moves = ours == serving and row.moved_at and row.moved_at > since
        sent = row.seen_at and row.seen_at > since and not row.failing_since
        waits = sent and (verdict.outstanding or 0) > conf.INTERVAL
        if waits and ours and (moves or all(map(full, ours))):
            busy.append(f"{name}: its workers start tasks, the probe waits behind them")
        elif verdict.state in ("ok", "busy", "backlogged"):
            missing.append(f"{name}: no probe answered yet; --patience SECONDS waits longer")
        else:
            missing.append(f"{name}: no probe answered: {verdict.words}")
    return missing, busy


def wait(
    look: Callable[[datetime], tuple[list[str], list[str]]], seconds: float
) -> tuple[list[str], list[str]]:
    """Look until nothing is missing, or for that many seconds; return what was seen last.

    `look` is told when this began, in the database's time, and returns first what is missing.
    """
    from django.db import Error, connection

    deadline = time.monotonic() + seconds
    since = None
    while True:
        try:
            since = since or now()
            missing, rest = look(since)
        except Error as error:  # a database that restarts meanwhile
            connection.close()
            missing, rest = [f"the database does not answer: {str(error).strip()}"], []
        if not missing or time.monotonic() >= deadline:
            return missing, rest
        time.sleep(0.2)


def now() -> datetime:
    """Return the database's time."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT CURRENT_TIMESTAMP")
        moment: datetime = cursor.fetchone()[0]
    return moment


def main(command: str, *arguments: str) -> int:
    """Run one of the commands; return the exit code."""
    import django

    sys.path.insert(0, str(PROJECT))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()
    import config.celery  # noqa: F401 - the application whose tasks are meant

    if command == "tasks":
        from queue_probes.conf import queues

        print(json.dumps({"tasks": tasks(), "queues": queues()}))
        return 0
    if command == "migrate":
        from django.core.management import call_command
        from django.db.backends.signals import connection_created

        connection_created.connect(limit_locks)
        call_command("migrate", interactive=False)
        return 0
    if command == "check":
        from rollout.migration_guard import migrations

        missing, rest = found_in_settings()
        missing += no_broker() + no_database()
        # Before the first deploy there are not even tables.
        if (other := json.load(sys.stdin)) and not missing:
            rest += [f"not well before the deploy: {line}" for line in doubts()]
            for name in sorted(set(arguments) - {*other["tasks"], *other["queues"]}):
                rest.append(f"--gone {name}: the release that runs has no such task or queue")
            missing = check(other, set(arguments)) + migrations()
    else:
        look = without_worker if command == "workers" else without_answer
        missing, rest = wait(partial(look, arguments[0]), float(arguments[1]))
    print("\n".join(missing or rest))
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
