"""Run the test suites side by side, each in a pytest of its own: `python -m tests.run [--all]`.

An engine's suite runs in its folder, on a Django project of its own; the template's runs here. What
a suite prints is shown when it ends, whole where it failed, else its last lines. The very last line
counts all of them. Names of suites, and after `--` options of pytest, choose:
`durable-jobs -- -k x`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# Whole machines, containers and minutes of faults: `make test-all` runs them as well.
LONG = "faults or deploy or container"
# Most tests wait for a lease, a timer or a process; a third lane made two cores too busy for some.
LANES = 2
NOTHING_TO_RUN = 5
# What the durable jobs' tests say of the histories they have checked.
TRANSITIONS = re.compile(r"^(\d+) transitions of", re.MULTILINE)


@dataclass
class Suite:
    """A folder of tests, and how its pytest is started."""

    name: str
    folder: Path
    processes: int = 1
    marks: str = ""
    long: bool = False
    code: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    output: str = ""

    def run(self, every: bool, options: list[str]) -> "Suite":
        """Run it, long tests too if `every`; keep what it printed and what became of its tests."""
        marks = [self.marks] if self.marks else []
        marks += [] if every else [f"not ({LONG})"]
        options = [*(["-m", " and ".join(marks)] if marks else []), *options]
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch, "report.xml")
            spread = ["-n", str(self.processes), "--dist", "loadfile"] if self.processes > 1 else []
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *spread, *options],
                cwd=self.folder,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
            )
            self.counts = counted(report)
        self.code = 0 if done.returncode == NOTHING_TO_RUN else done.returncode
        self.output = done.stdout
        self.seconds = time.monotonic() - started
        return self

    def show(self) -> None:
        """Print what is worth reading."""
        lines = self.output.rstrip().splitlines()
        shown = lines if self.code else lines[-20:]
        print(f"\n=== {self.name}: {self.seconds:.0f} s", *shown, sep="\n", flush=True)


def counted(report: Path) -> dict[str, int]:
    """Return from pytest's report how many tests passed, failed and were skipped."""
    if not report.exists():
        return {"failed": 1}
    suites = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 - we wrote it
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in total:
            total[name] += int(suite.get(name, 0))
    failed = total["failures"] + total["errors"]
    return {
        "passed": total["tests"] - failed - total["skipped"],
        "failed": failed,
        "skipped": total["skipped"],
    }


def suites() -> list[Suite]:
    """Return all, those that take longest first."""
    packages = ROOT / "packages"
    return [
        # Two, as they share one Docker engine, and a machine of systemd's the other one.
        Suite("containers", ROOT, marks="(deploy or container) and not systemd", long=True),
        Suite("systemd", ROOT, marks="deploy and systemd", long=True),
        Suite("durable-jobs", packages / "durable-jobs", processes=2),
        Suite("template", ROOT, marks="not deploy and not container", processes=2),
        Suite("queue-probes", packages / "queue-probes", processes=2),
        Suite("hardened-celery", packages / "hardened-celery", processes=2),
        Suite("django-devstack", packages / "django-devstack", processes=2),
        Suite("celery-rollout", packages / "celery-rollout"),
    ]


def main() -> int:
    """Run what the command line names; return the exit code."""
    known = {suite.name: suite for suite in suites()}
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__)
    parser.add_argument("--all", action="store_true", help=f"also the tests marked {LONG}")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(known))
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    own, options = given[:end], given[end + 1 :]
    chosen = parser.parse_args(own)
    if wrong := [name for name in chosen.suites if name not in known]:
        parser.error(f"no suite {', '.join(wrong)}; there are: {', '.join(known)}")
    wanted = [known[name] for name in chosen.suites or known]
    if not chosen.all:
        wanted = [suite for suite in wanted if not suite.long]
    started = time.monotonic()
    with ThreadPoolExecutor(LANES) as lanes:
        running = [lanes.submit(suite.run, chosen.all, options) for suite in wanted]
        for ended in as_completed(running):
            ended.result().show()
    names = ("passed", "failed", "skipped")
    total = {name: sum(suite.counts.get(name, 0) for suite in wanted) for name in names}
    # a pytest that broke before it counted anything
    total["failed"] += sum(suite.code > 0 and not suite.counts.get("failed") for suite in wanted)
    checked = sum(int(n) for suite in wanted for n in TRANSITIONS.findall(suite.output))
    print(f"\n{time.monotonic() - started:.0f} s in all; {checked} transitions of jobs checked")
    print(", ".join(f"{number} {name}" for name, number in total.items()))
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
