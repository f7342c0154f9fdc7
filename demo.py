"""`make demo`: bake a project, run its whole stack, kill the worker and empty the broker, count.

Prints one table: wanted, done, lost and doubled copies, counted in the database. Exits 0 only if
the faults took effect and nothing was lost or done twice.
"""

import http.cookiejar
import json
import os
import random
import re
import shutil
import signal
import socket
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
NOTES, COPIES, SECONDS_PER_COPY = 8, 5, 0.5
WANTED = NOTES * COPIES
START_DEADLINE, DRAIN_DEADLINE = 300, 240

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


TAKEN_OVER = "SELECT extract(epoch FROM min(started_at)) FROM durable_jobs_job"


class Counts:
    """What the database and the broker say."""

    def __init__(self, stack: dict[str, Any]) -> None:
        self.database = psycopg.connect(stack["database_url"], autocommit=True)
        self.broker = urllib.parse.urlsplit(stack["broker_url"])

    def ask(self, query: str) -> int:
        row = self.database.execute(query).fetchone()
        return int(row[0]) if row else 0

    def done(self) -> int:
        """Return how many of the wanted copies exist."""
        return self.ask("SELECT count(DISTINCT (note_id, number)) FROM notes_copy")

    def twice(self) -> int:
        return self.ask("SELECT count(*) FROM notes_copy") - self.done()

    def running(self) -> int:
        return self.ask("SELECT count(*) FROM durable_jobs_job WHERE state = 'running'")

    def hints(self) -> int:
        """Return how many messages about jobs the broker holds."""
        return int(self.tell("LLEN default")) + int(self.tell("HLEN unacked"))

    def tell(self, command: str) -> str:
        """Give the broker a command; return its answer, without the sign of its kind."""
        address = self.broker.hostname, self.broker.port
        with socket.create_connection(address, 10) as link, link.makefile("rw", newline="") as both:
            both.write(f"AUTH {self.broker.password}\r\n{command}\r\n")
            both.flush()
            if both.readline() != "+OK\r\n":
                raise DemoError("the broker refuses its password")
            return both.readline()[1:].strip()


def kill_worker(stack: dict[str, Any], counts: Counts) -> None:
    """SIGKILL the worker's main process with all its children, and flush the broker."""
    worker = psutil.Process(stack["processes"]["worker"])
    everything = [worker, *worker.children(recursive=True)]
    jobs, hints = counts.running(), counts.hints()
    for process in everything:
        process.kill()
    # the launcher above buries them
    _, left = psutil.wait_procs(everything, 10)
    counts.tell("FLUSHALL")
    if left or counts.hints() or not jobs or not hints:
        raise DemoError(f"the faults did not strike: {left=}, {jobs=}, {hints=}")
    pids = ", ".join(str(process.pid) for process in everything)
    console.print(f"[red]SIGKILL[/red] to the whole worker ({pids}), which ran {jobs} jobs")
    console.print(f"[red]FLUSHALL[/red] of the broker, which held {hints} messages")
    console.print("Now wait: leases end after 30 s, lost messages are sent again after 60 s.")


def show(stack: dict[str, Any], began: float, seed: int) -> bool:
    """Ask for copies, strike in the middle, and return whether all were made, and once."""
    counts, browser = Counts(stack), Browser(stack["web"])
    for number in range(NOTES):
        browser.write_note(f"Note {number} survives.", COPIES, SECONDS_PER_COPY)
    wait_for("the first copy", 60, counts.done)
    first = time.monotonic() - began
    console.print(f"First task done [b]{first:.1f} s[/b] after the first command (2 commands).")
    moment = random.Random(seed).randint(2, WANTED // 4)  # noqa: S311
    wait_for(f"copy {moment}", 60, lambda: counts.done() >= moment)
    kill_worker(stack, counts)
    struck = time.time()
    watch(counts)
    seconds = time.time() - struck
    done, twice = counts.done(), counts.twice()
    again = counts.ask("SELECT count(*) FROM durable_jobs_job WHERE attempts > 1")
    if not again:
        raise DemoError("no job was interrupted: nothing is shown")
    since = counts.ask(f"{TAKEN_OVER} WHERE attempts > 1") - struck
    console.print(f"The next worker took over the {again} interrupted jobs after {since:.0f} s.")
    print_table([WANTED, done, WANTED - done, twice, f"{seconds:.0f}", seed])
    return done == WANTED and not twice


def watch(counts: Counts) -> None:
    """Show the copies that exist until all do."""
    columns = TextColumn("copies"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("copies", total=WANTED)
        deadline = time.monotonic() + DRAIN_DEADLINE
        while (count := counts.done()) < WANTED and time.monotonic() < deadline:
            progress.update(bar, completed=count)
            time.sleep(0.2)
        progress.update(bar, completed=count)


def print_table(figures: list[object]) -> None:
    """Print what was wanted, done, lost and doubled, as counted in the database."""
    table = Table()
    for column in ("fault", "wanted", "done", "lost", "twice", "seconds", "seed"):
        table.add_column(column)
    table.add_row("SIGKILL and FLUSHALL", *map(str, figures))
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
