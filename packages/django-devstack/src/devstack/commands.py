"""`python -m devstack up` and `python -m devstack run`."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import environ
import watchfiles

from devstack import project
from devstack.console import Console
from devstack.programs import ROOT
from devstack.runner import ENVIRONMENT, FOLDER, Stack, StoppedError
from devstack.state import StackError
from devstack.supervisor import Supervisor

RELOADED = ("web", "worker", "control", "beat")
TICK_MS = 100
NEW_FOLDERS_SECONDS = 1.0


def up(*, services_only: bool) -> int:
    """Run everything, or only database and broker, until Ctrl-C; return the exit code."""
    start, error = time.monotonic(), ""
    console = Console()
    stack = prepared(console)
    try:
        stack.start_services()
        if not services_only:
            stack.prepare_database()
            stack.start_programs()
        stack.announce()
        console.say(f"ready after {time.monotonic() - start:.1f} s\n{welcome(stack)}")
        supervise(stack, ticks() if not services_only else idle_ticks())
    except StoppedError:
        pass
    except StackError as problem:
        error = str(problem)
    finally:
        stack.stop()
    # the very last lines, where they are seen
    console.say(error or "everything is stopped; the data stays in .dev")
    return 1 if error else 0


def run(command: list[str]) -> int:
    """Run a command on the stack that is up, or on services of its own; return its exit code."""
    if not shutil.which(command[0]):
        raise StackError(f"{command[0]}: no such program")
    try:
        stack = prepared(Console(sys.stderr))
    except StackError:
        if not ENVIRONMENT.exists():
            raise
        environ.Env.read_env(ENVIRONMENT, overwrite=True)
        return execute(command, None)
    try:
        stack.start_services()
        if any(process.name == "postgres" for process in stack.processes):
            # ours, and maybe empty; a database of yours is migrated by `make up` or by you
            stack.prepare_database()
        stack.announce()
        return execute(command, stack)
    except StoppedError:
        return 130
    finally:
        stack.stop()


def prepared(console: Console) -> Stack:
    """Return the stack of this project, with the environment of its `.env`."""
    if (ROOT / ".env").exists():
        environ.Env.read_env(ROOT / ".env")
    os.environ["PYTHONUNBUFFERED"] = "1"
    return Stack(console)


def execute(command: list[str], stack: Stack | None) -> int:
    """Run a command in the foreground; it gets Ctrl-C from the terminal, and SIGTERM from here."""
    if not stack:
        os.execvp(command[0], command)  # noqa: S606
    process = subprocess.Popen(command)
    while process.poll() is None:
        if stack.terminated:
            process.terminate()
        time.sleep(TICK_MS / 1000)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def supervise(stack: Stack, changes: Iterator[set[Path]]) -> None:
    """Keep everything running until somebody asks for the end; reload when source changes."""
    supervisor = Supervisor(stack.processes, stack.console.say)
    for changed in changes:
        if stack.signals:
            return
        if changed:
            # templates are read by the web alone, which caches them
            code = any(path.suffix == ".py" for path in changed)
            names = RELOADED if code else ("web",)
            shown = ", ".join(sorted(str(path.relative_to(ROOT)) for path in changed)[:3])
            stack.console.say(f"{shown} changed: {', '.join(names)} start again")
            supervisor.reload(names)
        supervisor.tick()
        stack.tick()


def idle_ticks() -> Iterator[set[Path]]:
    """Yield nothing, many times a second."""
    while True:
        time.sleep(TICK_MS / 1000)
        yield set()


def ticks() -> Iterator[set[Path]]:
    """Yield the source files that changed, many times a second, also when there are none."""
    while True:
        folders = source_folders()
        looked = time.monotonic()
        for changes in watchfiles.watch(
            *folders,
            watch_filter=is_source,
            yield_on_timeout=True,
            rust_timeout=TICK_MS,
            debounce=400,
        ):
            yield {Path(path) for _, path in changes}
            if time.monotonic() > looked + NEW_FOLDERS_SECONDS:
                looked = time.monotonic()
                if new := source_folders() - folders:
                    # An app made meanwhile: its files are news, and it is watched from now on.
                    yield {path for folder in new for path in folder.rglob("*.py")}
                    break


def source_folders() -> set[Path]:
    """Return the folders of the project that hold code; a watch on `.venv` would be expensive."""
    folders = (folder for folder in ROOT.iterdir() if folder.is_dir() and is_source_name(folder))
    return {folder for folder in folders if any(folder.rglob("*.py"))}


def is_source(change: watchfiles.Change, path: str) -> bool:
    """Tell whether running programs are out of date after a change of this file."""
    parts = Path(path).relative_to(ROOT).parts
    return path.endswith((".py", ".html")) and all(is_source_name(Path(part)) for part in parts)


def is_source_name(path: Path) -> bool:
    """Tell hidden files of editors and tools, and what no program of the stack imports."""
    return not path.name.startswith(".") and path.name not in {"tests", "devstack", "node_modules"}


def welcome(stack: Stack) -> str:
    """Return where everything is, and how to see it work."""
    web, flower = stack.urls["web"], stack.urls.get("flower")
    if not web:
        return (
            f"  Database  {stack.urls['database_url']}\n  Broker    {stack.urls['broker_url']}\n"
            "  manage.py and every program of the project find them by themselves (.dev/env)"
        )
    password = FOLDER / "admin-password"
    login = f"admin / {password.read_text()}" if password.exists() else "with your own login"
    python = Path(sys.executable)
    shown = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    return "\n".join(
        [
            f"  Web     {web}",
            f"  Admin   {web}admin/  {login}",
            f"  Status  {web}status/  the same",
            f"  Flower  {flower}  {os.environ['FLOWER_BASIC_AUTH'].replace(':', ' / ', 1)}",
            "  Run a task:",
            f'    {shown} manage.py shell -c "{project.TASK}"',
            "  Stop with Ctrl-C",
        ]
    )
