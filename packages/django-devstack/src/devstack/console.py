"""What the terminal shows: the logs of all processes, each line behind its process's name."""

import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

COLOURS = {"web": 36, "worker": 32, "control": 33, "beat": 35, "flower": 34, "stack": 1}
WIDTH = 8
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Console:
    """Prints our own lines, and follows logs."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        """Colour only for people: a terminal, and no wish for none (NO_COLOR)."""
        self.out = out
        self.colours = out.isatty() and not os.environ.get("NO_COLOR")
        self.positions: dict[Path, int] = {}

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
            with suppress(FileNotFoundError), path.open("rb") as log:
                log.seek(self.positions.setdefault(path, 0))
                lines, newline, _ = log.read().rpartition(b"\n")
                if newline:
                    self.positions[path] += len(lines) + 1
                    text = lines.decode(errors="replace")
                    self.say(text if self.colours else ESCAPES.sub("", text), path.stem)
