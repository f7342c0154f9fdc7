"""Put a release in the place of the one that runs, in the middle of the day, and lose nothing.

  deploy/deploy [SOURCE]       deploy the commit that is checked out in SOURCE, or here
  deploy/deploy --to RELEASE   deploy a release that is already there
  deploy/rollback              undo a deploy that stopped half-way, else go to the release before
  deploy/rollback --to RELEASE go to any that is there, whatever the one that runs has sent
  deploy/deploy init           make the user, the folders and the file of settings
  deploy/deploy status         which releases there are, and what runs
  deploy/manage COMMAND ...    manage.py of the current release, with its settings

Each step brings about a state, and does nothing where that is reached: a deploy that was killed is
finished by the same command, or undone by `rollback`. Workers of the new release start before those
of the old one end, so its tasks have to understand what the old one sends; that is checked before.

Exit codes: 0 done; 1 refused, what ran still runs; 2 wrong use; 3 the new release did not work, and
the one before runs again; 4 nor did that, see the output; 130 interrupted.
"""

import argparse
import fcntl
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rollout.change import Deploy, say
from rollout.on_compose import Compose
from rollout.on_systemd import Systemd
from rollout.releases import Releases, StepError
from rollout.source import RefusedError, must_be_checkout, wanted
from rollout.source import seconds

KEPT = 5


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


def deploy(platform: Releases, options: argparse.Namespace) -> int:
    """Build, check, migrate, change over, and go back when that fails; return the exit code."""
    running = platform.current()
    # First, as it says which name a release has to have so that new settings reach it.
    release, source, commit = wanted(platform, options)
    platform.check_settings()
    change = Deploy(platform, release, options.patience)
    if options.dry_run:
        return dry_run(change, options.gone, running)
    before = platform.begun()
    platform.begin("deploy of", release)
    try:
        build(platform, release, source, commit)
        platform.provide(release)
        change.check(running, options.gone)
        change.migrate()
    except (StepError, RefusedError, OSError) as error:
        if any(before):
            platform.begin(*before)
        else:
            platform.under_way.unlink()
        raise RefusedError(str(error)) from None
    try:
        change.change_over()
    except StepError as error:
        say(f"failed: {error}")
        if running is None:
            end_first(platform)
            return 4
        if running == release:
            say(f"{running} is the release that ran before, too: there is none to go back to")
            return 4
        say(f"going back to {running}")
        return go_back(Deploy(platform, running, options.patience), 3)
    platform.is_current(release)
    platform.under_way.unlink()
    say(f"done: {release} runs")
    try:
        platform.tidy(KEPT)
    except (StepError, OSError) as error:
        say(f"old releases could not be deleted: {error}")
    return 0


def dry_run(change: Deploy, gone: list[str], running: str | None) -> int:
    """Say what a deploy would do, and check the release if it is built; return the exit code."""
    release = change.release
    if release not in change.platform.built():
        say(
            f"would build {release}, check it, migrate, and change over from {running or 'nothing'}"
        )
        return 0
    change.check(running, gone)
    say("would migrate")
    change.plan()
    return 0


def end_first(platform: Releases) -> None:
    """End what a first release has started: there is none to go back to."""
    platform.close()
    platform.stop({role: platform.running(role) for role in platform.roles()})
    platform.under_way.unlink()
    say("it was the first release; what it had started has ended")


def go_back(change: Deploy, code: int) -> int:
    """Have an earlier release run again; return `code`, or 4 if it does not."""
    platform = change.platform
    try:
        change.change_over(back=True)
    except StepError as error:
        say(f"{change.release} does not work either: {error}")
        return 4
    platform.under_way.unlink(missing_ok=True)
    say(f"{change.release} runs again; the database keeps what was added to it")
    if platform.runs_with_other_settings(change.release):
        say(
            f"{platform.home}/env has changed since some of it started: what starts again reads the"
            " new one"
        )
    return code


def rollback(platform: Releases, options: argparse.Namespace) -> int:
    """Undo a deploy or finish a rollback that stopped half-way, else go to the release before.

    Return the exit code.
    """
    current = platform.current()
    if current is None and platform.under_way.exists() and not options.dry_run:
        end_first(platform)
        return 0
    if current is None:
        raise RefusedError("no deploy has succeeded yet: there is nothing to go back to")
    what, named = platform.begun()
    target = options.to or platform.previous()
    if options.to is None and (what == "rollback to" or named not in ("", current)):
        target = named if what == "rollback to" else current
        say(f"the {what} {named} stopped half-way: going to {target}")
    if target is None:
        raise RefusedError(
            f"no release is known to have run before {current}; `deploy/rollback --to RELEASE` goes"
            f" to one of those that are there: {', '.join(platform.built())}"
        )
    if target not in platform.built():
        raise RefusedError(
            f"there is no release {target}; there are: {', '.join(platform.built())}"
        )
    change = Deploy(platform, target, options.patience)
    try:
        change.ask(target, "check", stdin="{}")  # where this fails nothing could be started
    except StepError as error:
        raise RefusedError(f"{target} could not run now, so nothing was changed: {error}") from None
    if options.dry_run:
        say(f"would go back to {target}")
        change.plan()
        return 0
    platform.begin("rollback to", target)  # given again, this goes on to there
    platform.is_current(target, back=True)
    return go_back(change, 0)


def build(platform: Releases, release: str, source: Path, commit: str | None) -> None:
    """Build a release, unless it is there."""
    if release in platform.built():
        say(f"release {release} is already built")
    else:
        platform.build(source, release, commit)
        say(f"built release {release}")


def status(platform: Releases) -> int:
    """Say what there is and what runs; return the exit code."""
    for name in platform.built():
        words = [word for word in ("current", "previous") if getattr(platform, word)() == name]
        words += [] if platform.has_run(name) else ["never succeeded"]
        roles = [role for role in platform.roles() if name in platform.running(role)]
        print(f"{name}  {' '.join(words)}  {'runs ' + ', '.join(roles) if roles else ''}".rstrip())
        for role in platform.ailing(name):
            print(f"    {role} has crashed and is started again, and again")
        if name == platform.current():
            wanted = set(platform.roles(name)) - {"reconcile"}
            wanted -= set() if platform.wants_flower() else {"flower"}
            for role in sorted(wanted - set(roles)):
                print(f"    {role} does not run")
            if platform.runs_with_other_settings(name):
                print(f"    {platform.home}/env has changed since some of it started")
    what, release = platform.begun()
    if what:
        then = "or roll back" if what == "deploy of" else "or deploy"
        print(f"half-way: the {what} {release}; repeat it, {then}")
    elif platform.current() is None:
        print("nothing has been deployed yet")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--home", type=Path, metavar="DIR", help="/srv/<project>, in each command")
    change = argparse.ArgumentParser(add_help=False)
    change.add_argument(
        "--patience",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="to wait for a sign of life; 60",
    )
    change.add_argument("--dry-run", action="store_true", help="say what would be done")
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="deploy", description=__doc__, formatter_class=how)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    found = add("deploy", parents=[common, change], description=__doc__, formatter_class=how)
    found.add_argument("source", nargs="?", default=".", help="folder of a checkout; this one")
    found.add_argument("--name", help="of the release; else that of the commit")
    found.add_argument("--to", metavar="RELEASE", help="deploy a release that is already there")
    found.add_argument(
        "--gone",
        action="append",
        default=[],
        metavar="NAME",
        help="a task that nobody sends any more, or a queue to which nobody does",
    )
    back = add("rollback", parents=[common, change])
    back.add_argument("--to", metavar="RELEASE", help="one that is there; else the one before")
    add("status", parents=[common])
    made = add("init", parents=[common])
    made.add_argument("--compose", action="store_true", help="containers, not units of systemd")
    made.add_argument("--user", help="whom the processes run as; <project>")
    add("manage", parents=[common]).add_argument("words", nargs=argparse.REMAINDER)
    for name, command in commands.choices.items():
        words = "deploy " if name in ("init", "status") else ""
        command.prog = f"deploy/{words}{name}"
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[options.command].error(f"unknown: {' '.join(unknown)}")
    if options.command == "deploy" and options.to and options.name:
        parser.error("--to names a release that is there: it takes no --name")
    return options


def main(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    for place, word in enumerate(arguments[1:], 1):  # words of `deploy`, wherever they stand
        value = arguments[place - 1].startswith("--") and arguments[place - 1] != "--compose"
        if arguments[0] == "deploy" and word in ("init", "status") and not value:
            arguments = [word, *arguments[1:place], *arguments[place + 1 :]]
            break
    options = parse(arguments)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    os.umask(0o022)  # the processes' user has to read what is built here
    app = slug()
    home = (options.home or Path("/srv", app)).absolute()
    compose = (home / "compose").exists() or getattr(options, "compose", False)
    platform = (Compose if compose else Systemd)(app, home, getattr(options, "user", None))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        return carry_out(platform, options)
    except (RefusedError, StepError) as error:
        say(f"refused: {error}")
        return 1
    except OSError as error:  # a full disk, for one
        say(f"failed: {error}; the same command finishes it, `deploy/rollback` undoes it")
        return 4
    except KeyboardInterrupt:
        say("interrupted: the same command finishes it, `deploy/rollback` undoes it")
        return 130


def carry_out(platform: Releases, options: argparse.Namespace) -> int:
    """Run the command of these options; return its exit code."""
    if os.geteuid():
        raise RefusedError("it has to be root: units, folders and settings belong to the system")
    if options.command == "init":
        if options.compose and not (platform.home / "compose").exists() and platform.built():
            raise RefusedError(
                f"the releases in {platform.home} run with systemd; take another --home"
            )
        there = (platform.home / "env").exists()
        what = "is already there" if there else "is for you to fill"
        say(f"{platform.init()} {what}; then deploy")
        return 0
    if options.command == "deploy" and options.to is None:
        must_be_checkout(options.source)
    if not (platform.home / "env").is_file():
        where = f" --home {options.home}" if options.home else ""
        raise RefusedError(
            f"{platform.home}/env is not there: `deploy/deploy init{where}` makes it, fill it then"
        )
    if options.command == "status":
        return status(platform)
    if options.command == "manage":
        if (current := platform.current()) is None:
            raise RefusedError("no deploy has succeeded yet: there is no current release")
        return platform.attended(current, "manage.py", *options.words)
    with lock(platform.home):
        return (rollback if options.command == "rollback" else deploy)(platform, options)


def slug() -> str:
    """Return the project's name, as its config/project.py has it."""
    text = (Path(__file__).resolve().parent.parent / "config/project.py").read_text()
    found = re.search(r"^SLUG = ['\"](.+)['\"]", text, re.MULTILINE)
    return found[1] if found else Path(__file__).resolve().parent.parent.name


def interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
