"""`make demo`: bake a project, run its whole stack, kill a worker in the middle, count.

Prints one table: wanted, done and lost copies, counted in the database. Exits 0 only if the fault
took effect and nothing was lost.
"""

import http.cookiejar
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
from cookiecutter.main import cookiecutter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

TEMPLATE = Path(__file__).resolve().parent
BUILD = TEMPLATE / "build" / "demo"
PROJECT = BUILD / "my_project"
COPIES, SECONDS_PER_COPY = 40, 0.5
START_DEADLINE, DRAIN_DEADLINE = 300, 180

console = Console(highlight=False)


class DemoError(Exception):
    """The demo could not show what it is meant to show; the message says why."""


def wait_for(what: str, seconds: float, look: Callable[[], Any]) -> Any:
    """Return the first true value of `look`, asked five times a second; raise DemoError if late."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := look():
            return value
        time.sleep(0.2)
    raise DemoError(f"{what} did not happen within {seconds:.0f} s")


def bake() -> None:
    """Generate the project with the default answers, over what an earlier demo left."""
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    cookiecutter(str(TEMPLATE), no_input=True, output_dir=str(BUILD))


@contextmanager
def running_stack() -> Iterator[dict[str, Any]]:
    """Run `make up` in the project; yield what `.dev/stack.json` says once the stack is ready."""
    state, log = PROJECT / ".dev" / "stack.json", BUILD / "up.log"
    environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    with log.open("wb") as output:
        up = subprocess.Popen(
            ["make", "up"],
            cwd=PROJECT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for("`make up`", START_DEADLINE, lambda: state.exists() or up.poll() is not None)
            if up.poll() is not None:
                raise DemoError(f"`make up` ended early:\n{log.read_text()[-3000:]}")
            yield json.loads(state.read_text())
        finally:
            # what Ctrl-C does: make and the stack both get it, and the stack stops in order
            if up.poll() is None:
                os.killpg(up.pid, signal.SIGINT)
            up.wait(120)


# The demo shows the stack on its own services, whatever this shell is set up for.
NOT_INHERITED = {"DATABASE_URL", "CELERY_BROKER_URL", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"}


class Browser:
    """What a person's browser does: keeps cookies, sends the form with its token."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") + "/"
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)

    def write_note(self, text: str, copies: int, seconds_per_copy: float) -> None:
        page = self.opener.open(self.url, timeout=30).read().decode()
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)
        if token is None:
            raise DemoError(f"{self.url} shows no form")
        form = {
            "csrfmiddlewaretoken": token.group(1),
            "text": text,
            "copies_wanted": copies,
            "seconds_per_copy": seconds_per_copy,
        }
        self.opener.open(self.url, urllib.parse.urlencode(form).encode(), timeout=30)


def pool_children(pid: int) -> list[int]:
    """Return the pids of the processes below `pid` that have no children: those that run tasks."""
    # one listing: a process may end between two questions about it
    parents = {p.info["pid"]: p.info["ppid"] for p in psutil.process_iter(["pid", "ppid"])}
    below = {pid}
    while found := {child for child, parent in parents.items() if parent in below} - below:
        below |= found
    return sorted(below - {pid} - set(parents.values()))


def kill_one(stack: dict[str, Any], chance: random.Random) -> int:
    """SIGKILL one pool process of the worker; return its pid once it is gone."""
    victim = chance.choice(pool_children(stack["processes"]["worker"]))
    os.kill(victim, signal.SIGKILL)
    wait_for(
        f"the end of process {victim}",
        10,
        lambda: victim not in pool_children(stack["processes"]["worker"]),
    )
    return victim


def show(stack: dict[str, Any], began: float, seed: int) -> bool:
    """Enqueue copies, kill a worker process in the middle, and return whether none was lost."""
    database = psycopg.connect(stack["database_url"], autocommit=True)

    def made() -> int:
        row = database.execute("SELECT count(*) FROM notes_copy").fetchone()
        return row[0] if row else 0

    Browser(stack["web"]).write_note("Copies of me survive a kill.", COPIES, SECONDS_PER_COPY)
    wait_for("the first copy", 60, made)
    first = time.monotonic() - began
    console.print(f"First task done [b]{first:.1f} s[/b] after the first command (2 commands).")
    victim, count = 0, 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("copies", total=COPIES)
        deadline = time.monotonic() + DRAIN_DEADLINE
        while (count := made()) < COPIES and time.monotonic() < deadline:
            progress.update(bar, completed=count)
            if not victim and count >= COPIES // 4:
                victim = kill_one(stack, random.Random(seed))  # noqa: S311
                progress.print(f"[red]SIGKILL[/red] to worker process {victim}, in the middle")
            time.sleep(0.2)
        progress.update(bar, completed=count)
    if not victim:
        raise DemoError("the copies were done before a process could be killed: nothing is shown")
    print_table(count, victim, seed)
    return count == COPIES


def print_table(done: int, victim: int, seed: int) -> None:
    """Print what was wanted, done and lost, as counted in the database."""
    table = Table()
    for column in ("fault", "wanted", "done", "lost", "seed"):
        table.add_column(column)
    fault = f"SIGKILL of pool process {victim}"
    table.add_row(fault, str(COPIES), str(done), str(COPIES - done), str(seed))
    console.print(table)


def main() -> int:
    """Run the demo; return the exit code."""
    seed = int(os.environ.get("DEMO_SEED", random.randrange(1_000_000)))  # noqa: S311
    console.print("Baking a project with the default answers, then `make up` in it …")
    began = time.monotonic()
    try:
        bake()
        with running_stack() as stack:
            console.print(f"Up: {stack['web']} on its own PostgreSQL and broker.")
            kept = show(stack, began, seed)
    except DemoError as error:
        console.print(f"[red]The demo failed:[/red] {error}")
        return 1
    console.print(f"Everything is stopped. Next:\n\n    cd {PROJECT.relative_to(TEMPLATE)}")
    console.print("    make up      # and kill what you like\n    make test\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
