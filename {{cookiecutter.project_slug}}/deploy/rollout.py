"""Put a release in the place of the one that runs, in the middle of the day, and lose nothing.

  deploy/deploy [SOURCE] [--name RELEASE]   deploy the commit that is checked out in SOURCE, or here
  deploy/deploy --to RELEASE                go to a release that is already there
  deploy/rollback                           end a deploy half-way, or go back to the release before
  deploy/deploy init [--compose]            make the user, the folders and the file of settings;
                                            --compose: containers instead of units of systemd
  deploy/deploy status                      what runs, and what could run
  deploy/manage COMMAND ...                 manage.py of the current release, with its settings

Each step brings about a state, and does nothing where that is reached: a deploy that was killed is
finished by the same command, or undone by `rollback`. Workers of the new release start before those
of the old one end, so its tasks have to understand what the old one sends; `check` sees to that.

Exit codes: 0 done; 1 refused, the release that ran still runs; 2 wrong use; 3 the new release did
not work, and the one before runs again; 4 nor did that, see the output.
"""

import argparse
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from on_compose import Compose
from on_systemd import Systemd
from releases import Releases, StepError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
KEPT = 5
# Under these names others may mean something else.
RESERVED = ("current", "previous", "init", "status")


class RefusedError(Exception):
    """The deploy must not begin; the message says why, and what would be right."""


class Deploy:
    """A change from whatever runs to one release."""

    def __init__(self, platform: Releases, release: str, patience: float, gone: list[str]) -> None:
        """`patience`: seconds to wait for a sign of life; `gone`: tasks nobody sends any more."""
        self.platform = platform
        self.release = release
        self.patience = patience
        self.gone = gone

    def ask(self, release: str, *question: str, **more: Any) -> str:
        """Have a release answer one of the questions of `deploy/release.py`."""
        command = ("deploy/release.py", *question)
        return self.platform.inside(release, *command, **more)

    def check(self, running: str | None) -> None:
        """Raise StepError if the release could not run, or would break the one that runs."""
        inside = self.platform.inside
        inside(self.release, "manage.py", "check", "--deploy", "--fail-level", "ERROR")
        if running and running != self.release:
            others = self.ask(running, "tasks")
            say(self.ask(self.release, "check", *self.gone, stdin=others).strip())
            inside(
                self.release,
                "manage.py",
                "lintmigrations",
                "--unapplied-migrations",
                "--quiet",
                "ok",
                "ignore",
            )
        say("checked: settings, tasks, migrations")

    def migrate(self) -> None:
        """Apply the migrations, which add only; raise StepError if a lock cannot be had in time."""
        environment = {"PGOPTIONS": "-c lock_timeout=5s"}
        command = ("manage.py", "migrate", "--noinput")
        self.platform.inside(self.release, *command, alone=True, **environment)
        say("migrated")

    def change_over(self) -> None:
        """Have this release run, and no other; raise StepError when it gives no sign of life."""
        platform, release = self.platform, self.release
        platform.prepare(release)
        self.start(*workers(platform.roles(release)))
        self.ask(release, "workers", release, str(self.patience))
        say("its workers serve every queue")
        # For jobs whose time a worker kept that now ends, and those that come due without a beat.
        platform.start(release, "reconcile")
        self.end_others(*workers(platform.roles()))
        self.start("web")
        platform.wait_for_web(release, self.patience)
        say("its web answers")
        self.end_others("web")
        self.end_others("beat", "flower")
        self.start("beat", *(["flower"] if platform.wants_flower() else []))
        self.ask(release, "queues", release, str(self.patience))
        platform.stop({"reconcile": platform.running("reconcile")})
        say("it has answered a probe of every queue")

    def start(self, *roles: str) -> None:
        """Start these roles of the release; say which did not run already."""
        missing = [role for role in roles if self.release not in self.platform.running(role)]
        self.platform.start(self.release, *roles)
        if missing:
            say(f"started {', '.join(missing)}")

    def end_others(self, *roles: str) -> None:
        """End what other releases run in these roles, all at once, each within its own grace."""
        others = {
            role: found
            for role in roles
            if (found := [name for name in self.platform.running(role) if name != self.release])
        }
        if others:
            self.platform.stop(others)
            releases = sorted({name for found in others.values() for name in found})
            say(f"ended {', '.join(others)} of {', '.join(releases)}")


def workers(roles: list[str]) -> list[str]:
    """Return the roles that are not web, beat or Flower: workers, and what you have added."""
    return [role for role in roles if role not in ("web", "beat", "flower", "reconcile")]


BEGAN = time.monotonic()


def say(text: str) -> None:
    """Print a line, or several, with the seconds since the start."""
    for line in text.splitlines():
        print(f"{time.monotonic() - BEGAN:6.1f} s  {line}", flush=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of all deploys of this project; raise RefusedError when somebody else does."""
    with (folder / "deploy.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RefusedError(f"another deploy is under way: {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}: {' '.join(sys.argv[1:])}")
        file.flush()
        yield


def deploy(platform: Releases, change: Deploy) -> int:
    """Check, migrate, change over, and go back when that fails; return the exit code."""
    running = platform.current()
    platform.under_way.write_text(change.release)
    try:
        platform.provide(change.release)
        change.check(running)
        change.migrate()
    except StepError as error:
        platform.under_way.unlink()
        raise RefusedError(str(error)) from None
    try:
        change.change_over()
    except StepError as error:
        say(f"failed: {error}")
        if running in (None, change.release):
            say("there is no release to go back to")
            return 4
        return go_back(platform, Deploy(platform, running, change.patience, []))
    platform.is_current(change.release)
    platform.under_way.unlink()
    say(f"done: {change.release} runs")
    try:
        platform.tidy(KEPT)
    except StepError as error:
        say(f"old releases could not be deleted: {error}")
    return 0


def go_back(platform: Releases, change: Deploy) -> int:
    """Have an earlier release run again; return the exit code."""
    say(f"going back to {change.release}")
    try:
        change.change_over()
    except StepError as error:
        say(f"failed as well: {error}")
        return 4
    platform.under_way.unlink(missing_ok=True)
    say(f"{change.release} runs again; the database keeps what was added to it")
    return 3


def rollback(platform: Releases, patience: float) -> int:
    """Undo a deploy that stopped half-way, else go to the release before; return the exit code."""
    current = platform.current()
    if current is None:
        raise RefusedError("no deploy has succeeded yet: there is nothing to go back to")
    half_way = platform.under_way.exists()
    target = current if half_way else platform.previous()
    if target is None:
        raise RefusedError(f"{current} is the first release: there is none before it")
    code = go_back(platform, Deploy(platform, target, patience, []))
    if code == 3:
        platform.is_current(target)
        return 0
    return code


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", default=".", help="a checkout, `init` or `status`")
    parser.add_argument("--name", help="of the release; else that of the commit")
    parser.add_argument("--to", metavar="RELEASE", help="deploy a release that is already there")
    parser.add_argument("--gone", action="append", default=[], metavar="TASK")
    parser.add_argument("--home", type=Path, metavar="DIR", help="/srv/<project>")
    parser.add_argument("--user", help="whom the processes run as; <project>")
    parser.add_argument("--compose", action="store_true", help="with `init`: containers")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS", help="60")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--rollback", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--manage", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def commit_of(source: Path) -> str | None:
    """Return the commit checked out in a folder, None where git does not know it.

    Raises RefusedError when the folder holds changes that the commit does not.
    """
    git = ["git", "-C", str(source)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return None
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if changes.stdout:
        raise RefusedError(f"commit these changes first, or stash them:\n{changes.stdout.rstrip()}")
    return found.stdout.strip()


def build(platform: Releases, options: argparse.Namespace) -> str:
    """Build what the command line asks for, unless it is there; return the release's name."""
    if options.to:
        if options.to not in platform.built():
            there = ", ".join(platform.built()) or "none"
            raise RefusedError(f"there is no release {options.to}; there are: {there}")
        return str(options.to)
    source = Path(options.source).resolve()
    if not (source / "manage.py").is_file():
        raise RefusedError(f"{source} is not a checkout of the project: it has no manage.py")
    if not (source / "uv.lock").is_file():
        raise RefusedError("there is no uv.lock: commit it, so that each build installs the same")
    commit = commit_of(source)
    release = options.name or (commit or "")[:12]
    if not release:
        raise RefusedError(f"{source} is no git checkout: name the release with --name")
    if not NAME.fullmatch(release) or release in RESERVED:
        raise RefusedError(
            f"{release!r} is no name for a release: letters, digits, `.`, `_` and `-`"
        )
    if release in platform.built():
        say(f"release {release} is already built")
    elif not options.dry_run:
        platform.build(source, release, commit)
        say(f"built release {release}")
    return release


def plan(platform: Releases, release: str) -> None:
    """Say what a deploy of this release would do."""
    built = release in platform.built()
    roles = platform.roles(release) if built else sorted(platform.roles())
    say(f"release {release} {'is built' if built else 'would be built'}, checked, and migrated to")
    for role in roles:
        ended = [name for name in platform.running(role) if name != release]
        say(f"{role}: would start, and end {', '.join(ended) or 'none'}")


def status(platform: Releases) -> int:
    """Say what runs; return the exit code."""
    for name in platform.built():
        words = [word for word in ("current", "previous") if getattr(platform, word)() == name]
        roles = [role for role in platform.roles() if name in platform.running(role)]
        print(f"{name}  {' '.join(words)}  {'runs ' + ', '.join(roles) if roles else ''}".rstrip())
    return 0


def main(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    options = parse(arguments)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    app = slug()
    home = options.home or Path("/srv", app)
    kind = Compose if options.compose or (home / "compose").exists() else Systemd
    platform = kind(app, home, options.user or app)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        if os.geteuid():
            raise RefusedError("it has to be root: units and folders belong to the system")
        if options.source == "init":
            say(f"fill {platform.init()}, then deploy")
            return 0
        if options.source == "status":
            return status(platform)
        if not (home / "env").is_file():
            raise RefusedError(
                f"{home}/env is not there: `deploy/deploy init` makes it, for you to fill"
            )
        if options.manage is not None:
            if (current := platform.current()) is None:
                raise RefusedError("no deploy has succeeded yet: there is no current release")
            return platform.attended(current, "manage.py", *options.manage)
        with lock(home):
            if options.rollback:
                return rollback(platform, options.patience)
            release = build(platform, options)
            if options.dry_run:
                plan(platform, release)
                return 0
            return deploy(platform, Deploy(platform, release, options.patience, options.gone))
    except RefusedError as error:
        say(f"refused: {error}")
        return 1
    except StepError as error:
        say(f"refused, nothing has changed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: the same command finishes it, `deploy/rollback` undoes it")
        return 130


def slug() -> str:
    """Return the project's name, as its config/project.py has it."""
    text = (Path(__file__).resolve().parent.parent / "config/project.py").read_text()
    found = re.search(r"^SLUG = ['\"](.+)['\"]", text, re.MULTILINE)
    return found[1] if found else Path(__file__).resolve().parent.parent.name


def interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
