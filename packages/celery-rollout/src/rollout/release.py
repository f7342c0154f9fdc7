"""What a deploy asks of a release: run inside the release, in its environment.

  python -m rollout.release tasks                print its tasks and their parameters, as JSON
  python -m rollout.release check [GONE...]      can it run, and run what another release sends?
                                                 Reads the other's `tasks`, or {}, or null: of no
                                                 matter; GONE: tasks and queues to which nobody
                                                 sends any more
  python -m rollout.release migrate              apply migrations; wait for no lock for long
  python -m rollout.release workers NAME SECONDS wait until NAME has a worker on each queue
  python -m rollout.release queues NAME SECONDS  wait until NAME has answered a probe of each queue

Exit code 1: no, and the lines printed say why. Else they say what is unusual.
The Celery app is `app` of `[tool.rollout]` in the release's pyproject.toml, else `config`.
"""

import io
import json
import math
import os
import re
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import django
from celery import current_app
from celery.app.utils import find_app
from django.core import checks
from django.core.management import CommandError, call_command
from django.db import Error, connection
from django.db.backends.signals import connection_created

from rollout import signs
from rollout.migration_guard import migrations
from rollout.tasks import check, queues, stranded, tasks

APP = "config"
LOCK_SECONDS = 5
# Warnings of Django with which every page is an error, or sessions are open to guesses.
FATAL = ("security.W009", "security.W020")
NO_MIGRATION = "a model has no migration: `manage.py makemigrations` makes it, commit it"
BREAKING = (
    "a migration breaks the release that runs; deploy/README.md says how to split it, and how to"
    " say that you have thought of it"
)
MAKE = "makemigrations --check --dry-run --noinput"
LINT = "lintmigrations --unapplied-migrations --quiet ok ignore"
# What the linter says of what is in order.
NOISE = re.compile(r"\*\*\*|(Valid|Erroneous|Ignored|Migrations with)\b|{")
# Variables that workers and web read by themselves, when they start; each has to be more than that.
NUMBERS: dict[str, tuple[type[int] | type[float], int]] = {
    "WORKER_GRACE_SECONDS": (float, 10),
    "WORKER_HANG_SECONDS": (float, 0),
    "WEB_CONCURRENCY": (int, 0),
    "GUNICORN_THREADS": (int, 0),
}


def found_in_settings() -> tuple[list[str], list[str]]:
    """Return what `manage.py check --deploy` finds: what makes the site useless, and the rest."""
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
    try:
        connection.ensure_connection()
    except Error as error:
        return [f"the database does not answer: {str(error).strip().splitlines()[-1]}"]
    return []


def no_broker() -> list[str]:
    """Return what is wrong with the broker, a line; [] when it answers."""
    try:
        with current_app.connection_for_write(connect_timeout=3) as broker:
            broker.ensure_connection(max_retries=1, timeout=3)
    except Exception as error:  # whatever its client raises
        return [f"the broker does not answer: {error!r}"]
    return []


def doubts() -> list[str]:
    """Return what is not well, a line each; that keeps nobody from deploying what mends it."""
    try:
        found, names = signs.unwell(), stranded()
    except Error as error:  # a column that is yet to come, for one
        return [f"what the queues do cannot be read: {str(error).partition(chr(10))[0]}"]
    return found + [
        f"{name}: jobs wait on this queue, which this release does not have" for name in names
    ]


def may_run(other: dict[str, Any] | None, gone: set[str]) -> tuple[list[str], list[str]]:
    """Return what keeps this release from running, beside the other one, and what is unusual.

    None: whatever else runs, as after a rollback, which has to be possible.
    """
    missing, rest = found_in_settings()
    missing += no_broker() + no_database()
    if missing or other is None:
        return missing, rest
    if other:  # before the first deploy there are not even tables
        rest += [f"not well before the deploy: {line}" for line in doubts()]
        for name in sorted(gone - {*other["tasks"], *other["queues"]}):
            rest.append(f"--gone {name}: the release that runs has no such task or queue")
        missing += check(other, gone)
        missing += migrations() or complaints(BREAKING, LINT)
    return missing + complaints(NO_MIGRATION, MAKE), rest


def complaints(why: str, command: str) -> list[str]:
    """Return `why` and what a command of manage.py prints when it fails; [] when it does not."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            call_command(*command.split())
    except (SystemExit, CommandError) as error:
        lines = [line for line in said.getvalue().splitlines() if line and not NOISE.match(line)]
        lines += [str(error)] if isinstance(error, CommandError) else []
        return [why, *lines] if getattr(error, "code", 1) else []
    return []


def migrate() -> None:
    """Apply the migrations; each waits for a lock for some seconds, whatever the settings say."""
    connection_created.connect(limit_locks)
    call_command("migrate", interactive=False)


def limit_locks(connection: Any, **_: Any) -> None:
    """Give up waiting for a lock soon: behind a statement that waits everybody else waits, too."""
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")


def set_up() -> None:
    """Load the Celery application, which names the settings, as `celery -A` does; then Django."""
    file = Path("pyproject.toml")
    found = tomllib.loads(file.read_text()) if file.exists() else {}
    find_app(found.get("tool", {}).get("rollout", {}).get("app", APP)).set_default()
    django.setup()


def main(command: str, *arguments: str) -> int:
    """Answer one question; return the exit code."""
    set_up()
    missing: list[str] = []
    rest: list[str] = []
    if command == "tasks":
        rest = [json.dumps({"tasks": tasks(), "queues": queues()})]
    elif command == "migrate":
        migrate()
    elif command == "check":
        missing, rest = may_run(json.load(sys.stdin), set(arguments))
    else:
        look = signs.without_worker if command == "workers" else signs.without_answer
        missing, rest = signs.wait(partial(look, arguments[0]), float(arguments[1]))
        if command == "queues" and signs.probed():
            rest.append(f"it has answered a probe of every {'other ' if rest else ''}queue")
    print("\n".join(missing or rest))
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
