"""The programs of the project: web, workers, beat and Flower, and when they are ready."""

import importlib.util
import os
import shlex
import shutil
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

from devstack.processes import Process
from devstack.project import Project, Worker
from devstack.state import StackError

# Somebody who presses Ctrl-C or saves a file waits for it; longer tasks are handed back.
GRACE, MARGIN = 8, 4
# Root is root on purpose, in a container for one: no warning of six lines at each reload.
AS_ROOT = {"PYTHONWARNINGS": "ignore:You're running the worker with superuser"}
# Our servers are here, whatever proxy the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def all_programs(project: Project, urls: dict[str, str | None]) -> list[Process]:
    """Return every program, in the order of their start. `urls` say where web and Flower are."""
    programs = [_web(project, urls["web"] or "")]
    programs += [_worker(project, name, worker) for name, worker in project.workers.items()]
    if project.beat:
        programs.append(_beat(project))
    if flower := urls.get("flower"):
        programs.append(_flower(project, flower))
    for name, command in project.programs.items():
        words = _command(command, f"programs.{name}")
        programs.append(Process(name, words, _log(project, name), ready=lambda: True))
    return programs


def installed(module: str) -> bool:
    """Tell whether a package that is optional is here."""
    return importlib.util.find_spec(module) is not None


def _log(project: Project, name: str) -> Path:
    return project.folder / "log" / f"{name}.log"


def _port(url: str) -> str:
    return url.rstrip("/").rpartition(":")[2]


def _command(text: str, name: str) -> list[str]:
    """Return a command line whose program is that of the virtual environment, where it has one."""
    program, *arguments = shlex.split(text)
    ours = Path(sys.executable).with_name(program)
    found = sys.executable if program == "python" else shutil.which(ours) or shutil.which(program)
    if not found:
        raise StackError(f"{program}: no such program; [tool.devstack] {name} names it")
    return [found, *arguments]


def _web(project: Project, url: str) -> Process:
    return Process(
        name="web",
        command=_command(project.web.replace("{port}", _port(url)), "web"),
        log=_log(project, "web"),
        ready=lambda: answers(f"{url}{project.ready}"),
        hurry_signal=signal.SIGQUIT,
    )


def _celery(project: Project) -> list[str]:
    # quiet: no banner
    return [sys.executable, "-m", "celery", "-q", "-A", project.celery]


def _worker(project: Project, name: str, worker: Worker) -> Process:
    """Return a worker; its pid is that of Celery's main process, also below the launcher."""
    node = f"{name}@{socket.gethostname()}"
    pid_file = project.folder / f"{name}.pid"
    command, hurry = [*_celery(project), "worker"], signal.SIGQUIT
    if installed("hardened_celery"):
        command = [sys.executable, "-m", "hardened_celery", "worker", "-A", project.celery]
        command += ["--grace", str(GRACE), "--margin", str(MARGIN)]
        # The launcher has deadlines of its own; a second signal brings them forward.
        hurry = signal.SIGTERM
    return Process(
        name=name,
        command=[
            *(*command, "-n", node, "-c", str(worker.concurrency), "-l", "INFO"),
            *(["-Q", worker.queues] if worker.queues else []),
            # it costs a second at every start, and hands over revokes, which a reload may forget
            *("--pidfile", str(pid_file), "--without-mingle"),
        ],
        log=_log(project, name),
        ready=lambda: pid_file.exists() and pongs(node),
        hurry_signal=hurry,
        grace=GRACE + 2,
        pid_file=pid_file,
        environment=AS_ROOT if os.geteuid() == 0 else {},
    )


def _beat(project: Project) -> Process:
    """Return beat; it notes its pid right before its first tick."""
    pid_file = project.folder / "beat.pid"
    return Process(
        name="beat",
        command=[
            *(*_celery(project), "beat", "--schedule", str(project.folder / "beat-schedule")),
            *("--pidfile", str(pid_file), "-l", "INFO"),
        ],
        log=_log(project, "beat"),
        ready=pid_file.exists,
        pid_file=pid_file,
    )


def _flower(project: Project, url: str) -> Process:
    """Return Flower, which shows and changes nothing; its password comes from FLOWER_BASIC_AUTH."""
    return Process(
        name="flower",
        command=[
            *(*_celery(project), "flower", "--address=127.0.0.1", f"--port={_port(url)}"),
            *("--read-only", "--persistent=True", f"--db={project.folder / 'flower.db'}"),
            *("--state-save-interval=10000", "--max-tasks=10000", "--purge-offline-workers=300"),
        ],
        log=_log(project, "flower"),
        ready=lambda: answers(f"{url}healthcheck"),
    )


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
