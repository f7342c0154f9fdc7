"""A storm of faults over jobs that are counted afterwards; a seed repeats its choices.

    run(folder, seed, seconds) -> [{arm, fault, wanted, done, lost, twice, seconds, seed}, ...]

Two workers with two children, beat and its loop, one more loop. Jobs arrive all the time, and
random faults strike: children, workers and the loop are killed, workers are frozen for longer than
a lease, the broker is flushed, connections to the database are cut. A fault counts only when its
effect was seen. The last arm is plain Celery in the same storm: how it fares is the measure.
"""

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import redis
from celery import current_app
from django.db import transaction

from durable_jobs.models import Job
from tests import tasks
from tests.conftest import (
    CONTROL,
    FAST,
    WORK,
    Loop,
    Worker,
    effects,
    end,
    gone,
    terminate_connections,
    wait_until,
)

# A storm may take more attempts from a job than a life does; none is to end dead of them.
MANY = {"max_attempts": 100}
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "atomic": (tasks.write_atomic, MANY),
    "at least once": (tasks.write, MANY),
    "plain Celery": (tasks.plain_work, {}),
}
SETTLE_SECONDS = 120


class Storm:
    """What runs, what was asked for, and which faults took effect."""

    def __init__(self, folder: Path, seed: int, jobs: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.broker = redis.Redis.from_url(current_app.conf.broker_url)
        self.struck: Counter[str] = Counter()
        self.started = 0
        self.wanted = dict.fromkeys(ARMS, 0)
        self.jobs = jobs
        self.frozen: dict[str, float] = {}
        self.workers = {name: self.worker(name) for name in ("a", "b", "control")}
        self.loop = self.new_loop()
        self.faults: dict[str, Callable[[], bool]] = {
            "child killed": self.kill_child,
            "worker killed": self.kill_worker,
            "loop killed": self.kill_loop,
            "worker frozen": self.freeze_worker,
            "broker flushed": self.flush_broker,
            "connections cut": lambda: terminate_connections() > 0,
        }

    def log(self, name: str) -> Path:
        self.started += 1
        return self.folder / f"{name}{self.started}.log"

    def worker(self, name: str) -> Worker:
        words = CONTROL if name == "control" else WORK
        log = self.log(name)
        beat = self.folder / log.stem  # a killed beat can leave its file broken
        beat.mkdir()
        return Worker(log, *words.format(folder=beat).split())

    def new_loop(self) -> Loop:
        return Loop(self.log("loop"))

    def enqueue_until(self, share: float) -> None:
        """Ask for that share of the jobs of each arm, in one transaction."""
        with transaction.atomic():
            for arm, (task, options) in ARMS.items():
                while self.wanted[arm] < share * self.jobs:
                    seconds = self.random.choice((0, 0, 0.05, 0.1, 0.5))
                    task.apply_async([f"{self.wanted[arm]}.", seconds], **options)
                    self.wanted[arm] += 1

    def one(self) -> tuple[str, Worker] | None:
        """Return a worker that works: it is up, not frozen and has begun a task.

        Celery ends a worker when one of its children dies before its loop runs. That loses
        nothing, but here is no supervisor that would start it again.
        """
        able = [
            (name, worker)
            for name, worker in self.workers.items()
            if name not in self.frozen
            and worker.process.poll() is None
            and worker.children()
            and "task_started" in worker.log.read_text()
        ]
        return self.random.choice(able) if able else None

    def kill_child(self) -> bool:
        if not (found := self.one()):
            return False
        child = self.random.choice(found[1].children())
        send([child], signal.SIGKILL)
        wait_until(lambda: gone(child), 5)
        return True

    def kill_worker(self) -> bool:
        if not (found := self.one()):
            return False
        name, worker = found
        end([worker.process])
        self.workers[name] = self.worker(name)
        return worker.process.returncode == -signal.SIGKILL

    def kill_loop(self) -> bool:
        end([self.loop.process])
        killed = self.loop.process.returncode == -signal.SIGKILL
        self.loop = self.new_loop()
        return killed

    def freeze_worker(self) -> bool:
        """Stop a whole worker for longer than its leases last; `thaw` wakes it."""
        if self.frozen or not (found := self.one()):
            return False
        name, worker = found
        processes = family(worker)
        send(processes, signal.SIGSTOP)
        wait_until(lambda: all(map(stopped, processes)), 5)
        self.frozen[name] = time.monotonic() + FAST["LEASE"] + 2
        return True

    def thaw(self, at: float) -> None:
        for name, until in list(self.frozen.items()):
            if at >= until:
                send(family(self.workers[name]), signal.SIGCONT)
                del self.frozen[name]

    def flush_broker(self) -> bool:
        """Only a flush that loses a message counts."""
        with self.broker.pipeline() as pipe:
            pipe.llen("default").hlen("unacked").flushall()
            queued, unacked, _ = pipe.execute()
        return queued + unacked > 0

    def rage(self, seconds: float) -> None:
        """Ask for jobs and strike, for that long; each kind of fault has its turn."""
        begin = time.monotonic()
        turns: list[str] = []
        while time.monotonic() < begin + seconds or len(self.struck) < len(self.faults):
            assert time.monotonic() < begin + seconds + 60, f"only these faults: {self.struck}"
            self.enqueue_until(min(1.0, (time.monotonic() - begin) / seconds))
            time.sleep(self.random.uniform(0.2, 0.8))
            self.thaw(time.monotonic())
            turns = turns or self.random.sample(sorted(self.faults), len(self.faults))
            name = turns.pop()
            self.struck[name] += self.faults[name]()
            self.struck = +self.struck
        self.enqueue_until(1.0)

    def settle(self) -> None:
        """No more faults: wait until every job is final. No worker may have ended by itself."""
        self.thaw(float("inf"))
        for process in (*self.workers.values(), self.loop):
            ended = process.process.poll()
            assert ended is None, f"{process.log.name} {ended}:\n{process.log.read_text()[-3000:]}"
        wait_until(lambda: not Job.objects.unfinished().exists(), SETTLE_SECONDS)

    def stop(self) -> None:
        self.thaw(float("inf"))
        end([*(worker.process for worker in self.workers.values()), self.loop.process])
        self.broker.close()


def family(worker: Worker) -> list[psutil.Process]:
    return [psutil.Process(worker.process.pid), *worker.children()]


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Signal them; one that has just ended by itself, as a child does, is passed over."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def stopped(process: psutil.Process) -> bool:
    return gone(process) or process.status() == psutil.STATUS_STOPPED


def run(folder: Path, seed: int, seconds: float, jobs: int = 150) -> list[dict[str, Any]]:
    """Run a storm of `jobs` in each arm, on the connected database and broker."""
    begin = time.monotonic()
    storm = Storm(folder, seed, jobs)
    try:
        for worker in storm.workers.values():
            worker.wait_until_ready()
        storm.rage(seconds)
        storm.settle()
    finally:
        storm.stop()
    fault = ", ".join(f"{name} x{count}" for name, count in sorted(storm.struck.items()))
    prefixes = {"atomic": "atomic ", "at least once": "end ", "plain Celery": "plain end "}
    records = []
    for arm, wanted in storm.wanted.items():
        times = Counter(effects(prefixes[arm]))
        records.append(
            {
                "arm": arm,
                "fault": fault,
                "wanted": wanted,
                "done": len(times),
                "lost": wanted - len(times),
                "twice": sum(count > 1 for count in times.values()),
                "seconds": round(time.monotonic() - begin, 1),
                "seed": seed,
            }
        )
    return records
