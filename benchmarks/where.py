"""Where the time goes: the way of one job in microseconds, and profiles of a drain.

These are for whoever makes it faster; they print tables of their own and fill none of the ratios.
"""

import pstats
import shutil
import statistics
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import lab as laboratory
from benchmarks.lab import ARMS, BUILD, Lab
from benchmarks.measures import DRAIN_DEADLINE, LATENCY_BUDGET

TRACED = ("ours", "plain")
TOP = 14


def stages(lab: Lab, options: Namespace, console: Console) -> None:
    """Print when a job passes each mark between the call and the body, on an idle system."""
    for name in TRACED:
        arm = ARMS[name]
        driver = lab.driver(arm, BENCH_MARKS="1")
        with lab.workers(arm, BENCH_MARKS="1"):
            driver("latency", samples=10, budget=60)
            samples = driver("latency", samples=5 * options.samples, budget=10 * LATENCY_BUDGET)
        laboratory.stop([driver.process])
        console.print(_way(name, samples))
    limits = lab[ARMS["ours"]]("limits", samples=options.samples)
    table = Table(title="the machine's own limits", title_justify="left")
    table.add_column("one round trip")
    table.add_column("microseconds", justify="right")
    for step, seconds in limits.items():
        table.add_row(step, f"{1e6 * statistics.median(seconds):.0f}")
    console.print(table)


def _way(name: str, samples: list[dict[str, float]]) -> Table:
    """Return the medians of the marks in their order, with the step from the one before."""
    marks = {mark for sample in samples for mark in sample}
    times = {
        mark: statistics.median(sample[mark] for sample in samples if mark in sample)
        for mark in marks
    }
    table = Table(title=f"{name}: microseconds since the call (medians)", title_justify="left")
    for column in ("mark", "at", "step"):
        table.add_column(column, justify="left" if column == "mark" else "right")
    before = 0.0
    for mark, at in sorted(times.items(), key=lambda item: item[1]):
        table.add_row(mark, f"{1e6 * at:.0f}", f"{1e6 * (at - before):.0f}")
        before = at
    return table


def profile(lab: Lab, options: Namespace, console: Console) -> None:
    """Print processor time by process and the costliest functions while a backlog is drained."""
    folder = BUILD / "profile"
    for name in TRACED:
        arm = ARMS[name]
        for traced in (False, True):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            lab.clear(arm)
            driver = lab.driver(arm)
            driver("fill", count=options.jobs)
            more = {"BENCH_PROFILE": str(folder)} if traced else {}
            with lab.workers(arm, **more) as (worker,):
                seconds = driver("watch", count=options.jobs, deadline=DRAIN_DEADLINE)
                threads = _threads(worker.pid)
            laboratory.stop([driver.process])
            if not traced:
                console.print(f"{name}: {1e6 * seconds / options.jobs:.0f} us per job; CPU seconds")
                for line in threads:
                    console.print(f"  {line}")
        for role in ("main", "child"):
            console.print(_top(f"{name}, {role}", sorted(folder.glob(f"{role}-*")), options.jobs))


def _threads(pid: int) -> list[str]:
    """Return the processor time of each thread of a worker; start-up is in that of the main one."""
    import psutil

    top = psutil.Process(pid)
    lines = []
    for process in (top, *top.children(recursive=True)):
        role = "main process" if process.pid == pid else "child"
        for thread in process.threads():
            name = Path(f"/proc/{process.pid}/task/{thread.id}/comm")
            word = name.read_text().strip() if name.exists() else str(thread.id)
            lines.append(
                f"{role} {process.pid}, {word}: {thread.user_time + thread.system_time:.2f}"
            )
    return lines


def _top(title: str, paths: list[Path], jobs: int) -> Table:
    table = Table(title=f"{title}: us per job in the function itself", title_justify="left")
    for column in ("self", "with callees", "calls per job", "function"):
        table.add_column(column, justify="left" if column == "function" else "right")
    if not paths:
        return table
    stats = pstats.Stats(*map(str, paths))
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:TOP]  # type: ignore[attr-defined]
    for (path, line, function), (_, calls, own, total, _callers) in rows:
        where = (
            f"{Path(path).parent.name}/{Path(path).name}:{line} {function}" if line else function
        )
        table.add_row(
            f"{1e6 * own / jobs:.0f}", f"{1e6 * total / jobs:.0f}", f"{calls / jobs:.2f}", where
        )
    return table


def plans(lab: Lab, options: Namespace, console: Console) -> None:
    """Print how each statement of the protocol finds its rows in the largest table asked for."""
    rows = max(options.rows)
    title = f"each statement beside {rows} rows, {rows // 10} of them unfinished"
    table = Table(title=title, title_justify="left")
    for column in ("verb", "ms", "pages", "most rows", "indexes"):
        table.add_column(column, justify="left" if column in ("verb", "indexes") else "right")
    for plan in lab[ARMS["ours"]]("statement_plans", rows=rows, unfinished=rows // 10):
        how = "THE WHOLE TABLE" if plan["whole"] else ", ".join(plan["indexes"])
        figures = (f"{plan['ms']:.2f}", f"{plan['pages']}", f"{plan['rows']:.0f}")
        table.add_row(plan["verb"], *figures, how)
    console.print(table)
    lab[ARMS["ours"]]("clear")


WHERE = {"stages": stages, "profile": profile, "plans": plans}
