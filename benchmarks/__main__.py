"""`make bench`: what durability costs, as ratios to plain Celery in one run on one machine.

make bench                                   everything but `kill`, 5 rounds (half an hour)
make bench ARGS="enqueue drain"              only these
make bench ARGS="--quick enqueue"            small and rough, in less than a minute
make bench ARGS="kill"                       SIGKILL of a worker with the default lease (slow)
make bench ARGS="stages profile"             where the time of a job goes
make bench ARGS="reconcile --rows 10000000"  ten million rows
make bench ARGS="plans --rows 10000000"      how each statement finds its rows in them
"""

import argparse
import os
import platform
import signal
import sys
import time
from typing import Any

import psutil
from rich.console import Console

from benchmarks import lab as laboratory
from benchmarks.lab import ARMS, BenchError
from benchmarks.measures import MEASURES
from benchmarks.report import Line, show
from benchmarks.where import WHERE

QUICK = {"rounds": 2, "outage_rounds": 1, "jobs": 300, "calls": 60, "samples": 10, "rows": [10_000]}


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", help=f"any of: {', '.join([*MEASURES, *WHERE])}")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    parser.add_argument("--outage-rounds", type=int, default=3, help="of `outage` (3)")
    parser.add_argument("--jobs", type=int, default=10_000, help="in bulk and drain (10000)")
    parser.add_argument("--calls", type=int, default=400, help="of enqueue, per round (400)")
    parser.add_argument("--samples", type=int, default=40, help="of start, per round (40)")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--kills", type=int, default=1, help="of `kill` (1)")
    parser.add_argument("--no-peers", action="store_true", help="ours and plain Celery alone")
    parser.add_argument("--quick", action="store_true", help="small and rough")
    options = parser.parse_args()
    if unknown := set(options.what) - {*MEASURES, *WHERE}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    options.what = options.what or [name for name in MEASURES if name != "kill"]
    if options.quick:
        vars(options).update(QUICK)
    return options


def measure(options: argparse.Namespace, console: Console, lines: list[Line]) -> None:
    """Bake, start the services, and measure; add to the lines of the table."""
    arms = [arm for arm in ARMS.values() if not (arm.peer_apps and options.no_peers)]
    with laboratory.alone():
        console.print("Baking and installing …")
        laboratory.bake(peers=not options.no_peers)
        began = time.monotonic()
        with laboratory.running(arms) as lab:
            for name in options.what:
                took, busy = time.monotonic() - began, psutil.cpu_percent(interval=1)
                console.print(f"{took:5.0f} s: {name} … (others use {busy:.0f} % of the machine)")
                if name in WHERE:
                    WHERE[name](lab, options, console)
                else:
                    lines += MEASURES[name](lab, options)


def interrupted(number: int, _frame: Any) -> None:
    """End as after an error, so that everything started is stopped."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Measure and print; return the exit code: 0, whatever the figures say."""
    options = arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    lines: list[Line] = []
    code = 0
    try:
        measure(options, console, lines)
    except BenchError as error:
        console.print(f"[red]The benchmark failed:[/red] {error}")
        code = 1
    except KeyboardInterrupt:
        console.print("Interrupted.")
        code = 130
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    title = f"Ratios to plain Celery: median of {options.rounds} rounds (lowest-highest); {machine}"
    if lines:
        show(console, title, sorted(lines, key=lambda line: line.what))
    return code


if __name__ == "__main__":
    sys.exit(main())
