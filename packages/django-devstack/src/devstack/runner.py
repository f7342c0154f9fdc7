"""The life of a stack, from its first process to the removal of its last file."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable

from devstack import programs, project, services, state
from devstack.console import Console
from devstack.processes import Process, free_port, stop, wait_until_ready
from devstack.state import StackError

FOLDER = programs.ROOT / ".dev"
STACK = FOLDER / "stack.json"
ENVIRONMENT = FOLDER / "env"
LOCK = FOLDER / "lock"
PREPARE = "prepare"
QUIET = ("postgres", "valkey")  # their logs stay in their files


class StoppedError(Exception):
    """Somebody asked for the end while the stack was starting."""


class Stack:
    """Everything that runs, what the terminal shows of it, and the files that tell others of it."""

    def __init__(self, console: Console) -> None:
        """Take the folder of the project; raise StackError when a stack holds it."""
        self.console = console
        self.signals = self.asked = 0
        self.terminated = False
        self.started: list[list[Process]] = []
        self.pids: dict[str, int] = {}
        self.urls: dict[str, str | None] = {"web": None}
        self.held = state.lock(FOLDER)
        if not self.held:
            raise StackError(running_already())
        state.sweep(FOLDER)
        for stale in (STACK, ENVIRONMENT, *(FOLDER / "log").glob("*.log")):
            stale.unlink(missing_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        """Count wishes to stop: the second hurries."""
        self.signals += 1
        self.terminated = self.terminated or number != signal.SIGINT

    def start(self, processes: list[Process]) -> None:
        """Start processes together and wait until all are ready."""
        self.started.append(processes)
        for process in processes:
            process.start()
        wait_until_ready(processes, self.tick_while_starting)
        self.tick()

    def start_services(self) -> None:
        """Start database and broker, and tell the programs of the project where they are."""
        generated = development_defaults()
        os.environ.update(generated)
        found = services.prepare(FOLDER, os.environ)
        if project.BROKER == "rabbitmq" and not os.environ.get("CELERY_BROKER_URL"):
            self.console.say(
                "compose and production use RabbitMQ; here the broker is Valkey, which needs no"
                " installation. Set CELERY_BROKER_URL to use a RabbitMQ of yours"
            )
        self.start(found.processes)
        os.environ.update(found.environment)
        self.urls.update(database_url=found.database_url, broker_url=found.broker_url)
        lines = (f"{name}={value}\n" for name, value in (generated | found.environment).items())
        state.write_private(ENVIRONMENT, "".join(lines))

    def prepare_database(self) -> None:
        """Migrate and make the admin."""
        prepare = Process(
            name=PREPARE,
            command=[sys.executable, "-m", "devstack.prepare", str(FOLDER / "admin-password")],
            log=FOLDER / "log" / "prepare.log",
            ready=lambda: False,
        )
        self.started.append([prepare])
        prepare.start()
        while prepare.running:
            self.tick_while_starting()
            time.sleep(0.02)
        if prepare.exit_code:
            raise StackError(f"the database could not be prepared:\n{prepare.last_lines()}")
        self.tick()
        self.started.pop()

    def start_programs(self) -> None:
        """Start everything else."""
        ports = (
            free_port(8000, services.own_port(FOLDER, 2)),
            free_port(5555, services.own_port(FOLDER, 3)),
        )
        self.urls["web"] = f"http://127.0.0.1:{ports[0]}/"
        self.urls["flower"] = f"http://127.0.0.1:{ports[1]}/"
        self.start(list(programs.all_programs(FOLDER, ports).values()))

    @property
    def processes(self) -> list[Process]:
        """Return all processes in the order of their start."""
        return [process for group in self.started for process in group]

    def tick(self) -> None:
        """Show what the programs have written, and keep the list of processes up to date."""
        self.console.follow(process.log for process in self.processes if process.name not in QUIET)
        here = {process.name: process.pid for process in self.processes if process.pid}
        # a process that is being restarted keeps its old pid until the new one is known
        pids = {name: pid for name, pid in (self.pids | here).items() if name != PREPARE}
        if pids != self.pids:
            self.pids = pids
            started = {process.popen.pid for process in self.processes if process.popen}
            state.record(FOLDER, started.union(pids.values()))
            if STACK.exists():
                self.announce()

    def tick_while_starting(self) -> None:
        """Also give up as soon as somebody asks for the end."""
        self.tick()
        if self.signals:
            raise StoppedError

    def announce(self) -> None:
        """Tell other programs what runs where."""
        state.write_private(STACK, json.dumps({**self.urls, "processes": self.pids}, indent=2))

    def stop(self) -> None:
        """Stop everything, the last group first, and remove the files about it."""
        STACK.unlink(missing_ok=True)
        ENVIRONMENT.unlink(missing_ok=True)
        self.asked = self.signals
        while self.started:
            group = self.started[-1][::-1]
            if running := [process.name for process in group if process.running]:
                self.console.say(f"stopping {', '.join(running)}")
            stop(group, self.tick_while_stopping)
            self.tick()
            self.started.pop()
        (FOLDER / state.PIDS).unlink(missing_ok=True)

    def tick_while_stopping(self) -> bool:
        """Tell whether somebody asked for the end once more."""
        self.tick()
        before, self.asked = self.asked, self.signals
        return self.signals > before


def development_defaults() -> dict[str, str]:
    """Return what development needs and neither the environment nor `.env` gives: a fresh clone."""
    # Called for what is missing alone: a file with a password that is not in force misleads.
    defaults: dict[str, Callable[[], str]] = {
        "DJANGO_DEBUG": lambda: "1",
        "DJANGO_SECRET_KEY": lambda: state.secret(FOLDER / "secret-key"),
        "FLOWER_BASIC_AUTH": lambda: f"dev:{state.secret(FOLDER / 'flower-password')}",
        "FLOWER_COOKIE_SECRET": lambda: state.secret(FOLDER / "flower-cookie-secret"),
    }
    return {name: make() for name, make in defaults.items() if not os.environ.get(name)}


def running_already() -> str:
    """Return one line about the stack that holds the lock."""
    web = json.loads(STACK.read_text())["web"] if STACK.exists() else None
    pid = LOCK.read_text().strip()
    return (
        f"the stack of this project is running already{f' at {web}' if web else ''}, as process"
        f" {pid}; end it with Ctrl-C in its terminal, or with: kill {pid}"
    )
