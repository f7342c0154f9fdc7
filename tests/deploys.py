"""Deploys under a steady load: was a job lost, or a request refused?

  python -m tests.deploys [--compose] [--deploys 20] [--seed N] [--kinds KIND ...]

Prints a row for each deploy and one for the load. Every 20 ms or so a request comes in on a new
connection; every fourth wants a job of 0.05 to 20 s, now or in some seconds. What was wanted and
what took effect is counted in the database.
"""

import argparse
import http.client
import itertools
import random
import sys
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.sites import Site, compose_site, systemd_site

# The words that a deploy prints at the end of its steps, in their order.
STEPS = (
    "built",
    "checked",
    "migrated",
    "started worker-control",
    "its workers",
    "its workers+2",  # seconds later, in the middle of the next step
    "ended worker-",
    "started web",
    "its web",
    "ended web",
    "ended beat",
    "started beat",
    "it has answered",
)
KINDS = (
    "same",
    "changed",
    "changed",
    "killed",
    "killed",
    "undone",
    "broken",
    "rolled back",
    "refused",
    "drops a column",
    "drops a default",
)
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
STOPPED = ("killed", "undone")
# Why it was refused, or did not work.
REASONS = {
    "broken": "broken",
    "refused": "load_app.tasks.work no longer takes `wanted`",
    "drops a column": "DROPPING columns",
    "drops a default": "DROP DEFAULT",
}
CODES = {"broken": 3, "refused": 1, "drops a column": 1, "drops a default": 1}


@dataclass
class Load:
    """Requests and jobs, until it is stopped; what came of the requests."""

    port: int
    random: random.Random
    requests: int = 0
    wanted: int = 0
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.run) for _ in range(3)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def run(self) -> None:
        for number in itertools.count():
            if self.ended.wait(0.06):
                return
            self.request(wants=number % 4 == 0)

    def request(self, wants: bool) -> None:
        seconds = self.random.choices((0.05, 0.5, 5, 20), (378, 20, 1, 1))[0]
        countdown = self.random.choice((0, 0, 0, 3, 8))
        body = urllib.parse.urlencode({"seconds": seconds, "countdown": countdown})
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            if wants:
                connection.request("POST", "/load/", body, FORM)
            else:
                connection.request("GET", "/load/")
            answer = connection.getresponse()
            answer.read()
            error = "" if answer.status == 200 else f"status {answer.status}"
        except (OSError, http.client.HTTPException) as problem:
            error = repr(problem)
        finally:
            connection.close()
        with self.lock:
            self.requests += 1
            self.wanted += wants and not error
            self.slowest = max(self.slowest, time.monotonic() - began)
            if error:
                self.failed.append(f"{time.strftime('%H:%M:%S')} {error}")


LOST = """SELECT count(*) FROM load_app_wanted w
  WHERE NOT EXISTS (SELECT 1 FROM load_app_effect e WHERE e.wanted = w.id)"""
# Of short jobs; those on `low` may wait for a long one, without any deploy.
LATE = """SELECT coalesce(max(extract(epoch FROM e.started - w.at) - w.countdown), 0)
  FROM load_app_wanted w JOIN load_app_effect e ON e.wanted = w.id WHERE w.seconds < 2"""
LATEST = """SELECT to_char(w.at + w.countdown * interval '1 s', 'HH24:MI:SS.MS'),
  round(extract(epoch FROM e.started - w.at) - w.countdown::numeric, 1), w.countdown, w.seconds,
  e.release, j.id, j.token, j.attempts
  FROM load_app_wanted w JOIN load_app_effect e ON e.wanted = w.id
  LEFT JOIN durable_jobs_job j ON (j.args::jsonb ->> 0)::int = w.id AND j.task LIKE 'load_app%'
  ORDER BY 2 DESC LIMIT 20"""
LATEST_COLUMNS = "due, late, countdown, seconds, release, job, claims, attempts"
TWICE = "SELECT count(*) - count(DISTINCT wanted) FROM load_app_effect"


def one(site: Site, kind: str, step: str) -> dict[str, Any]:
    """Make a deploy of a kind; return its row. Raises AssertionError when it ends otherwise."""
    before = site.run("readlink", f"{site.home}/releases/current").strip()
    site.commit(kind)
    began = time.monotonic()
    code, output = site.deploy(*(["--patience", "15"] if kind == "broken" else []), kill_after=step)
    if kind in ("killed", "undone"):
        assert code in (-9, 137), f"it was not killed after {step!r}: {code}\n{output}"
        assert "done:" not in output
        code, again = site.deploy(name="deploy" if kind == "killed" else "rollback")
        output += f"-- killed --\n{again}"
    seconds = round(time.monotonic() - began, 1)
    assert code == CODES.get(kind, 0), f"{kind}: exit code {code}\n{output}"
    assert REASONS.get(kind, "") in output, output
    if kind == "rolled back":
        assert site.run("readlink", f"{site.home}/releases/current").strip() != before
        code, more = site.deploy(name="rollback")
        output += more
        assert code == 0, output
    after = site.run("readlink", f"{site.home}/releases/current").strip()
    stays = kind in ("same", "changed", "killed")
    assert (after != before) == stays, f"{kind}: {before} -> {after}\n{output}"
    assert (site.engine(after) == site.mark) == stays, f"{after} runs another engine"
    _, status = site.deploy("status")
    assert [line.split()[0] for line in status.splitlines() if "  runs " in line] == [after], status
    if not stays:  # what was committed is not built upon
        site.git("reset", "-q", "--hard", "HEAD~1")
    print(f"{kind} {step}, until {time.strftime('%H:%M:%S')}\n{output}", flush=True)
    return {"deploy": kind, "seconds": seconds, "code": code, "killed after": step}


def run(site: Site, deploys: int, kinds: list[str] | None = None) -> dict[str, Any]:
    """Deploy that often under load; return {"deploys": rows, "load": figures, "latest": jobs}.

    `kinds`: in this order again and again, killed at one step after the other; else by chance.
    """
    code, output = site.deploy()
    assert code == 0, output
    order = kinds or list(KINDS)
    plans = [order[number % len(order)] for number in range(deploys)]
    steps = list(STEPS)
    if not kinds:
        site.random.shuffle(plans)
        site.random.shuffle(steps)
    step = itertools.cycle(steps)
    load = Load(site.port, site.random)
    try:
        rows = [one(site, kind, next(step) if kind in STOPPED else "") for kind in plans]
        for _ in range(2):
            site.reload()
            time.sleep(3)  # of requests, while its processes are replaced
    finally:
        load.stop()
    deadline = time.monotonic() + 90
    while site.count(LOST) and time.monotonic() < deadline:
        time.sleep(0.5)
    latest = site.ask(LATEST)
    print(*load.failed[:20], LATEST_COLUMNS, latest, sep="\n")
    figures = {
        "requests": load.requests,
        "failed": len(load.failed),
        "slowest": round(load.slowest, 2),
        "wanted": load.wanted,
        "kept": int(site.count("SELECT count(*) FROM load_app_wanted")),
        "lost": int(site.count(LOST)),
        "twice": int(site.count(TWICE)),
        "latest": round(site.count(LATE), 2),
    }
    print(figures)
    return {"deploys": rows, "load": figures, "latest": latest}


def main() -> None:
    """Run, print the tables, and exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deploys", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--kinds", nargs="*", choices=sorted(set(KINDS)))
    parser.add_argument("--compose", action="store_true", help="containers instead of systemd")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="deploys-"))
    with (compose_site if options.compose else systemd_site)(folder, options.seed) as site:
        found = run(site, options.deploys, options.kinds)
        (folder / "log").write_text(site.log())
        print(f"log of all processes: {folder / 'log'}")
    console = Console(width=110)
    tables = {"deploys": found["deploys"], f"load, seed {options.seed}": [found["load"]]}
    for title, rows in tables.items():
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(str(cell) for cell in row.values()))
        console.print(table)
    figures = found["load"]
    sys.exit(bool(figures["failed"] or figures["lost"] or figures["twice"]))


if __name__ == "__main__":
    main()
