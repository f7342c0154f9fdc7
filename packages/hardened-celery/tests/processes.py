"""Real processes in tests: wait for a condition, run a worker through the launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [sys.executable, "-m", "hardened_celery"]


def wait_until(condition: Callable[[], T], seconds: float = 30, what: str = "") -> T:
    """Return the first true value of `condition`; fail when there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)
    return value


def children(pid: int, *, zombies: bool = False) -> list[int]:
    """Return the pids of the direct children of a process."""
    table = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid=,stat="], text=True)
    rows = (line.split() for line in table.splitlines())
    alive = (
        (int(child), int(parent)) for child, parent, state in rows if zombies or state[0] != "Z"
    )
    return [child for child, parent in alive if parent == pid]


@dataclass
class Worker:
    """A launcher with a Celery worker below it."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def celery_pid(self) -> int:
        """The pid of Celery's main process, which is also its session and process group."""
        return wait_until(lambda: children(self.process.pid), what="Celery is started")[0]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Return the launcher's exit code."""
        return self.process.wait(seconds)

    def wait_ready(self) -> None:
        wait_until(lambda: " ready." in self.text(), 60, "the worker is ready")

    def kill(self) -> None:
        """Kill whatever still runs of it."""
        groups = children(self.process.pid)
        self.process.kill()
        self.process.wait()
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def launcher(*command: str | Path, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Run the launcher for a moment; return its exit code and what it said."""
    without = {name: value for name, value in os.environ.items() if name != "CELERY_APP"}
    done = subprocess.run(
        command, env=without | environment, stderr=subprocess.PIPE, text=True, cwd=cwd
    )
    return done.returncode, done.stderr


@contextmanager
def start(
    log: Path, command: list[str], environment: dict[str, str], **how: Any
) -> Iterator[Worker]:
    """Run a launcher; its output goes to `log`, and is shown if the test fails.

    It leads a process group, which a test can signal as a terminal does; `how` is for Popen.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, **how
        )
    worker = Worker(process, log)
    try:
        yield worker
    except BaseException:
        print(f"--- {log.name}\n{worker.text()}")
        raise
    finally:
        worker.kill()


@contextmanager
def running_worker(
    log: Path, environment: dict[str, str], *options: str, ready: bool = True, **how: Any
) -> Iterator[Worker]:
    """Run `hardened-celery worker` for the tests' project, until it is ready.

    `environment` is the fixture `project_environment`, `options` are the launcher's and Celery's;
    `tests.tasks` is loaded.
    """
    # mingling takes a second, in which a worker looks for others
    usual = "-I", "tests.tasks", "-l", "info", "--without-mingle"
    command = [*LAUNCHER, "worker", "-A", "tests.app", *options, *usual]
    with start(log, command, environment, **how) as worker:
        if ready:
            worker.wait_ready()
        yield worker
