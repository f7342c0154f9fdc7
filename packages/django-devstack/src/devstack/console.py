"""What the terminal shows: the logs of all processes, each line behind its process's name.

What a program says while it starts is kept back: its warnings are shown when it is ready, all of it
if it dies.
"""

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

COLOURS = {"web": 36, "worker": 32, "control": 33, "beat": 35, "flower": 34, "stack": 1}
QUIET = {"postgres", "valkey", "rabbitmq", "epmd"}  # their logs stay in their files
WIDTH = 8
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
WARNINGS = re.compile(r"(?<!gunicorn\.)(warning|error|critical)", re.IGNORECASE)
# The last line of Celery's banner; what follows is said by tasks.
CELERY_READY = " ready."
# What gunicorn, Celery, Flower and the launcher say whenever something starts or stops.
NOISE = re.compile(
    r"^\s*$|Handling signal: term|Worker exiting|Shutting down: Master|Warm shutdown|beat: Starting"
    r"|running tasks may end|Inspect method \w+ failed|Events of group {task} enabled"
)


class Console:
    """Prints our own lines, and follows logs."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        """Colour only for people: a terminal, and no wish for none (NO_COLOR)."""
        self.out = out
        self.colours = out.isatty() and not os.environ.get("NO_COLOR")
        self.positions: dict[Path, int] = {}
        self.starting: set[Path] = set()

    def say(self, text: str, name: str = "stack") -> None:
        """Print text, each line behind a name."""
        prefix = f"{name:<{WIDTH}}|"
        if self.colours:
            prefix = f"\x1b[{COLOURS.get(name, 0)}m{prefix}\x1b[0m"
        # The terminal may be gone, or the reader of a pipe; the stack must still be stopped.
        with suppress(OSError):
            self.out.write("".join(f"{prefix} {line}\n" for line in text.splitlines()))
            self.out.flush()

    def follow(self, logs: Iterable[Path]) -> None:
        """Print what was added to the logs since the last call, whole lines only."""
        for path in logs:
            if path not in self.starting:
                self.say("\n".join(self._news(path)), path.stem)

    def starts(self, log: Path) -> None:
        """Keep back what is said from now on."""
        self.follow([log])
        self.starting.add(log)

    def is_ready(self, log: Path) -> None:
        """Show the warnings of what was kept back, and what tasks have said already."""
        lines = self._news(log)
        ready = max((n for n, line in enumerate(lines) if CELERY_READY in line), default=len(lines))
        shown = [line for n, line in enumerate(lines) if n > ready or WARNINGS.search(line)]
        self.say("\n".join(shown), log.stem)
        self.starting.discard(log)

    def died(self, log: Path) -> None:
        """Show all that was kept back."""
        self.starting.discard(log)
        self.follow([log])

    def _news(self, path: Path) -> list[str]:
        if path.stem in QUIET:
            return []
        with suppress(FileNotFoundError), path.open("rb") as log:
            log.seek(self.positions.setdefault(path, 0))
            lines, newline, _ = log.read().rpartition(b"\n")
            if newline:
                self.positions[path] += len(lines) + 1
                text = lines.decode(errors="replace")
                text = text if self.colours else ESCAPES.sub("", text)
                return [line for line in text.split("\n") if not NOISE.search(line)]
        return []
