"""What is measured. Each function returns the lines of the table that it fills.

Rounds are interleaved: in each round every arm is measured once, in rotating order, and a ratio is
made of two figures of one round, so that a slow minute of the machine spoils no ratio.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psycopg

from benchmarks import lab as laboratory
from benchmarks.lab import ARMS, Arm, BenchError, Lab, Talker
from benchmarks.report import Line, number, ratios

DRAIN_DEADLINE = 900
LATENCY_BUDGET = 6.0  # seconds per arm and round: the relay of the outbox sleeps for one at a time


def rounds(lab: Lab, count: int) -> Iterator[list[Arm]]:
    """Yield the arms in an order of its own for each round."""
    for turn in range(count):
        yield lab.arms[turn % len(lab.arms) :] + lab.arms[: turn % len(lab.arms)]


def enqueue(lab: Lab, options: Namespace) -> list[Line]:
    """Enqueue one job in a transaction with a domain row."""
    found = []
    for arm in lab.arms:
        lab[arm]("enqueue", calls=max(20, options.calls // 5))
    for arms in rounds(lab, options.rounds):
        seconds = {}
        for arm in arms:
            lab.clear(arm)
            seconds[arm.name] = statistics.median(lab[arm]("enqueue", calls=options.calls))
        found.append(seconds)
    line = Line("1 enqueue one job with a domain row, p50", 0.9)
    line.found = ratios(found, higher=False)
    line.notes.append(_absolute("us", 1e6, found))
    for arm in lab.arms:
        before = _counters(lab, arm, lab[arm])
        lab[arm]("enqueue", calls=100)
        after = _counters(lab, arm, lab[arm])
        line.notes.append(
            _cost(arm.name, {name: (after[name] - before[name]) / 100 for name in after})
        )
    return [line]


def outage(lab: Lab, options: Namespace) -> list[Line]:
    """The same while the broker refuses connections, and while it hangs."""
    lines = []
    for word, begin, end in (("refuses", "kill", "start"), ("hangs", "freeze", "thaw")):
        p50 = Line(f"2 enqueue while the broker {word}, p50", 0.9)
        slowest = Line(f"2 slowest call while the broker {word}", 50, unit="ms")
        for arms in rounds(lab, options.outage_rounds):
            for arm in arms:
                healthy, away = _away(lab, arm, begin, end, options.calls)
                seconds = away["seconds"]
                _add(p50, arm.name, statistics.median(seconds) / healthy)
                _add(slowest, arm.name, 1e3 * max(seconds))
                if arm.name == "plain":
                    p50.base = f"{away['raised']} of {len(seconds)} raise"
                    slowest.base = number(1e3 * max(seconds))
                elif away["raised"]:
                    raise BenchError(f"{away['raised']} calls of {arm.name} raised")
        lines += [p50, slowest]
    return lines


def _away(lab: Lab, arm: Arm, begin: str, end: str, calls: int) -> tuple[float, dict[str, Any]]:
    """Return plain Celery's p50 while the broker is well, and the arm's calls while it is not."""
    plain = lab[ARMS["plain"]]
    driver = lab.driver(arm)  # anew: a publisher remembers the last outage
    driver("clear")
    for warm in (driver, plain):
        warm("enqueue", calls=20)
    healthy = statistics.median(plain("enqueue", calls=calls))
    lab.services.say(begin)
    try:
        away = driver("outage", calls=calls, budget=15)
    finally:
        lab.services.say(end)
    laboratory.stop([driver.process])
    return healthy, away


def _add(line: Line, arm: str, figure: float) -> None:
    figures = line.found.setdefault(arm, [])
    assert isinstance(figures, list)
    figures.append(figure)


def bulk(lab: Lab, options: Namespace) -> list[Line]:
    """Enqueue many jobs at once, by the fastest call the library has."""
    found = []
    for arm in lab.arms:
        lab[arm]("bulk", count=100)
    for arms in rounds(lab, options.rounds):
        seconds = {}
        for arm in arms:
            lab.clear(arm)
            seconds[arm.name] = lab[arm]("bulk", count=options.jobs)
        found.append(seconds)
    line = Line(f"3 enqueue {options.jobs} jobs at once", 20, higher=True)
    line.found = ratios(found, higher=True)
    line.notes.append(_absolute("us/job", 1e6 / options.jobs, found))
    return [line]


def drain(lab: Lab, options: Namespace) -> list[Line]:
    """Run many no-op jobs with two processes: enqueued one by one, then ours in other ways."""
    found, costs = [], []
    for arms in rounds(lab, options.rounds):
        seconds, cost = {}, {}
        for arm in arms:
            seconds[arm.name], cost[arm.name] = _drain(lab, arm, "fill", options.jobs)
            if arm.name == "ours":
                for how in ("apart", "bulk"):
                    seconds[how], cost[how] = _drain(lab, arm, how, options.jobs)
        found.append(seconds)
        costs.append(cost)
    result = ratios(found, higher=True)
    singly = Line(f"4 drain {options.jobs} enqueued one by one", 1, higher=True)
    bulk = Line(f"5 drain {options.jobs} enqueued in bulk", 3, higher=True)
    apart = Line(f"4 drain {options.jobs} enqueued apart, a message for each", 1, higher=True)
    same = {arm.name: "as one by one" for arm in lab.arms}
    bulk.found = same | {"ours": result.pop("bulk")}
    apart.found = same | {"ours": result.pop("apart")}
    singly.found = result
    singly.notes.append(_absolute("us/job", 1e6 / options.jobs, found))
    singly.notes += _costs(costs)
    return [singly, apart, bulk]


def _drain(lab: Lab, arm: Arm, how: str, jobs: int) -> tuple[float, dict[str, float]]:
    # A driver of its own: publishing message by message is switched on in it for good.
    lab.clear(arm)
    lab[arm]("disconnect")
    driver = lab.driver(arm)
    driver(how, count=jobs)
    before = _counters(lab, arm, driver)
    with lab.workers(arm) as workers:
        seconds = driver("watch", count=jobs, deadline=DRAIN_DEADLINE)
        cost = {"worker CPU us": 1e6 * laboratory.cpu_seconds(workers)}
    after = _counters(lab, arm, driver)
    laboratory.stop([driver.process])
    cost |= {name: after[name] - before[name] for name in after}
    return seconds, {name: value / jobs for name, value in cost.items()}


def _counters(lab: Lab, arm: Arm, driver: Talker) -> dict[str, float]:
    """Return what the database and the broker have counted so far, for this arm."""
    driver("disconnect")  # an idle session may keep its counts for ten seconds
    with psycopg.connect(lab.environment["DATABASE_URL"], autocommit=True) as connection:
        # nothing tells when the counts of a session that has ended are in
        time.sleep(1.5)
        row = connection.execute(
            "SELECT xact_commit, tup_updated + tup_inserted + tup_deleted FROM pg_stat_database"
            " WHERE datname = %s",
            [arm.database],
        ).fetchone()
        wal = connection.execute("SELECT wal_bytes FROM pg_stat_wal").fetchone()
    assert row
    assert wal
    commands = lab.ask_broker(arm, "info('stats')['total_commands_processed']")
    return {
        "commits": row[0],
        "rows written": row[1],
        "WAL bytes": float(wal[0]),
        "broker commands": float(commands),
    }


def _costs(costs: list[dict[str, dict[str, float]]]) -> list[str]:
    """Return per arm what a job costs its workers, in the round with the median CPU time."""
    notes = []
    for arm in costs[0]:
        own = sorted((cost[arm] for cost in costs), key=lambda cost: cost["worker CPU us"])
        middle = own[len(own) // 2]
        notes.append(_cost(arm, middle))
    return notes


def _cost(arm: str, cost: dict[str, float]) -> str:
    said = ", ".join(f"{number(value)} {name}" for name, value in cost.items())
    return f"per job, {arm}: {said}"


def start(lab: Lab, options: Namespace) -> list[Line]:
    """From the call to the first line of the body, on an idle system."""
    found = []
    with ExitStack() as stack:
        for arm in lab.arms:
            lab.clear(arm)
            stack.enter_context(lab.workers(arm))
        for arm in lab.arms:
            lab[arm]("warm")
            lab[arm]("latency", samples=10, budget=LATENCY_BUDGET)
        for arms in rounds(lab, options.rounds):
            seconds = {}
            for arm in arms:
                marks = lab[arm]("latency", samples=options.samples, budget=LATENCY_BUDGET)
                seconds[arm.name] = statistics.median(mark["body"] for mark in marks)
            found.append(seconds)
    line = Line("6 enqueue to start, idle, p50", 1.5)
    line.found = ratios(found, higher=False)
    line.notes.append(_absolute("us", 1e6, found))
    return [line]


def reconcile(lab: Lab, options: Namespace) -> list[Line]:
    """SQL time of a pass of the loop with 100 due, in a rolled back transaction."""
    lines = []
    for rows in options.rows:
        passes = lab[ARMS["ours"]]("due_pass", rows=rows, due=100, passes=options.rounds + 1)[1:]
        for plan in passes:
            # a table of a few megabytes may well be read as a whole to find 100 rows by their id
            whole = plan["scanned_whole"] and rows >= 100_000
            if whole or "durable_job_due" not in plan["indexes"]:
                raise BenchError(f"the loop reads the whole table of {rows} rows: {plan}")
            if not plan["found"]:
                raise BenchError(f"the pass did not move the 100 due rows of {rows}: {plan}")
        line = Line(f"7 pass of the loop, {rows} rows, 100 due", 5, unit="ms", base="-")
        line.found = {"ours": [plan["ms"] for plan in passes]}
        lines.append(line)
    lab[ARMS["ours"]]("clear")
    return lines


def kill(lab: Lab, options: Namespace) -> list[Line]:
    """SIGKILL of a whole worker with the default settings; its job runs again."""
    line = Line("8 SIGKILL of a worker until its job runs again", 40, unit="s", base="-")
    ours = ARMS["ours"]
    for turn in range(options.kills):
        lab.clear(ours)
        _add(line, "ours", _kill(lab, ours, f"kill-{turn}"))
    line.notes.append("each job had its effect exactly once")
    line.notes.append("plain Celery waits for the visibility timeout: 900 s here, 3600 s as usual")
    return [line]


def _kill(lab: Lab, ours: Arm, name: str) -> float:
    driver, held = lab[ours], 3.0
    control = (*laboratory.CELERY, "arm_ours", "worker", "-Q", "control", "-c", "1", "-l", "error")
    beat = ("-B", "-s", str(laboratory.BUILD / "beat"), "--without-mingle", "--without-gossip")
    helper = lab.spawn(ours, "control", *control, *beat)
    try:
        with lab.workers(ours) as (victim,):
            driver("warm")
            driver("send_hold", name=name, seconds=held)
            driver("wait_for_body", deadline=30)
            laboratory.kill(laboratory.tree(victim))
            killed = time.time()
            with lab.workers(ours):
                again = driver("wait_for_body", deadline=300)
                laboratory.wait_until("the end of the job", 60, lambda: not driver("left"))
    finally:
        laboratory.stop([helper])
    if (effects := driver("groups", name=name)) != 1:
        raise BenchError(f"the killed job had {effects} effects")
    return float(again - killed)


def _absolute(unit: str, scale: float, found: list[dict[str, float]]) -> str:
    """Return the medians behind the ratios."""
    medians = {
        arm: scale * statistics.median(seconds[arm] for seconds in found) for arm in found[0]
    }
    return f"{unit}: " + ", ".join(f"{arm} {number(value)}" for arm, value in medians.items())


MEASURES = {
    "enqueue": enqueue,
    "outage": outage,
    "bulk": bulk,
    "drain": drain,
    "start": start,
    "reconcile": reconcile,
    "kill": kill,
}
