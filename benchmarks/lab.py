"""The laboratory: a baked project, its services, and one environment for each library measured.

Everything it starts dies with it: it is a child of ours that gets a signal when we end.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import psycopg
from cookiecutter.main import cookiecutter

TEMPLATE = Path(__file__).resolve().parent.parent
BUILD = TEMPLATE / "build" / "bench"
PROJECT = BUILD / "my_project"
PEERS = BUILD / "peers"
INSIDE = Path(__file__).resolve().parent / "inside"
STOP_SECONDS = 20
CELERY = ("-m", "celery", "-A")
# No greeting of neighbours, and no new process every 500 tasks: neither is what is measured.
WORKER = (
    *("worker", "-c", "2", "-Q", "default", "-l", "warning"),
    *("--without-mingle", "--without-gossip", "--max-tasks-per-child", "1000000"),
)


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True)
class Arm:
    """One way to run jobs: its environment, its module in `inside/`, its worker's commands."""

    name: str
    module: str
    workers: tuple[tuple[str, ...], ...]
    peer_apps: str = ""
    number: int = 0

    @property
    def database(self) -> str:
        return f"bench_{self.number}"

    @property
    def python(self) -> Path:
        return (PEERS if self.peer_apps else PROJECT / ".venv") / "bin" / "python"


def _celery(module: str) -> tuple[str, ...]:
    return (*CELERY, module, *WORKER)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("ours", "arm_ours", (_celery("arm_ours"),), number=0),
        Arm("plain", "arm_plain", (_celery("arm_plain"),), number=1),
        Arm(
            "procrastinate",
            "arm_procrastinate",
            # two processes with one job each: its own concurrency shares one core
            (("-m", "django", "procrastinate", "worker", "--concurrency", "1"),) * 2,
            peer_apps="procrastinate.contrib.django",
            number=2,
        ),
        Arm(
            "potatoq-pg",
            "arm_potatoq",
            (("-m", "potatoq", "worker", "-c", "2", "-l", "WARNING"),),
            peer_apps="potatoq.contrib.django",
            number=3,
        ),
        Arm(
            "outbox",
            "arm_outbox",
            (_celery("arm_outbox"), ("-m", "django", "celery_outbox_relay")),
            peer_apps="django_celery_outbox",
            number=4,
        ),
    )
}


def run(*command: str | Path, cwd: Path = TEMPLATE) -> str:
    """Run a command and return its output; raise BenchError with its end if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=_clean(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise BenchError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def _clean() -> dict[str, str]:
    """Return our environment without what would reach into the programs measured."""
    ours = ("DATABASE_URL", "CELERY_", "DJANGO_", "VIRTUAL_ENV", "MAKE", "PYTHON", "POTATOQ")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@contextmanager
def alone() -> Iterator[None]:
    """Hold the build folder: two runs at once would measure each other."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BenchError(f"another benchmark runs in {BUILD}") from error
        yield


def bake(*, peers: bool) -> None:
    """Generate the project and install it; with `peers`, the libraries beside it too."""
    for path in PROJECT.glob("*"):  # hidden ones stay: the environment is slow to make
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    cookiecutter(str(TEMPLATE), no_input=True, output_dir=str(BUILD), overwrite_if_exists=True)
    run("make", ".venv/.installed", cwd=PROJECT)
    if not peers:
        return
    uv = shutil.which("uv") or TEMPLATE / ".tools" / "bin" / "uv"
    if not (PEERS / "bin" / "python").exists():
        run(uv, "venv", "--quiet", "-p", PROJECT / ".venv" / "bin" / "python", PEERS, cwd=BUILD)
    install = (uv, "pip", "install", "--quiet", "--python", PEERS / "bin" / "python")
    run(*install, "-r", INSIDE / "peers.txt", cwd=BUILD)


class Talker:
    """A process that answers one JSON line for each line it gets."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log

    def read(self) -> Any:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise BenchError(f"{self.log.name} ended:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def say(self, text: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.read()

    def __call__(self, do: str, **arguments: Any) -> Any:
        answer = self.say(json.dumps({"do": do, **arguments}))
        if "error" in answer:
            raise BenchError(f"{self.log.stem}: {do}: {answer['error']}")
        return answer["is"]


@dataclass
class Lab:
    """The running services, and what is needed to start programs on them."""

    environment: dict[str, str]
    services: Talker
    arms: list[Arm]
    sockets: Path  # short: the path of a socket may not have more than 100 characters
    drivers: dict[str, Talker] = field(default_factory=dict)
    cleanup: list[subprocess.Popen[str]] = field(default_factory=list)

    def database(self, arm: Arm) -> str:
        url = urllib.parse.urlsplit(self.environment["DATABASE_URL"])
        return url._replace(path=f"/{arm.database}").geturl()

    def broker(self, arm: Arm) -> str:
        return self.environment["CELERY_BROKER_URL"].removesuffix("/0") + f"/{arm.number}"

    def settings(self, arm: Arm) -> dict[str, str]:
        """Return the environment of an arm's programs."""
        ours = {"BENCH_SOCKET": str(self.sockets / arm.database), "DJANGO_LOG_LEVEL": "WARNING"}
        path = os.pathsep.join([str(INSIDE), *([] if arm.peer_apps else [str(PROJECT)])])
        ours |= {"DATABASE_URL": self.database(arm), "PYTHONPATH": path}
        if arm.peer_apps:
            # not as CELERY_BROKER_URL, which potatoq would obey
            ours |= {"BENCH_BROKER_URL": self.broker(arm), "ARM_APPS": arm.peer_apps}
            ours["DJANGO_SETTINGS_MODULE"] = "peer_settings"
        else:
            ours |= {"CELERY_BROKER_URL": self.broker(arm), "DJANGO_SECRET_KEY": "bench"}
            ours["DJANGO_SETTINGS_MODULE"] = "config.settings"
        return _clean() | ours

    def spawn(self, arm: Arm, name: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
        """Start a Python program of an arm, in a session of its own."""
        talks = name.startswith("driver")
        environment = self.settings(arm) | more
        process = _spawn(arm.python, name, *arguments, environment=environment, talks=talks)
        self.cleanup.append(process)
        return process

    def driver(self, arm: Arm, **more: str) -> Talker:
        """Start a driver; the caller ends it."""
        log = _log(f"driver-{arm.name}")
        program = (str(INSIDE / "driver.py"), arm.module)
        talker = Talker(self.spawn(arm, log.stem, *program, **more), log)
        talker("migrate")
        return talker

    def __getitem__(self, arm: Arm) -> Talker:
        """Return the arm's warm driver."""
        if arm.name not in self.drivers:
            self.drivers[arm.name] = self.driver(arm)
        return self.drivers[arm.name]

    def clear(self, arm: Arm) -> None:
        """Empty the arm's tables and its part of the broker."""
        self[arm]("settle")
        self[arm]("clear")
        self.ask_broker(arm, "flushdb()")

    def ask_broker(self, arm: Arm, call: str) -> str:
        """Return what a method of the Redis client says about the arm's part of the broker."""
        code = f"import redis; print(redis.Redis.from_url({self.broker(arm)!r}).{call})"
        return run(ARMS["plain"].python, "-c", code)

    @contextmanager
    def workers(self, arm: Arm, **more: str) -> Iterator[list[subprocess.Popen[str]]]:
        """Run the arm's workers for the length of a `with` block."""
        running = [
            self.spawn(arm, f"worker-{arm.name}-{number}", *command, **more)
            for number, command in enumerate(arm.workers)
        ]
        try:
            yield running
        finally:
            stop(running)


def _log(name: str) -> Path:
    (BUILD / "log").mkdir(exist_ok=True)
    return BUILD / "log" / f"{name}.log"


def _spawn(
    python: Path, name: str, *arguments: str, environment: dict[str, str], talks: bool
) -> subprocess.Popen[str]:
    # the kernel ends it when we are killed
    child = PROJECT / "packages/django-devstack/src/devstack/child.py"
    with _log(name).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-IS", child, "15", str(os.getpid()), str(python), *arguments],
            stdin=PIPE,
            stdout=PIPE if talks else log,
            stderr=log,
            text=True,
            env=environment,
            cwd=BUILD,
            start_new_session=True,
        )


def stop(processes: list[subprocess.Popen[str]]) -> None:
    """Ask them to stop, and end what is too slow, with its children."""
    trees = {process: tree(process) for process in processes if process.poll() is None}
    for process in trees:
        process.terminate()
    for process, members in trees.items():
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            kill(members)
    for process in processes:
        process.wait(STOP_SECONDS)
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return a process and all below it."""
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(members: list[psutil.Process]) -> None:
    """SIGKILL all at once, as the loss of a machine does, and wait until they are gone."""
    for member in members:
        if member.is_running():
            member.kill()
    psutil.wait_procs(members, STOP_SECONDS)


def cpu_seconds(processes: list[subprocess.Popen[str]]) -> float:
    """Return the processor time their trees have used so far."""
    total = 0.0
    for process in processes:
        for member in tree(process):
            times = member.cpu_times()
            total += times.user + times.system
    return total


@contextmanager
def running(arms: list[Arm]) -> Iterator[Lab]:
    """Run the services, with an empty database for each arm."""
    for state in ("postgres", "valkey"):
        shutil.rmtree(BUILD / "services" / state, ignore_errors=True)
    folder, environment = BUILD / "services", _clean() | {"PYTHONPATH": str(PROJECT)}
    program = (str(INSIDE / "services.py"), str(folder))
    process = _spawn(ARMS["ours"].python, "services", *program, environment=environment, talks=True)
    talker = Talker(process, _log("services"))
    sockets = tempfile.mkdtemp(prefix="bench-")
    lab: Lab | None = None
    try:
        lab = Lab(talker.read(), talker, arms, Path(sockets))
        with psycopg.connect(lab.environment["DATABASE_URL"], autocommit=True) as connection:
            for arm in arms:
                connection.execute(f"CREATE DATABASE {arm.database}")
        yield lab
    finally:
        if lab:
            stop(lab.cleanup)
        shutil.rmtree(sockets)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def wait_until(what: str, seconds: float, look: Any) -> Any:
    """Return the first true value of `look`; raise BenchError if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := look():
            return value
        time.sleep(0.05)
    raise BenchError(f"{what} did not happen within {seconds:.0f} s")
