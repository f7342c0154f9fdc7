"""Tells which source files of the project changed.

It looks at each file instead of asking the system to tell: that works on every file system, in
folders made meanwhile, and is cheap as long as it passes over what is not the person's.
"""

import os
import time
from pathlib import Path

SECONDS = 0.3
# Of one core, however large the project is.
SHARE = 1 / 20
SUFFIXES = (".py", ".html")
# No program of the stack imports tests.
PASSED_OVER = {"tests", "node_modules", "__pycache__", "site-packages"}


class Watch:
    """Ask it often; it looks as seldom as is good for the machine."""

    def __init__(self, root: Path) -> None:
        """Remember what the files are like now."""
        self.root = root
        self.files = self._look()
        self.next = 0.0

    def changes(self) -> set[str]:
        """Return the files that changed since the last call, as paths from the root."""
        if time.monotonic() < self.next:
            return set()
        # not by the clock: on a busy machine a short look may last long
        start = time.thread_time()
        before, self.files = self.files, self._look()
        self.next = time.monotonic() + max(SECONDS, (time.thread_time() - start) / SHARE)
        changed = {path for path, _ in before.items() ^ self.files.items()}
        return {os.path.relpath(path, self.root) for path in changed}

    def _look(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if _is_source(folder, name)]
            for name in files:
                if name.endswith(SUFFIXES) and not name.startswith((".", "test")):
                    path = os.path.join(folder, name)
                    try:
                        state = os.stat(path)
                    except OSError:
                        continue  # an editor replaces it just now
                    found[path] = (state.st_mtime_ns, state.st_size)
        return found


def _is_source(folder: str, name: str) -> bool:
    hidden = name.startswith(".") or name in PASSED_OVER
    return not hidden and not os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))
