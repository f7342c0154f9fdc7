"""The project with views, tasks and beat entries that fail, and the programs that run it."""

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

from tests.processes import ROOT, wait_until
from tests.wiring import GUNICORN


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program of this project, in production."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.observed.settings",
        "DJANGO_DEBUG": "",
        "DJANGO_ALLOWED_HOSTS": "127.0.0.1",
        **more,
    }


def database(name: str) -> str:
    """Return the URL of a database on the server that the tests use."""
    return f"{os.environ['DATABASE_URL'].rpartition('/')[0]}/{name}"


def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def program(log: Path, environment: dict[str, str], *command: str) -> Iterator[subprocess.Popen]:
    """Run `python -m command`, its output in `log`; end it with SIGTERM."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    except BaseException:
        print(f"--- {log.name}\n{log.read_text(errors='replace')}")
        raise
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def web(
    log: Path, port: int, environment: dict[str, str], *options: str
) -> Iterator[subprocess.Popen]:
    """Run gunicorn with one worker process, on a port."""
    environment = environment | {"GUNICORN_BIND": f"127.0.0.1:{port}", "WEB_CONCURRENCY": "1"}
    command = "gunicorn", "tests.wsgi", "-c", str(GUNICORN), *options
    with program(log, environment, *command) as process:
        wait_until(lambda: "Booting worker" in log.read_text(), 30, "gunicorn runs")
        yield process


def status(port: int, path: str, body: bytes | None = None, **headers: str) -> int:
    """Ask the web process, with POST if there is a body; return the status of its answer."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, names)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # our own server
            return answer.status
    except HTTPError as error:
        return error.code
