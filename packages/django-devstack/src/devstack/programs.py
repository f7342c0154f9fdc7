"""The programs of the project: web, worker, control, beat and Flower, and when they are ready."""

import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from devstack.processes import Process

ROOT = Path.cwd()
CELERY = [sys.executable, "-m", "celery", "-A", "config"]
# Somebody who presses Ctrl-C or saves a file waits for it; longer tasks are handed back.
GRACE, MARGIN = 8, 4
# Our servers are here, whatever proxy the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def web(folder: Path, port: int) -> Process:
    """Return gunicorn, as in production; it answers on the port when it is ready."""
    os.environ["GUNICORN_BIND"] = f"127.0.0.1:{port}"
    return Process(
        name="web",
        command=[
            *(sys.executable, "-m", "gunicorn", "config.wsgi"),
            *("-c", str(ROOT / "config" / "gunicorn.conf.py")),
        ],
        log=folder / "log" / "web.log",
        ready=lambda: answers(f"http://127.0.0.1:{port}/healthz/live"),
        hurry_signal=signal.SIGQUIT,
    )


def worker(folder: Path, name: str, queues: str, concurrency: int) -> Process:
    """Return a worker below the launcher; its pid is that of Celery's main process."""
    node = f"{name}@{socket.gethostname()}"
    pid_file = folder / f"{name}.pid"
    return Process(
        name=name,
        command=[
            *(sys.executable, "-m", "hardened_celery", "worker", "-A", "config"),
            *("--grace", str(GRACE), "--margin", str(MARGIN), "-n", node, "-Q", queues),
            *("-c", str(concurrency), "--pidfile", str(pid_file), "-l", "INFO"),
            # it costs a second at every start, and hands over revokes, which a reload may forget
            "--without-mingle",
        ],
        log=folder / "log" / f"{name}.log",
        ready=lambda: pid_file.exists() and pongs(node),
        # The launcher has deadlines of its own; a second signal brings them forward.
        hurry_signal=signal.SIGTERM,
        grace=GRACE + 2,
        pid_file=pid_file,
    )


def beat(folder: Path) -> Process:
    """Return beat; it notes its pid right before its first tick."""
    pid_file = folder / "beat.pid"
    return Process(
        name="beat",
        command=[
            *(*CELERY, "beat", "--schedule", str(folder / "beat-schedule")),
            *("--pidfile", str(pid_file), "-l", "INFO"),
        ],
        log=folder / "log" / "beat.log",
        ready=pid_file.exists,
        pid_file=pid_file,
    )


def flower(folder: Path, port: int) -> Process:
    """Return Flower, which shows and changes nothing; its password comes from FLOWER_BASIC_AUTH."""
    return Process(
        name="flower",
        command=[
            *(*CELERY, "flower", "--address=127.0.0.1", f"--port={port}", "--read-only"),
            *("--persistent=True", f"--db={folder / 'flower.db'}", "--state-save-interval=10000"),
            *("--max-tasks=10000", "--purge-offline-workers=300"),
        ],
        log=folder / "log" / "flower.log",
        ready=lambda: answers(f"http://127.0.0.1:{port}/healthcheck"),
    )


def all_programs(folder: Path, ports: tuple[int, int]) -> dict[str, Process]:
    """Return every program by name, in the order of their start."""
    web_port, flower_port = ports
    programs = [
        web(folder, web_port),
        worker(folder, "worker", "default,high,low", concurrency=2),
        worker(folder, "control", "control", concurrency=1),
        beat(folder),
        flower(folder, flower_port),
    ]
    return {program.name: program for program in programs}


def answers(url: str) -> bool:
    """Tell whether a server answers, with anything but an error of its own."""
    try:
        DIRECT.open(url, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < 500
    except OSError:
        return False
    return True


def pongs(node: str) -> bool:
    """Tell whether a worker takes messages: it answers to a ping that went through the broker."""
    from celery import Celery
    from kombu import pools
    from kombu.exceptions import OperationalError

    # not the project's app: this process outlives every change of the project's code
    app = Celery(broker=os.environ["CELERY_BROKER_URL"], set_as_current=False)
    if app.conf.broker_url.startswith("redis"):
        # a broker that hangs must not hang us
        app.conf.broker_transport_options = {"socket_timeout": 5, "socket_connect_timeout": 5}
    connection = app.connection_for_write()
    try:
        return bool(app.control.ping(destination=[node], timeout=0.5))
    except (OperationalError, *connection.connection_errors, *connection.channel_errors):
        # the broker died as well, and with it the connections that are kept for the next call
        pools.reset()
        return False
    finally:
        app.close()
