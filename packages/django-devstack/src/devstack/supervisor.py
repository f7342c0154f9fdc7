"""Keeps the processes of a running stack alive: restarts what died, and what was told to reload."""

import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from devstack.console import Console
from devstack.processes import Process

BACKOFF = (0.5, 1, 2, 5, 10, 30)
# Whoever lives this long begins again with the shortest pause.
HEALTHY_SECONDS = 20


@dataclass
class Watched:
    """A process and where it stands."""

    process: Process
    since: float = 0.0  # its last start
    ready: bool = True
    reloads: bool = False
    deaths: int = 0
    start_at: float | None = None  # when it is down: the next start
    stop_by: float | None = None  # when it is reloading: the end of patience


class Supervisor:
    """Call `tick` often; nothing else happens by itself."""

    def __init__(self, processes: Iterable[Process], console: Console) -> None:
        """Take over processes that run."""
        now = time.monotonic()
        self.watched = {process.name: Watched(process, since=now) for process in processes}
        self.console = console
        self.reloading_since = 0.0

    def tick(self) -> None:
        """Look at every process once."""
        now = time.monotonic()
        for one in self.watched.values():
            if one.process.running:
                self._look_after(one, now)
            elif one.start_at is None:
                self._plan_start(one, now)
            elif now >= one.start_at:
                self.console.starts(one.process.log)
                one.process.start()
                one.since, one.start_at, one.ready = now, None, False

    def _look_after(self, one: Watched, now: float) -> None:
        if one.stop_by is not None:
            if now > one.stop_by:
                one.process.send(signal.SIGKILL)
        elif not one.ready and one.process.ready():
            one.ready = True
            self.console.is_ready(one.process.log)
            if not one.reloads:
                self.console.say(f"{one.process.name} is up again, process {one.process.pid}")
            one.reloads = False
            if self.reloading_since and not any(one.reloads for one in self.watched.values()):
                self.console.say(f"ready again after {now - self.reloading_since:.1f} s")
                self.reloading_since = 0.0

    def _plan_start(self, one: Watched, now: float) -> None:
        """Decide when a process that ended starts again."""
        if one.stop_by is not None:
            one.start_at, one.stop_by = now, None
            return
        one.reloads = False
        self.console.died(one.process.log)
        one.deaths = one.deaths + 1 if now < one.since + HEALTHY_SECONDS else 1
        pause = BACKOFF[min(one.deaths, len(BACKOFF)) - 1]
        one.start_at = now + pause
        self.console.say(
            f"{one.process.name} DIED: {how(one.process.exit_code or 0)}."
            f" It starts again in {pause:g} s; its log is {one.process.log}"
        )

    def reload(self, names: Iterable[str]) -> None:
        """Restart processes with new code; those that wait after a death start at once."""
        now = self.reloading_since = time.monotonic()
        for one in (self.watched[name] for name in names):
            one.deaths, one.reloads = 0, True
            if one.start_at is not None:
                one.start_at = now
            elif one.stop_by is None:
                one.process.send(one.process.stop_signal)
                one.stop_by = now + one.process.grace


def how(exit_code: int) -> str:
    """Return an exit code in words."""
    # a launcher and a shell report signal N as 128 + N
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number in {member.value for member in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    return f"exit code {exit_code}"
