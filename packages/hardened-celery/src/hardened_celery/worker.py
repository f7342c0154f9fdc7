"""Run a Celery worker, and stop it without losing work.

Celery gets a session of its own, so that a signal to our process group (Ctrl-C in a terminal, a
supervisor that signals groups) never reaches its pool processes: they would drop their tasks. Not
covered: a task that is acknowledged before it runs (acks_late=False) cannot be handed back; and
whoever kills before the grace is over brings back what ran only after the visibility timeout.
"""

import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hardened_celery import heartbeat_file
from hardened_celery.heartbeat_file import say

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # Celery's: print all stacks, open the debugger
RUNNING, WARM, COLD, STUCK, KILLED = range(5)
# One wish may arrive twice: from the terminal, and from a runner that the terminal signalled too.
SAME_WISH_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


class Stop:
    """How far a Celery main process has been asked to stop."""

    def __init__(self, pid: int, grace: float, margin: float) -> None:
        """`pid` leads a session and process group of its own."""
        self.pid = pid
        last = min(2, margin / 4)  # enough to write where it hangs
        self.patience = {WARM: grace - margin, COLD: margin - last, STUCK: last, KILLED: math.inf}
        self.stage = RUNNING
        self.since = -math.inf
        self.deadline = math.inf

    def ask(self, stage: int, why: str) -> None:
        self.stage = min(stage, KILLED)
        self.since = time.monotonic()
        self.deadline = self.since + self.patience[self.stage]
        number, wish = {
            WARM: (signal.SIGTERM, f"running tasks may end, for {self.patience[WARM]:g} s"),
            COLD: (signal.SIGQUIT, "handing back what still runs"),
            STUCK: (signal.SIGUSR1, "it does not end; this is where it hangs"),
            KILLED: (signal.SIGKILL, "killing the worker"),
        }[self.stage]
        say(f"{why}: {wish}")
        send = os.killpg if self.stage == KILLED else os.kill
        with suppress(ProcessLookupError):
            send(self.pid, number)

    def on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number in PASSED_ON:
            os.kill(self.pid, number)
        elif number == signal.SIGQUIT:
            self.ask(KILLED if self.stage >= COLD else COLD, name)
        elif number in STOP and time.monotonic() > self.since + SAME_WISH_SECONDS:
            self.ask(KILLED if self.stage >= COLD else self.stage + 1, name)

    def on_time(self) -> None:
        if time.monotonic() >= self.deadline:
            self.ask(self.stage + 1, "time is up")


def supervise(pid: int, wake: int, grace: float, margin: float) -> int:
    """Pass on the wish to stop until process `pid` ends; return how it ended, -N for signal N.

    The numbers of arriving signals can be read from `wake`: one loop, and no code in handlers.
    """
    stop = Stop(pid, grace, margin)
    while (code := reap(pid)) is None:
        left = max(stop.deadline - time.monotonic(), 0)
        select.select([wake], [], [], None if left == math.inf else left)
        with suppress(BlockingIOError):
            for number in os.read(wake, 64):
                stop.on_signal(number)
        stop.on_time()
    return code


def reap(pid: int) -> int | None:
    """Return how a child ended, or None; bury all others, which come to us when we are PID 1."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)
        if ended == 0:
            return None


def wake_on_signals() -> int:
    """Return a descriptor from which the numbers of signals can be read as they arrive."""
    wake, writer = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (*STOP, *PASSED_ON, signal.SIGQUIT, signal.SIGCHLD):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: None)
    return wake


def die_with_us() -> Callable[[], None]:
    """Return what the child does first: have the kernel send it SIGTERM when we die (Linux only).

    And SIGUSR1, by which it is only asked where it is, does not end it before Celery handles it.

    Not SIGQUIT: whoever replaces this worker is not waiting for it, so its tasks may end, and their
    time limits see to it that they do.
    """
    linux = sys.platform == "linux"
    libc = ctypes.CDLL(None)
    launcher = os.getpid()

    def before_exec() -> None:
        # Not SIGUSR2, which may have no handler later: programs that tasks start would ignore it.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if not linux:
            return
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # we died before the call
            os._exit(1)

    return before_exec


def run(celery: list[str], heartbeat: Path, grace: float, margin: float) -> int:
    wake = wake_on_signals()
    process = subprocess.Popen(
        celery,
        env={**os.environ, "WORKER_HEARTBEAT_FILE": str(heartbeat)},
        start_new_session=True,
        preexec_fn=die_with_us(),
    )
    process.returncode = supervise(process.pid, wake, grace, margin)
    # Where the kernel does not see to it, pool processes outlive a main process that crashed.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    heartbeat_file.remove(heartbeat)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode
