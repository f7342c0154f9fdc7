"""Put a release in the place of the one that runs, in the middle of the day, and lose nothing.

  rollout deploy [SOURCE]       deploy the commit that is checked out in SOURCE, or here
  rollout deploy --to RELEASE   deploy a release that is already there
  rollout rollback              undo a deploy that stopped half-way, else go to the release before
  rollout rollback --to RELEASE go to any that is there, whatever the one that runs has sent
  rollout deploy init           make the user, the folders and the file of settings
  rollout deploy status         which releases there are, and what runs
  rollout manage COMMAND ...    manage.py of the current release, with its settings

In a project of the template: deploy/deploy, deploy/rollback and deploy/manage.

Each step brings about a state, and does nothing where that is reached: a deploy that was killed is
finished by the same command, or undone by `rollback`. Workers of the new release start before those
of the old one end, so its tasks have to understand what the old one sends; that is checked before.

Exit codes: 0 done; 1 refused, what ran still runs; 2 wrong use; 3 the new release did not work, and
the one before runs again; 4 nor did that, see the output; 130 interrupted.
"""

import argparse
import fcntl
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from rollout.commands import deploy, rollback, status
from rollout.compose import Compose
from rollout.platform import Platform
from rollout.shell import RefusedError, StepError, say
from rollout.source import app_name
from rollout.systemd import Systemd

AGAIN = "the same command finishes it, `rollback` undoes it"


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; `init` and `status` are commands, too, and not sources."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=Path, metavar="DIR", help="/srv/<project>, in each command")
    change = argparse.ArgumentParser(add_help=False)
    add = change.add_argument
    patience = "to wait for a sign of life; 60"
    add("--patience", type=seconds, default=60.0, metavar="SECONDS", help=patience)
    add("--dry-run", action="store_true", help="build and check, start nothing")
    add("--to", metavar="RELEASE", help="one that is there; of `rollback` else the one before")
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="rollout", description=__doc__, formatter_class=how)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    found = commands.add_parser(
        "deploy", parents=[common, change], description=__doc__, formatter_class=how
    )
    add = found.add_argument
    add("source", nargs="?", default=".", help="folder of a checkout, this one; `init`; `status`")
    add("--name", help="of the release; else that of the commit")
    gone = "a task that nobody sends any more, or a queue to which nobody does"
    add("--gone", action="append", default=[], metavar="NAME", help=gone)
    add("--compose", action="store_true", help="of init: containers, not units of systemd")
    add("--user", help="of init: whom the processes run as; <project>")
    commands.add_parser("rollback", parents=[common, change])
    manage = commands.add_parser("manage", parents=[common])
    manage.add_argument("words", nargs=argparse.REMAINDER)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[options.command].error(f"unknown: {' '.join(unknown)}")
    if options.command == "deploy" and options.source in ("init", "status"):
        options.command = options.source
    elif options.command == "deploy" and options.to and options.name:
        found.error("--to names a release that is there: it takes no --name")
    if options.command in ("deploy", "status") and (options.compose or options.user):
        found.error("--compose and --user belong to init")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    os.environ.pop("PYTHONPATH", None)  # the way to this engine is no way to a release's
    os.umask(0o022)  # the processes' user has to read what is built here
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        return carry_out(options)
    except (RefusedError, StepError) as error:
        say(f"refused: {error}")
        return 1
    except OSError as error:  # a full disk, for one
        say(f"failed: {error}; {AGAIN}")
        return 4
    except KeyboardInterrupt:
        say(f"interrupted: {AGAIN}")
        return 130


def carry_out(options: argparse.Namespace) -> int:
    """Run the command of these options; return its exit code."""
    app = app_name(Path(os.environ.get("ROLLOUT_PROJECT", ".")))
    home = (options.home or Path("/srv", app)).absolute()
    compose = (home / "compose").exists() or getattr(options, "compose", False)
    platform = (Compose if compose else Systemd)(app, home, getattr(options, "user", None))
    if os.geteuid():
        raise RefusedError("it has to be root: units, folders and settings belong to the system")
    if options.command == "init":
        return init(platform, options)
    if not platform.env.is_file():
        raise RefusedError(f"{platform.env} is not there: `deploy init` makes it, fill it then")
    if options.command == "status":
        return status(platform)
    if options.command == "manage":
        if (current := platform.current()) is None:
            raise RefusedError("no deploy has succeeded yet: there is no current release")
        return platform.attended(current, "manage.py", *options.words)
    with lock(home):
        return (rollback if options.command == "rollback" else deploy)(platform, options)


def init(platform: Platform, options: argparse.Namespace) -> int:
    """Make what a first deploy needs; return the exit code."""
    if options.compose and not (platform.home / "compose").exists() and platform.built():
        raise RefusedError(f"the releases in {platform.home} run with systemd; take another --home")
    what = "is already there" if platform.env.exists() else "is for you to fill"
    say(f"{platform.init()} {what}; then deploy")
    return 0


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
        file.write(f"process {os.getpid()}, {' '.join(sys.argv[1:])}")
        file.flush()
        yield


def interrupted(*_: object) -> NoReturn:
    """Unwind, so that what is half-way is said and cleared."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
