"""`devstack up` and `devstack run`."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import environ

from devstack.console import Console
from devstack.project import Project
from devstack.reload import Reloader
from devstack.runner import Stack, StoppedError, files
from devstack.state import StackError
from devstack.supervisor import Supervisor
from devstack.watch import Watch

TICK_SECONDS = 0.1


def up(project: Project, *, services_only: bool) -> int:
    """Run everything, or only database and broker, until Ctrl-C; return the exit code."""
    start, error = time.monotonic(), ""
    console = Console()
    stack = prepared(project, console)
    try:
        stack.start_services()
        watch = None
        if not services_only:
            stack.prepare_database()
            # what is saved while they start is news to them
            watch = Watch(project.root)
            stack.start_programs()
        stack.announce()
        console.say(f"ready after {time.monotonic() - start:.1f} s\n{welcome(stack)}")
        supervise(stack, watch)
    except StoppedError:
        pass
    except StackError as problem:
        error = str(problem)
    finally:
        stack.stop()
    # the very last lines, where they are seen
    console.say(error or "everything is stopped; the data stays in .dev")
    return 1 if error else 0


def run(project: Project, command: list[str]) -> int:
    """Run a command on the stack that is up, or on services of its own; return its exit code."""
    if not shutil.which(command[0]):
        raise StackError(f"{command[0]}: no such program")
    here = Path.cwd()
    try:
        stack = prepared(project, Console(sys.stderr))
    except StackError:
        _, environment = files(project)
        if not environment.exists():
            raise
        environ.Env.read_env(environment, overwrite=True)
        os.chdir(here)
        os.execvp(command[0], command)  # noqa: S606
    try:
        stack.start_services()
        if any(process.name == "postgres" for process in stack.processes):
            # ours, and maybe empty; a database of yours is migrated by `make up` or by you
            stack.prepare_database()
        stack.announce()
        return execute(command, here, stack)
    except StoppedError:
        return 130
    finally:
        stack.stop()


def prepared(project: Project, console: Console) -> Stack:
    """Return the stack of the project, with the environment of its `.env`."""
    os.chdir(project.root)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", project.settings)
    if (file := project.root / ".env").exists():
        # django-environ passes over a line that is none, and logs it with what may be a secret
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line.strip() and not re.match(r"#|(export )?\w+=", line):
                raise StackError(f"line {number} of {file} is not NAME=value")
        environ.Env.read_env(file)
    os.environ["PYTHONUNBUFFERED"] = "1"
    return Stack(project, console)


def execute(command: list[str], here: Path, stack: Stack) -> int:
    """Run a command in the foreground; it gets Ctrl-C from the terminal, and SIGTERM from here."""
    process = subprocess.Popen(command, cwd=here)
    while process.poll() is None:
        if stack.terminated:
            process.terminate()
        time.sleep(TICK_SECONDS)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def supervise(stack: Stack, watch: Watch | None) -> None:
    """Keep everything running until somebody asks for the end; reload when source changes."""
    supervisor, reloader = Supervisor(stack.processes, stack.console), None
    if watch:
        names = ("web", *stack.project.workers, *(["beat"] if stack.project.beat else []))
        reloader = Reloader(watch, stack.inside("check"), supervisor, names)
    while not stack.signals:
        time.sleep(TICK_SECONDS)
        if reloader:
            reloader.tick()
        supervisor.tick()
        stack.tick()
    if reloader:
        reloader.stop()


def welcome(stack: Stack) -> str:
    """Return where everything is, and how to see it work."""
    web, flower, project = stack.urls["web"], stack.urls.get("flower"), stack.project
    if not web:
        return (
            f"  Database  {stack.urls['database_url']}\n  Broker    {stack.urls['broker_url']}\n"
            f"  {project.folder / 'env'} names them while this runs;"
            " `devstack run -- COMMAND` reads it"
        )
    password = stack.folder / "admin-password"
    lines = [("Web", web), *((name, web + path) for name, path in project.links.items())]
    if password.exists():
        lines.append(("Login", f"admin / {password.read_text()}"))
    if flower:
        login = os.environ["FLOWER_BASIC_AUTH"].replace(":", " / ", 1)
        lines.append(("Flower", f"{flower}  {login}"))
    if project.task:
        shown = sys.executable.removeprefix(f"{project.root}{os.sep}")
        lines.append(("Run a task", f'\n    {shown} manage.py shell -c "{project.task}"'))
    lines.append(("Stop", "with Ctrl-C"))
    return "\n".join(f"  {name:<7} {what}" for name, what in lines)
