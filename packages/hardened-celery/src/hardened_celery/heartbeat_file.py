"""The file that tells others that a worker lives: where it is, and how old it may be.

`liveness` touches it. The launcher prepares it and removes it; `check` reads it, without a broker.
"""

import os
import stat
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path


def say(line: str) -> None:
    """Write a line to the log of the supervisor, or nowhere when the terminal has been closed."""
    with suppress(OSError):
        os.write(2, f"worker: {line}\n".encode())


def usual_place(app: str, node: str | None, folder: str | None) -> Path:
    """Return the file of a node of the application in a folder: private, in memory if possible."""
    memory = Path("/dev/shm")  # noqa: S108
    base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    # two projects may share a Python, and call their applications `config`
    name = zlib.crc32(f"{sys.prefix} {Path(folder or '.').resolve()} {app} {node}".encode())
    return base / f"celery-worker-{os.getuid()}" / f"{name:08x}"


def prepare(file: Path, *, private: bool) -> None:
    """Raise OSError unless we can write the file, `private`: in a folder that is ours alone."""
    folder = file.parent
    if private:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # anybody may have made a folder of this name, to make us write through a link in it
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} is not private")
    file.touch()
    remove(file)


def remove(file: Path) -> None:
    """Remove the file, and the one beside it that says that the worker was ready."""
    for path in (file, ready(file)):
        path.unlink(missing_ok=True)


def ready(file: Path) -> Path:
    """Return the file that is there once the worker has begun to take messages."""
    return Path(f"{file}.ready")


def check(file: Path, max_age: float) -> int:
    """Say how old the file is; return 0 if it is young enough, else 1."""
    try:
        age = time.time() - file.stat().st_mtime
    except OSError as error:
        say(f"no heartbeat, it does not run or is still starting: {error}")
        return 1
    state = "hangs or is gone" if age > max_age else "lives"
    say(f"it {state}: the heartbeat is {age:.0f} s old, {max_age:g} s allowed: {file}")
    return int(age > max_age)
