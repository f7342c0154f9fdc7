"""Deploys under a steady load, on a server with systemd: was a job lost, or a request refused?

  python -m tests.deploys [--deploys 20] [--seed N] [--kinds KIND ...]

Prints a row for each deploy and one for the load. Every 20 ms or so a request comes in on a new
connection; every fourth wants a job of 0.05 to 20 s, now or in some seconds. What was wanted and
what took effect is counted in the database.
"""

import argparse
import http.client
import itertools
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from tests.conftest import TEMPLATE, cookiecutter, export
from tests.systemd_lab import Server, server

APP = "my_project"
HOME = f"/srv/{APP}"
# The words that a deploy prints at the end of its steps, in their order.
STEPS = (
    "built",
    "checked",
    "migrated",
    "started worker-control",
    "started worker-low",
    "its workers",
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
)
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
# uv, its downloads of this machine, and what it trusts
TOOLS = {
    "PATH": "/opt/uv:/usr/sbin:/usr/bin:/sbin:/bin",
    "UV_CACHE_DIR": "/opt/uv-cache",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
}
CODES = {"broken": 3, "refused": 1}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request(
                "POST" if wants else "GET", "/load/", body if wants else None, headers
            )
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


class Site:
    """A project, its source and its server; deploys of it, and what the database says."""

    def __init__(self, host: Server, source: Path, seed: int) -> None:
        self.host = host
        self.source = source
        self.random = random.Random(seed)
        self.port, self.database_port, broker_port = free_port(), free_port(), free_port()
        self.changes = 0
        self.began = time.time()
        password = secrets.token_hex(8)
        self.url = f"postgres://app:{password}@127.0.0.1:{self.database_port}/app"
        ports = map(str, (self.database_port, broker_port, self.port))
        host.run("/srv/source/load_app/server.sh", APP, *ports, password)
        self.commit("first")

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", "-C", self.source, *arguments], check=True, capture_output=True)

    def commit(self, kind: str) -> None:
        """Commit what makes a release of this kind out of the one before."""
        tasks, urls = self.source / "load_app/tasks.py", self.source / "load_app/urls.py"
        (self.source / "RELEASE.txt").write_text(secrets.token_hex(4))
        if kind in ("changed", "killed", "undone", "rolled back"):
            self.changes += 1
            text = tasks.read_text()
            tasks.write_text(text.replace(") -> None", f", more_{self.changes}: int = 0) -> None"))
        if kind in ("changed", "killed"):  # those that stay; the others could not be gone back from
            text = urls.read_text()
            urls.write_text(text.replace("= {", f'= {{"more_{self.changes}": 1, '))
        if kind == "broken":
            with tasks.open("a") as file:
                file.write('\nimport sys\nif "worker" in sys.argv: raise SystemExit("broken")\n')
        if kind == "refused":
            tasks.write_text(tasks.read_text().replace("def work(wanted: int", "def work(it: int"))
        self.git("add", "-A")
        self.git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", kind)

    def deploy(
        self, *arguments: str, kill_after: str = "", name: str = "deploy"
    ) -> tuple[int, str]:
        """Run the script; return exit code and output. `kill_after`: the line to kill it after."""
        variables = [f"{name}={value}" for name, value in TOOLS.items()]
        command = ["env", "-C", "/srv/source", *variables, f"deploy/{name}", *arguments]
        process = self.host.start(*command)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if kill_after and kill_after in line:
                self.kill()
                break
        lines += process.stdout.readlines()
        process.stdout.close()
        return process.wait(), "".join(lines)

    def kill(self) -> None:
        """SIGKILL to the script, and not to what it has begun."""
        found = self.host.run("pgrep", "-of", "^python3 .*/rollout.py").split()
        self.host.run("kill", "-KILL", *found)

    def count(self, query: str) -> Any:
        with psycopg.connect(self.url, autocommit=True) as connection:
            row = connection.execute(query).fetchone()
            return row and row[0]

    def missing(self) -> int:
        return int(self.count(LOST))


LOST = """SELECT count(*) FROM load_app_wanted w
  WHERE NOT EXISTS (SELECT 1 FROM load_app_effect e WHERE e.wanted = w.id)"""
LATE = """SELECT coalesce(max(extract(epoch FROM e.started - w.at) - w.countdown), 0)
  FROM load_app_wanted w JOIN load_app_effect e ON e.wanted = w.id"""
TWICE = "SELECT count(*) - count(DISTINCT wanted) FROM load_app_effect"


def one(site: Site, kind: str, step: str) -> dict[str, Any]:
    """Make a deploy of a kind; return its row. Raises AssertionError when it ends otherwise."""
    before = site.host.run("readlink", f"{HOME}/releases/current").strip()
    site.commit(kind)
    began = time.monotonic()
    note = ""
    if kind in ("killed", "undone"):
        code, output = site.deploy(kill_after=step)
        assert code in (-9, 137), f"it was not killed after {step!r}: {code}\n{output}"
        assert "done:" not in output
        note = f"after: {step}"
        name = "deploy" if kind == "killed" else "rollback"
        code, output = site.deploy(name=name)
    elif kind == "broken":
        code, output = site.deploy("--patience", "15")
    else:
        code, output = site.deploy()
    assert code == CODES.get(kind, 0), f"{kind}: exit code {code}\n{output}"
    if kind == "rolled back":
        code, output = site.deploy(name="rollback")
        assert code == 0, output
    after = site.host.run("readlink", f"{HOME}/releases/current").strip()
    stays = kind in ("same", "changed", "killed")
    assert (after != before) == stays, f"{kind}: {before} -> {after}\n{output}"
    runs = site.host.run("/srv/source/deploy/deploy", "status")
    assert [line.split()[0] for line in runs.splitlines() if "  runs " in line] == [after], runs
    if not stays:  # what was committed is not built upon
        site.git("reset", "-q", "--hard", "HEAD~1")
    seconds = round(time.monotonic() - began, 1)
    row = {"deploy": kind, "seconds": seconds, "code": code, "note": note}
    return row | {"output": output}


def audit(host: Server) -> dict[str, float]:
    """Return how exposed each running unit is, from 0 to 10; fail on a unit that is not valid."""
    listed = host.run("systemctl", "list-units", "--plain", "--no-legend", f"{APP}-*@*.service")
    units = [line.split()[0] for line in listed.splitlines()]
    assert host.run("systemd-analyze", "verify", *units) == ""
    words = [host.run("systemd-analyze", "security", "--no-pager", unit) for unit in units]
    levels = (word.rpartition("exposure level for ")[2].split()[1] for word in words)
    return dict(zip(units, map(float, levels), strict=True))


def run(folder: Path, deploys: int, seed: int, kinds: list[str] | None = None) -> dict[str, Any]:
    """Deploy that often under load; return {"deploys": rows, "load": figures, "units", "seed"}."""
    template = export(folder / "template")
    done = cookiecutter(template, folder)
    assert done.returncode == 0, done.stderr
    source = folder / APP
    shutil.copytree(TEMPLATE / "tests/load_app", source / "load_app")
    with (source / "config/settings.py").open("a") as file:
        file.write('\nINSTALLED_APPS += ["load_app"]\n')
    with (source / "config/urls.py").open("a") as file:
        file.write('\nurlpatterns.append(path("", include("load_app.urls")))\n')
    uv = shutil.which("uv") or str(TEMPLATE / ".tools/bin/uv")
    subprocess.run([uv, "lock", "--quiet", "--python", sys.executable], cwd=source, check=True)
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
    for command in (["init", "-q", "-b", "main"], ["add", "-A"]):
        subprocess.run(["git", "-C", source, *command], check=True)
    binds = (
        f"{source}:/srv/source",
        f"{Path(uv).parent}:/opt/uv:ro",
        f"{cache.stdout.strip()}:/opt/uv-cache",
    )
    with server(folder, *binds) as host:
        site = Site(host, source, seed)
        code, output = site.deploy()
        print(output)
        assert code == 0, output
        order = list(kinds or KINDS)
        plans = [order[i % len(order)] for i in range(deploys)]
        if not kinds:
            site.random.shuffle(plans)
        steps = itertools.cycle(STEPS if kinds else site.random.sample(STEPS, len(STEPS)))
        load = Load(site.port, random.Random(seed))
        try:
            rows = []
            for kind in plans:
                rows.append(one(site, kind, next(steps) if kind in ("killed", "undone") else ""))
                print(rows[-1].pop("output"), rows[-1], sep="\n", flush=True)
        finally:
            load.stop()
        deadline = time.monotonic() + 60
        while site.missing() and time.monotonic() < deadline:
            time.sleep(0.5)
        figures = {
            "requests": load.requests,
            "failed": len(load.failed),
            "slowest": round(load.slowest, 2),
            "wanted": load.wanted,
            "kept": site.count("SELECT count(*) FROM load_app_wanted"),
            "lost": site.missing(),
            "twice": site.count(TWICE),
            "latest": round(float(site.count(LATE)), 2),
        }
        print(load.failed[:20])
        units = audit(host)
    return {"deploys": rows, "load": figures, "units": units, "seed": seed}


def main() -> None:
    """Run, print the tables, and exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deploys", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--kinds", nargs="*", choices=sorted(set(KINDS)))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="deploys-"))
    found = run(folder, options.deploys, options.seed, options.kinds)
    console = Console(width=110)
    for title, rows in (
        ("deploys", found["deploys"]),
        (f"load, seed {options.seed}", [found["load"]]),
    ):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(str(cell) for cell in row.values()))
        console.print(table)
    figures = found["load"]
    sys.exit(bool(figures["failed"] or figures["lost"] or figures["twice"]))


if __name__ == "__main__":
    main()
