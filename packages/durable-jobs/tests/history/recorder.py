"""Records every change of a job's row, by triggers, and the begin and end of every body, in files.

Triggers see each statement once, whoever runs it, and write in its own transaction: what is rolled
back was never there, and the order for one job is the order of its locks. Bodies append lines of a
few bytes to a file for each process, which outlive a SIGKILL.
"""

# ruff: noqa: S608 - what is put together here are names of our own columns
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import UUID

JOBS, HISTORY = "durable_jobs_job", "job_history"
# Where the bodies of this test are written; workers inherit it.
BODIES = "TEST_JOB_BODIES"
KILLED = "x"
_BOTH = "state token attempts due_at dirty"
_ONCE = "max_attempts finished_at worker task key"
_TYPES = {
    "state": "text",
    "token": "bigint",
    "attempts": "int",
    "due_at": "timestamptz",
    "dirty": "boolean",
    "max_attempts": "int",
    "finished_at": "timestamptz",
    "worker": "text",
    "task": "text",
    "key": "text",
}


def statements() -> Iterator[str]:
    """Yield what makes the table and its triggers; all can be run again."""
    new, old = [*_BOTH.split(), *_ONCE.split()], _BOTH.split()
    columns = [f"{name} {_TYPES[name]}" for name in new]
    columns += [f"old_{name} {_TYPES[name]}" for name in old]
    yield f"""CREATE TABLE IF NOT EXISTS {HISTORY} (
        seq bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
        op text NOT NULL, job uuid, {", ".join(columns)})"""
    into = f"INSERT INTO {HISTORY} (op, job, {', '.join(new)}"
    olds = ", ".join(f"old_{name}" for name in old)
    after, before = (
        ", ".join(f"{row}.{name}" for name in names) for row, names in (("n", new), ("o", old))
    )
    bodies = {
        "insert": f"{into}) SELECT 'I', n.id, {after} FROM added n",
        "update": f"{into}, {olds}) SELECT 'U', n.id, {after}, {before}"
        " FROM added n JOIN removed o USING (id)",
        "delete": f"INSERT INTO {HISTORY} (op, job, {olds})"
        f" SELECT 'D', o.id, {before} FROM removed o",
        "truncate": f"INSERT INTO {HISTORY} (op) VALUES ('T')",
    }
    tables = {
        "insert": "REFERENCING NEW TABLE AS added",
        "update": "REFERENCING OLD TABLE AS removed NEW TABLE AS added",
        "delete": "REFERENCING OLD TABLE AS removed",
        "truncate": "",
    }
    for event, body in bodies.items():
        yield f"""CREATE OR REPLACE FUNCTION {HISTORY}_{event}() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN {body}; RETURN NULL; END $$"""
        yield f"""CREATE OR REPLACE TRIGGER {HISTORY}_{event} AFTER {event.upper()} ON {JOBS}
            {tables[event]} FOR EACH STATEMENT EXECUTE FUNCTION {HISTORY}_{event}()"""


def install(cursor: Any) -> None:
    """Record from now on."""
    for statement in statements():
        cursor.execute(statement)


def uninstall(cursor: Any) -> None:
    """Record no more; forget what was recorded."""
    for event in ("insert", "update", "delete", "truncate"):
        cursor.execute(f"DROP FUNCTION IF EXISTS {HISTORY}_{event}() CASCADE")
    cursor.execute(f"DROP TABLE IF EXISTS {HISTORY}")


@dataclass(frozen=True)
class Change:
    """One row of the history; `old` is what the row was, None for one that was inserted."""

    seq: int
    at: datetime
    op: str
    job: UUID | None
    new: dict[str, Any]
    old: dict[str, Any]


def changes(cursor: Any, after: int = 0) -> list[Change]:
    """Return what was recorded after that number, in order."""
    names = [*_BOTH.split(), *_ONCE.split()]
    olds = [f"old_{name}" for name in _BOTH.split()]
    cursor.execute(
        f"SELECT seq, at, op, job, {', '.join([*names, *olds])} FROM {HISTORY}"
        " WHERE seq > %s ORDER BY seq",
        [after],
    )
    found = []
    for seq, at, op, job, *values in cursor.fetchall():
        new = dict(zip(names, values, strict=False))
        old = dict(zip(_BOTH.split(), values[len(names) :], strict=True))
        found.append(Change(seq, at, op, job, new, old))
    return found


def last(cursor: Any) -> int:
    """Return the number of the newest change."""
    cursor.execute(f"SELECT coalesce(max(seq), 0) FROM {HISTORY}")
    return int(cursor.fetchone()[0])


def watched(task: Any) -> Callable[..., Any]:
    """Return the task's body, which writes down when it begins and when it ends."""
    body = task.run

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        mine, sign = task.job, KILLED
        note("+", mine, task.name)
        try:
            found = body(*args, **kwargs)
            sign = "-"
            return found
        except Exception:
            sign = "-"
            raise
        finally:
            note(sign, mine, task.name)

    return run


def note(sign: str, mine: Any, name: str) -> None:
    """Append a line to this process's file, in one write."""
    if folder := os.environ.get(BODIES):
        line = f"{time.time():.6f} {sign} {mine.id} {mine.token} {name}\n"
        with open(Path(folder, str(os.getpid())), "ab", buffering=0) as file:
            file.write(line.encode())


@dataclass
class Body:
    """A body that ran: when it began, and when it ended by itself or was told to; else it died."""

    job: UUID
    token: int
    task: str
    pid: int
    begin: float
    end: float | None = None
    killed: bool = False


def bodies(folder: Path) -> list[Body]:
    """Return all bodies that ran, in the order of their begin."""
    found: list[Body] = []
    for file in folder.iterdir():
        open_ones: dict[tuple[str, str], Body] = {}
        for line in file.read_text().splitlines():
            at, sign, job, token, task = line.split()
            if sign == "+":
                open_ones[job, token] = Body(UUID(job), int(token), task, int(file.name), float(at))
                found.append(open_ones[job, token])
            else:
                body = open_ones[job, token]
                if body.end is None:  # one that ends once more was a zombie's
                    body.end, body.killed = float(at), sign == KILLED
    return sorted(found, key=lambda body: body.begin)
