"""Run a Celery worker, and stop it without losing work.

  hardened-celery worker -A APP [--grace SECONDS] [--margin SECONDS] [--hang SECONDS]
                         [--heartbeat FILE] [worker options]
  hardened-celery check [-n NODE] [--heartbeat FILE] [--max-age SECONDS]

The first form passes all other options to `celery -A APP worker`. It stops in three steps:

  SIGTERM, SIGINT or SIGHUP     tasks that run may end; no new ones are taken
  `margin` before `grace` ends  what still runs is handed back to the broker and starts again from
                                its beginning elsewhere; so does a second signal, or SIGQUIT
  `margin` later                whatever is left is killed, after it has written where it hangs; so
                                does a third signal

`check` exits with 1 when the main process of the worker hangs or is gone; a broker that is away
does not count. With the file of BEAT_HEARTBEAT_FILE it checks beat. The exit code of a worker is
Celery's own, or 128 + N when signal N ended it.
"""

# Celery gets a session of its own, so that a signal to our process group (Ctrl-C in a terminal, a
# supervisor that signals groups) never reaches its pool processes: they would drop their tasks.
#
# 60 s of grace: long enough for most tasks, shorter than systemd's 90 s. The 10 s of Docker and the
# 30 s of Kubernetes are not enough. Give them more than the grace: when they kill before its end,
# what ran comes back only after the visibility timeout. A task that is acknowledged before it runs
# (acks_late=False) cannot be handed back; it is lost.

import argparse
import ctypes
import importlib.util
import math
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PROJECT = Path.cwd()
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # Celery's: print all stacks, open the debugger
RUNNING, WARM, COLD, STUCK, KILLED = range(5)
# One wish may arrive twice: from the terminal, and from a runner that the terminal signalled too.
SAME_WISH_SECONDS = 0.5
PR_SET_PDEATHSIG = 1


class Stop:
    """How far a Celery main process has been asked to stop."""

    def __init__(self, pid: int, grace: float, margin: float) -> None:
        """`pid` leads a session and process group of its own."""
        self.pid = pid
        last = min(2, margin / 4)  # enough to write where it hangs
        self.patience = {WARM: grace - margin, COLD: margin - last, STUCK: last, KILLED: math.inf}
        self.stage = RUNNING
        self.since = -math.inf
        self.deadline = math.inf

    def ask(self, stage: int, why: str) -> None:
        """Go to a stage and send what belongs to it."""
        self.stage = min(stage, KILLED)
        self.since = time.monotonic()
        self.deadline = self.since + self.patience[self.stage]
        number, wish = {
            WARM: (signal.SIGTERM, f"running tasks may end, for {self.patience[WARM]:g} s"),
            COLD: (signal.SIGQUIT, "handing back what still runs"),
            STUCK: (signal.SIGUSR1, "it does not end; this is where it hangs"),
            KILLED: (signal.SIGKILL, "killing the worker"),
        }[self.stage]
        say(f"{why}: {wish}")
        send = os.killpg if self.stage == KILLED else os.kill
        with suppress(ProcessLookupError):
            send(self.pid, number)

    def on_signal(self, number: int) -> None:
        """Do what somebody who signals the launcher wants."""
        name = signal.Signals(number).name
        if number in PASSED_ON:
            os.kill(self.pid, number)
        elif number == signal.SIGQUIT:
            self.ask(KILLED if self.stage >= COLD else COLD, name)
        elif number in STOP and time.monotonic() > self.since + SAME_WISH_SECONDS:
            self.ask(KILLED if self.stage >= COLD else self.stage + 1, name)

    def on_time(self) -> None:
        """Go on when this stage has taken too long."""
        if time.monotonic() >= self.deadline:
            self.ask(self.stage + 1, "time is up")


def say(line: str) -> None:
    """Write a line to the log of the supervisor, or nowhere when the terminal has been closed."""
    with suppress(OSError):
        os.write(2, f"worker: {line}\n".encode())


def supervise(pid: int, wake: int, grace: float, margin: float) -> int:
    """Pass on the wish to stop until process `pid` ends; return how it ended, -N for signal N.

    The numbers of arriving signals can be read from `wake`: one loop, and no code in handlers.
    """
    stop = Stop(pid, grace, margin)
    while (code := reap(pid)) is None:
        left = max(stop.deadline - time.monotonic(), 0)
        select.select([wake], [], [], None if left == math.inf else left)
        with suppress(BlockingIOError):
            for number in os.read(wake, 64):
                stop.on_signal(number)
        stop.on_time()
    return code


def reap(pid: int) -> int | None:
    """Return how a child ended, or None; bury all others, which come to us when we are PID 1."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)
        if ended == 0:
            return None


def wake_on_signals() -> int:
    """Return a descriptor from which the numbers of signals can be read as they arrive."""
    wake, writer = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (*STOP, *PASSED_ON, signal.SIGQUIT, signal.SIGCHLD):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: None)
    return wake


def die_with_us() -> Callable[[], None] | None:
    """Return what the child does first: have the kernel send it SIGTERM when we die (Linux only).

    Not SIGQUIT: whoever replaces this worker is not waiting for it, so its tasks may end, and their
    time limits see to it that they do.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    launcher = os.getpid()

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # we died before the call
            os._exit(1)

    return before_exec


def run(celery: list[str], heartbeat: Path, grace: float, margin: float) -> int:
    """Run Celery until it ends; return the exit code."""
    wake = wake_on_signals()
    process = subprocess.Popen(
        celery,
        env={**os.environ, "WORKER_HEARTBEAT_FILE": str(heartbeat)},
        cwd=PROJECT,
        start_new_session=True,
        preexec_fn=die_with_us(),
    )
    process.returncode = supervise(process.pid, wake, grace, margin)
    # Where the kernel does not see to it, pool processes outlive a main process that crashed.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    remove(heartbeat)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def default_heartbeat(node: str | None) -> Path:
    """Return the heartbeat file of a node of this project: private, and in memory if possible."""
    memory = Path("/dev/shm")  # noqa: S108
    base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    name = zlib.crc32(f"{PROJECT} {node}".encode())
    return base / f"celery-worker-{os.getuid()}" / f"{name:08x}"


def prepare(heartbeat: Path, *, private: bool) -> None:
    """Raise OSError unless we can write the file, `private`: in a folder that is ours alone."""
    folder = heartbeat.parent
    if private:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # anybody may have made a folder of this name, to make us write through a link in it
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(f"{folder} is not private")
    heartbeat.touch()
    remove(heartbeat)


def remove(heartbeat: Path) -> None:
    """Remove the heartbeat, and the file beside it that says that the worker was ready."""
    for file in (heartbeat, Path(f"{heartbeat}.ready")):
        file.unlink(missing_ok=True)


def check(heartbeat: Path, max_age: float) -> int:
    """Say how old the heartbeat is; return 0 if it is young enough, else 1."""
    try:
        age = time.time() - heartbeat.stat().st_mtime
    except OSError as error:
        say(f"no heartbeat, it does not run or is still starting: {error}")
        return 1
    state = "hangs or is gone" if age > max_age else "lives"
    say(f"it {state}: the heartbeat is {age:.0f} s old, {max_age:g} s allowed: {heartbeat}")
    return int(age > max_age)


class Parser(argparse.ArgumentParser):
    """Reads the command line; says in one line what is wrong with it."""

    def __init__(self) -> None:
        """Define what both forms understand."""
        super().__init__(
            prog="worker",
            usage=argparse.SUPPRESS,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--heartbeat",
            type=Path,
            metavar="FILE",
            default=os.environ.get("WORKER_HEARTBEAT_FILE") or None,
            help="file that is touched while the worker is alive; WORKER_HEARTBEAT_FILE, or a file"
            " in memory that `check` finds when it is given the same -n",
        )
        self.add_argument(
            "-n", "--hostname", dest="node", metavar="NODE", help="name of the worker, for Celery"
        )

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"worker: {message}\n")


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")


def check_command(arguments: list[str]) -> int:
    """Run `check`; return the exit code."""
    parser = Parser()
    parser.add_argument("--max-age", type=seconds, default=120.0, metavar="SECONDS", help="120")
    options = parser.parse_args(arguments)
    return check(options.heartbeat or default_heartbeat(options.node), options.max_age)


def worker_command(arguments: list[str]) -> int:
    """Run a worker; return the exit code."""
    parser = Parser()
    grace = os.environ.get("WORKER_GRACE_SECONDS") or "60"
    parser.add_argument(
        "--grace", type=seconds, default=grace, metavar="SECONDS", help="WORKER_GRACE_SECONDS or 60"
    )
    hang = os.environ.get("WORKER_HANG_SECONDS") or "120"
    parser.add_argument(
        "--hang", type=seconds, default=hang, metavar="SECONDS", help="WORKER_HANG_SECONDS or 120"
    )
    parser.add_argument(
        "-A", "--app", default=os.environ.get("CELERY_APP"), metavar="APP", help="or CELERY_APP"
    )
    parser.add_argument("--margin", type=seconds, default=10.0, metavar="SECONDS", help="10")
    options, rest = parser.parse_known_args(arguments)
    if not options.app:
        parser.error("name the Celery application with -A, as for `celery -A config worker`")
    if options.grace <= options.margin:
        parser.error(
            f"--grace ({options.grace:g}) must be more than --margin ({options.margin:g}):"
            " the margin is the end of the grace, in which tasks are handed back"
        )
    if not importlib.util.find_spec("celery"):
        parser.error(f"Celery is not installed for {sys.executable}; use the project's Python")
    heartbeat = options.heartbeat or default_heartbeat(options.node)
    try:
        prepare(heartbeat, private=not options.heartbeat)
    except OSError as error:
        parser.error(f"no place for the heartbeat, choose one with --heartbeat: {error}")
    os.environ["WORKER_HANG_SECONDS"] = str(options.hang)  # config/liveness.py reads it
    node = ["-n", options.node] if options.node else []
    celery = [sys.executable, "-m", "celery", "-A", options.app, "worker", *node, *rest]
    return run(celery, heartbeat.absolute(), options.grace, options.margin)


def main(arguments: list[str] | None = None) -> int:
    """Run the form that the first argument asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    match arguments[:1]:
        case ["worker"]:
            return worker_command(arguments[1:])
        case ["check"]:
            return check_command(arguments[1:])
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
    say("say `hardened-celery worker -A APP` or `hardened-celery check`; --help says more")
    return 2


if __name__ == "__main__":
    sys.exit(main())
