"""The files in `.dev`: secrets, the lock of a running stack, the pids a killed one left behind."""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

# A leftover gets this long to end by itself or by SIGTERM before it is killed.
SWEEP_SECONDS = 15
PIDS = "pids.json"


class StackError(Exception):
    """What went wrong and what to do about it, for the terminal."""


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; only its owner can read it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def secret(path: Path) -> str:
    """Return the random password kept in a file, which is made at the first call."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(18))
    return path.read_text()


def lock(folder: Path, *, wait: bool = False) -> TextIO | None:
    """Return an open file that holds the folder as long as it lives, or None when another does."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    # for people: who holds it
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    return file


def waiting_lock(folder: Path) -> TextIO:
    """Return an open file that holds the folder, after whoever else does has let it go."""
    held = lock(folder, wait=True)
    assert held
    return held


def birth(pid: int) -> str:
    """Return when a process was started, in any unit, or "" when it is gone.

    A pid alone may belong to a stranger by now; with its birth it names one process for good.
    """
    if sys.platform == "linux":
        try:
            # the name in parentheses may contain anything
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] == "Z" else fields[19]
    command = ["/bin/ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def record(folder: Path, pids: Iterable[int]) -> None:
    """Note the processes of this stack, for `sweep`."""
    write_private(folder / PIDS, json.dumps({pid: birth(pid) for pid in pids}))


def sweep(folder: Path) -> None:
    """End what a killed runner left behind; call it with the folder's lock held."""
    file = folder / PIDS
    if not file.exists():
        return
    ours = {int(pid): born for pid, born in json.loads(file.read_text()).items() if born}
    for pid in _alive(ours):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + SWEEP_SECONDS
    while _alive(ours) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in _alive(ours):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    file.unlink()


def _alive(births: dict[int, str]) -> list[int]:
    return [pid for pid, born in births.items() if birth(pid) == born]
