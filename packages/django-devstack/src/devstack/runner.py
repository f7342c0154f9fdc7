"""The life of a stack, from its first process to the removal of its last file."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from devstack import programs, rabbitmq, services, state
from devstack.console import Console
from devstack.processes import Process, free_port, stop, wait_until_ready
from devstack.project import Project
from devstack.state import StackError

PREPARE = "prepare"


class StoppedError(Exception):
    """Somebody asked for the end while the stack was starting."""


class Stack:
    """Everything that runs, what the terminal shows of it, and the files that tell others of it."""

    def __init__(self, project: Project, console: Console) -> None:
        """Take the folder of the project; raise StackError when a stack holds it."""
        self.project, self.folder, self.console = project, project.folder, console
        self.file, self.environment_file = files(project)
        self.signals = self.asked = 0
        self.terminated = False
        self.started: list[list[Process]] = []
        self.pids: dict[str, int] = {}
        self.urls: dict[str, str | None] = {"web": None}
        self.held = state.lock(self.folder)
        if not self.held:
            raise StackError(running_already(project))
        state.sweep(self.folder)
        for stale in (self.file, self.environment_file, *(self.folder / "log").glob("*.log")):
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
            self.console.starts(process.log)
            process.start()
        wait_until_ready(processes, self.tick_while_starting)
        for process in processes:
            self.console.is_ready(process.log)
        self.tick()

    def start_services(self) -> None:
        """Start database and broker, and tell the programs of the project where they are."""
        generated = self._development_defaults()
        os.environ.update(generated)
        rabbit = None
        if self.project.broker == "rabbitmq" and not os.environ.get("CELERY_BROKER_URL"):
            rabbit = rabbitmq.server()
            if not rabbit:
                self.console.say(
                    "RabbitMQ is not installed here (apt install rabbitmq-server, brew install"
                    " rabbitmq): the broker is Valkey"
                )
        found = services.prepare(self.folder, os.environ, rabbit=rabbit)
        self.start(found.processes)
        os.environ.update(found.environment)
        self.urls.update(database_url=found.database_url, broker_url=found.broker_url)
        lines = (f"{name}={value}\n" for name, value in (generated | found.environment).items())
        state.write_private(self.environment_file, "".join(lines))

    def prepare_database(self) -> None:
        """Migrate and make the admin."""
        prepare = self.inside(PREPARE, str(self.folder / "admin-password"))
        self.started.append([prepare])
        prepare.start()
        while prepare.running:
            self.tick_while_starting()
            time.sleep(0.02)
        if prepare.exit_code:
            raise StackError(f"the database could not be prepared:\n{prepare.last_lines()}")
        self.tick()
        self.started.pop()

    def inside(self, name: str, *arguments: str) -> Process:
        """Return a process that loads the project's code, and does what the arguments say."""
        return Process(
            name=name,
            command=[
                *(sys.executable, "-m", "devstack.inside"),
                *(str(self.project.root), self.project.celery, *arguments),
            ],
            log=self.folder / "log" / f"{name}.log",
            ready=lambda: False,
        )

    def start_programs(self) -> None:
        """Start everything else."""
        self.urls["web"] = self._url(self.project.web_port, 2)
        if self.has_flower:
            self.urls["flower"] = self._url(self.project.flower_port, 3)
        self.start(programs.all_programs(self.project, self.urls))

    def _url(self, wanted: int, number: int) -> str:
        port = free_port(wanted, services.own_port(self.folder, number))
        return f"http://127.0.0.1:{port}/"

    @property
    def has_flower(self) -> bool:
        """Tell whether Flower is wanted and installed."""
        return self.project.flower and programs.installed("flower")

    @property
    def processes(self) -> list[Process]:
        """Return all processes in the order of their start."""
        return [process for group in self.started for process in group]

    def tick(self) -> None:
        """Show what the programs have written, and keep the list of processes up to date."""
        self.console.follow(process.log for process in self.processes)
        here = {process.name: process.pid for process in self.processes if process.pid}
        # a process that is being restarted keeps its old pid until the new one is known
        pids = {name: pid for name, pid in (self.pids | here).items() if name != PREPARE}
        if pids != self.pids:
            self.pids = pids
            started = {process.popen.pid for process in self.processes if process.popen}
            state.record(self.folder, started.union(pids.values()))
            if self.file.exists():
                self.announce()

    def tick_while_starting(self) -> None:
        """Also give up as soon as somebody asks for the end."""
        self.tick()
        if self.signals:
            raise StoppedError

    def announce(self) -> None:
        """Tell other programs what runs where."""
        state.write_private(self.file, json.dumps({**self.urls, "processes": self.pids}, indent=2))

    def stop(self) -> None:
        """Stop everything, the last group first, and remove the files about it."""
        self.file.unlink(missing_ok=True)
        self.environment_file.unlink(missing_ok=True)
        self.asked = self.signals
        while self.started:
            group = self.started[-1][::-1]
            if running := [process.name for process in group if process.running]:
                self.console.say(f"stopping {', '.join(running)}")
            stop(group, self.tick_while_stopping)
            self.tick()
            self.started.pop()
        (self.folder / state.PIDS).unlink(missing_ok=True)

    def tick_while_stopping(self) -> bool:
        """Tell whether somebody asked for the end once more."""
        self.tick()
        before, self.asked = self.asked, self.signals
        return self.signals > before

    def _development_defaults(self) -> dict[str, str]:
        """Return what a fresh clone needs, and neither the environment nor `.env` gives."""
        # Called for what is missing alone: a file with a password that is not in force misleads.
        defaults: dict[str, Callable[[], str]] = {
            "DJANGO_DEBUG": lambda: "1",
            "DJANGO_SECRET_KEY": lambda: state.secret(self.folder / "secret-key"),
        }
        if self.has_flower:
            password = self.folder / "flower-password"
            defaults["FLOWER_BASIC_AUTH"] = lambda: f"dev:{state.secret(password)}"
            cookie = self.folder / "flower-cookie-secret"
            defaults["FLOWER_COOKIE_SECRET"] = lambda: state.secret(cookie)
        return {name: make() for name, make in defaults.items() if not os.environ.get(name)}


def files(project: Project) -> tuple[Path, Path]:
    """Return the files that a running stack writes: what runs where, and its environment."""
    return project.folder / "stack.json", project.folder / "env"


def running_already(project: Project) -> str:
    """Return one line about the stack that holds the lock."""
    file, _ = files(project)
    web = json.loads(file.read_text())["web"] if file.exists() else None
    pid = (project.folder / "lock").read_text().strip()
    return (
        f"the stack of this project is running already{f' at {web}' if web else ''}, as process"
        f" {pid}; end it with Ctrl-C in its terminal, or with: kill {pid}"
    )
