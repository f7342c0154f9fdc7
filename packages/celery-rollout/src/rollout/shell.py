"""Programs of the machine, files that are whole or not there, and how a step says no."""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()


class StepError(Exception):
    """A step did not reach its end; the message says which, and what was printed."""


class RefusedError(Exception):
    """The command must not begin; the message says why, and what would be right."""


def run(*command: str, **how: Any) -> str:
    """Run a program; return what it prints; raise StepError with its end when it fails."""
    try:
        done: subprocess.CompletedProcess[str]
        done = subprocess.run(command, capture_output=True, text=True, **how)
    except FileNotFoundError:
        raise StepError(f"{command[0]} is not installed") from None
    if done.returncode:
        said = [text.strip() for text in (done.stdout, done.stderr)]
        text = "\n".join(reason(text) for text in said if text)[-3000:]
        name = " ".join(command[command.index("--") + 2 :] if "--" in command else command)
        told = "rollout.release" in command and done.returncode == 1  # its own words suffice
        raise StepError(text if told else f"`{name}` ended with {done.returncode}:\n{text}")
    return done.stdout


def succeeds(*command: str) -> bool:
    """Tell whether a program ends with 0; what it prints is dropped."""
    return not subprocess.run(command, capture_output=True).returncode


def keep(path: Path, text: str) -> None:
    """Write a file: whole, or not at all, whenever the process or the machine stops."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def say(text: str) -> None:
    """Print a line, or several, with the seconds since the start."""
    for line in text.splitlines():
        try:
            print(f"{time.monotonic() - BEGAN:6.1f} s  {line}", flush=True)
        except OSError:  # nobody reads on, or the terminal is gone: no reason to stop half-way
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def ending(text: str, lines: int = 12) -> str:
    """Return the last lines of a log, each of them once."""
    found = dict.fromkeys(line[:300] for line in text.splitlines() if line.strip())
    return "\n".join(["the end of its log:", *list(found)[-lines:]])


def reason(text: str) -> str:
    """Return what was printed; of the last traceback only the line that names its exception.

    Not what follows, as DETAIL of PostgreSQL, which may show a row; nor a value, as of a setting.
    """
    last = text.rpartition("Traceback (most recent call last)")
    found = re.search(r"^[\w.<>]+(: .*)?$", last[2], re.MULTILINE) if last[1] else None
    line = found[0] if found else text
    return re.sub(r"(['\"]).*\1", "'...'", line) if line.startswith("ValueError: ") else line
