"""A Debian system for tests: systemd is its process 1, PostgreSQL and Valkey are its services."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import TEMPLATE

# Boots such a system in namespaces, on a machine that has no virtual machines; see its README.
LAB = TEMPLATE.parent / "shared" / "systemd-lab" / "systemd-lab"
PACKAGES = "git postgresql python3-venv valkey-server"


class Server:
    """Runs commands on the server, as root."""

    def __init__(self, log: Path) -> None:
        self.environment = os.environ | {"SYSTEMD_LAB_PACKAGES": PACKAGES}
        self.log = log

    def lab(self, *arguments: str, timeout: float = 600) -> str:
        done = subprocess.run(
            [LAB, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            pytest.fail(f"{' '.join(arguments)}:\n{(done.stdout + done.stderr)[-6_000:]}")
        return done.stdout

    def run(self, *command: str, timeout: float = 300) -> str:
        """Run a command; return its output, or fail the test."""
        return self.lab("run", *command, timeout=timeout)

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Start a command; its output and errors can be read from `stdout`."""
        return subprocess.Popen(
            [LAB, "run", *command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )


@contextmanager
def server(folder: Path, *binds: str) -> Iterator[Server]:
    """Yield a server that runs, fresh, with folders of this machine as `from:to[:ro]` in it."""
    if not LAB.exists() or os.getuid() != 0:
        pytest.skip("no systemd-lab beside the repository, or not root")
    found = Server(folder / "server.log")
    arguments = [word for bind in binds for word in ("--bind", bind)]
    found.lab("down")
    found.lab("up", *arguments, timeout=900)
    try:
        yield found
    finally:
        found.lab("down")
