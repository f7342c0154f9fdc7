"""Run a Celery worker, and stop it without losing work.

  hardened-celery worker -A APP [options below] [options of `celery worker`]
  hardened-celery check [-A APP] [-n NODE] [--workdir FOLDER] [--max-age SECONDS]
  hardened-celery check --heartbeat FILE [--max-age SECONDS]

`worker` runs `celery -A APP worker` with all other options, and stops it in three steps:

  SIGTERM, SIGINT or SIGHUP     tasks that run may end; no new ones are taken
  `margin` before `grace` ends  what still runs is handed back to the broker and starts again from
                                its beginning elsewhere; so does a second signal, or SIGQUIT
  `margin` later                whatever is left is killed, after it has written where it hangs; so
                                does a third signal

`check` exits with 1 when the main process of the worker hangs or is gone; a broker that is away
does not count. With the file of BEAT_HEARTBEAT_FILE it checks beat. The exit code of a worker is
Celery's own, or 128 + N when signal N ended it.
"""

# 60 s of grace: long enough for most tasks, shorter than systemd's 90 s. The 10 s of Docker and the
# 30 s of Kubernetes are not enough. Give them more than the grace.

import argparse
import importlib.util
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from hardened_celery import heartbeat_file, worker

FORMS = "say `hardened-celery worker -A APP` or `hardened-celery check`; --help says more"


class Parser(argparse.ArgumentParser):
    """Reads the command line; says in one line what is wrong with it."""

    def __init__(self, form: str) -> None:
        super().__init__(
            prog=f"hardened-celery {form}",
            usage=argparse.SUPPRESS,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add, environment = self.add_argument, os.environ.get
        text = "the Celery application; CELERY_APP"
        add("-A", "--app", default=environment("CELERY_APP"), metavar="APP", help=text)
        add("-n", "--hostname", dest="node", metavar="NODE", help="name of the worker, for Celery")
        text = "file that is touched while the worker is alive; WORKER_HEARTBEAT_FILE, or a file in"
        text += " memory that `check` finds when it is given the same -A, -n and folder"
        given = environment("WORKER_HEARTBEAT_FILE") or None
        add("--workdir", metavar="FOLDER", help="where the application is; here")
        add("--heartbeat", type=Path, metavar="FILE", default=given, help=text)

    def add_seconds(self, name: str, default: str, text: str, variable: str = "") -> None:
        if given := os.environ.get(variable):
            try:
                default = str(seconds(given))
            except argparse.ArgumentTypeError as error:
                self.error(f"{variable}: {error}")
        self.add_argument(f"--{name}", type=seconds, default=default, metavar="SECONDS", help=text)

    def heartbeat(self, options: argparse.Namespace) -> Path:
        """Return the file that was given, or the usual one of this worker."""
        usual = heartbeat_file.usual_place
        return options.heartbeat or usual(options.app, options.node, options.workdir)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")


def run_worker(arguments: list[str]) -> int:
    parser = Parser("worker")
    text = "for tasks that run at the end; WORKER_GRACE_SECONDS or 60"
    parser.add_seconds("grace", "60", text, "WORKER_GRACE_SECONDS")
    parser.add_seconds("margin", "10", "the end of the grace, to hand tasks back in; 10")
    text = "after which one that hangs ends; WORKER_HANG_SECONDS or 120"
    parser.add_seconds("hang", "120", text, "WORKER_HANG_SECONDS")
    parser.add_argument("-q", "--quiet", action="store_true", help="no banner at the start")
    parser.add_argument("-D", "--detach", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if not options.app:
        parser.error("name the Celery application with -A, as for `celery -A config worker`")
    if options.detach:
        parser.error("it stays in the foreground, for its supervisor; leave out --detach")
    if options.grace <= options.margin:
        parser.error(
            f"--grace ({options.grace:g}) must be more than --margin ({options.margin:g}):"
            " the margin is the end of the grace, in which tasks are handed back"
        )
    if not importlib.util.find_spec("celery"):
        parser.error(f"Celery is not installed for {sys.executable}; use the project's Python")
    heartbeat = parser.heartbeat(options).absolute()
    try:
        heartbeat_file.prepare(heartbeat, private=not options.heartbeat)
    except OSError as error:
        parser.error(f"no place for the heartbeat, choose one with --heartbeat: {error}")
    os.environ["WORKER_HANG_SECONDS"] = str(options.hang)  # liveness reads it
    node = ["-n", options.node] if options.node else []
    celery = ["--quiet"] if options.quiet else []
    celery += ["--workdir", options.workdir] if options.workdir else []
    command = [sys.executable, "-m", "hardened_celery.child", *celery, "-A", options.app]
    return worker.run([*command, "worker", *node, *rest], heartbeat, options.grace, options.margin)


def check(arguments: list[str]) -> int:
    parser = Parser("check")
    parser.add_seconds("max-age", "120", "how old the heartbeat may be; 120")
    options = parser.parse_args(arguments)
    if not options.app and not options.heartbeat:
        parser.error("name the application with -A (and -n) as for its worker, or use --heartbeat")
    return heartbeat_file.check(parser.heartbeat(options), options.max_age)


def main(arguments: list[str] | None = None) -> int:
    """Run the form that the first argument asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    match arguments[:1]:
        case ["worker"]:
            return run_worker(arguments[1:])
        case ["check"]:
            return check(arguments[1:])
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
    heartbeat_file.say(FORMS)
    return 2


if __name__ == "__main__":
    sys.exit(main())
