"""The launcher with real workers, brokers and signals. What ran is counted in the database."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hardened_celery
from tests import tasks
from tests.app import app
from tests.processes import LAUNCHER, Worker, children, launcher, running_worker, wait_until

pytestmark = pytest.mark.faults
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel must offer it")
CTRL_C = b"\x03"


def waiting(queue: str = "default") -> int:
    """Return the number of messages in a queue; those that a worker has taken are not in it."""
    with app.connection_for_write() as connection:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except connection.channel_errors:  # an empty queue does not exist, for Redis
            return 0


@pytest.fixture(autouse=True)
def _empty(transactional_db: None) -> None:
    tasks.create_table()
    app.control.purge()


@pytest.fixture
def terminal() -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the keyboard of a terminal, and how Popen makes a program run in that terminal."""
    keyboard, screen = os.openpty()
    yield keyboard, {"stdin": screen, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    os.close(keyboard)
    os.close(screen)


@pytest.fixture
def worker(tmp_path: Path, project_environment: dict[str, str]) -> Iterator[Worker]:
    with running_worker(tmp_path / "log", project_environment, "-c", "1") as worker:
        yield worker


def run_task(seconds: float) -> None:
    """Send a task and wait until it runs."""
    tasks.work.delay("task", seconds)
    wait_until(lambda: tasks.count("start"), what="the task runs")


def to_the_launcher(worker: Worker) -> None:
    worker.send(signal.SIGTERM)


def to_the_group(worker: Worker) -> None:
    os.killpg(worker.process.pid, signal.SIGTERM)


def from_all_sides(worker: Worker) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        worker.send(number)


@pytest.mark.parametrize("stop", [to_the_launcher, to_the_group, from_all_sides])
def test_after_sigterm_a_running_task_ends(worker: Worker, stop: Callable[[Worker], None]) -> None:
    run_task(2)
    tasks.work.delay("later")
    stop(worker)
    assert worker.wait() == 0
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 1, 1)


def test_ctrl_c_lets_a_running_task_end(
    tmp_path: Path, project_environment: dict[str, str], terminal: tuple[int, dict[str, Any]]
) -> None:
    keyboard, how = terminal
    with running_worker(tmp_path / "log", project_environment, "-c", "1", **how) as worker:
        run_task(2)
        os.write(keyboard, CTRL_C)
        assert worker.wait() == 0
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 1, 0)


def test_a_second_ctrl_c_hands_the_task_back(
    tmp_path: Path, project_environment: dict[str, str], terminal: tuple[int, dict[str, Any]]
) -> None:
    keyboard, how = terminal
    with running_worker(tmp_path / "log", project_environment, "-c", "1", **how) as worker:
        run_task(60)
        os.write(keyboard, CTRL_C)
        wait_until(lambda: "Warm shutdown" in worker.text())
        # no condition to wait for: the launcher takes two signals at once for one
        time.sleep(0.6)
        os.write(keyboard, CTRL_C)
        assert worker.wait(10) == 0
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 0, 1)


def test_a_task_longer_than_the_grace_is_handed_back_and_runs_once_elsewhere(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    options = "-c", "1", "--grace", "5.5", "--margin", "5"
    with running_worker(tmp_path / "first", project_environment, *options) as worker:
        run_task(3)
        asked = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
        assert time.monotonic() - asked < 5.5
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 0, 1)
    with running_worker(tmp_path / "second", project_environment, *options) as worker:
        wait_until(lambda: tasks.count("end"))
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (2, 1, 0)


def test_sigquit_hands_back_at_once(worker: Worker) -> None:
    run_task(60)
    worker.send(signal.SIGQUIT)
    assert worker.wait(10) == 0
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 0, 1)


def test_a_worker_that_hangs_is_killed_with_its_session_when_the_grace_is_over(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    options = "-c", "1", "--grace", "2", "--margin", "1"
    with running_worker(tmp_path / "log", project_environment, *options) as worker:
        session = worker.celery_pid
        assert len(in_session(session)) == 2
        hang(worker)
        asked = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait(10) == 128 + signal.SIGKILL
        assert 2 <= time.monotonic() - asked < 4
    assert not in_session(session)


def test_a_worker_that_cannot_hand_back_says_where_it_hangs_and_is_killed(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    options = "-c", "1", "--grace", "6", "--margin", "5"
    with running_worker(tmp_path / "log", project_environment, *options) as worker:
        tasks.ignore_the_end.delay(60)
        wait_until(lambda: tasks.count("start"), what="the task runs")
        worker.send(signal.SIGQUIT)
        assert worker.wait(10) == 128 + signal.SIGKILL
    assert "on_cold_shutdown" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGQUIT, signal.SIGTERM])
def test_a_wish_that_comes_when_python_is_on_its_way_out_changes_nothing(
    tmp_path: Path, project_environment: dict[str, str], number: signal.Signals
) -> None:
    """The launcher's question where it hangs ended one that had handed back everything: 138."""
    file = tmp_path / "on-its-way-out"
    slow = project_environment | {"SLOW_END": str(file)}
    with running_worker(tmp_path / "log", slow, "-c", "1") as worker:
        celery = worker.celery_pid
        worker.send(signal.SIGTERM)
        wait_until(file.exists, 60, "Python is on its way out")
        os.kill(celery, number)
        file.rmdir()
        assert worker.wait() == 0


def test_a_question_that_comes_while_it_starts_ends_no_worker(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    options = tmp_path / "log", project_environment, "-c", "1"
    with running_worker(*options, ready=False) as worker:
        os.kill(worker.celery_pid, signal.SIGUSR1)
        worker.wait_ready()
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0


def test_a_third_signal_kills(worker: Worker) -> None:
    hang(worker)
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGQUIT):
        worker.send(number)
        # no condition to wait for: signals of one kind that arrive together are one
        time.sleep(0.1)
    assert worker.wait(5) == 128 + signal.SIGKILL


def test_the_exit_code_is_the_one_of_celery(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    unknown = "--no-such-option"
    log = tmp_path / "log"
    with running_worker(log, project_environment, unknown, ready=False) as worker:
        assert worker.wait() == 2
    with running_worker(log, project_environment, "-c", "1") as worker:
        os.kill(worker.celery_pid, signal.SIGKILL)
        assert worker.wait() == 128 + signal.SIGKILL


def test_a_task_sent_to_a_pool_process_just_before_the_stop_runs_once(worker: Worker) -> None:
    """Celery forgot it, ran it twice, and took 31 s to stop (see `liveness.KeepSent`)."""
    (pool_process,) = children(worker.celery_pid)
    os.kill(pool_process, signal.SIGSTOP)
    tasks.work.delay("task")
    wait_until(lambda: not waiting(), what="the main process has taken it")
    assert app.control.ping(timeout=0.5), "its event loop came round, so it has passed it on"
    worker.send(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in worker.text())
    # no condition to wait for: in this time Celery would have forgotten the task
    time.sleep(1)
    os.kill(pool_process, signal.SIGCONT)
    started = time.monotonic()
    assert worker.wait(60) == 0
    assert time.monotonic() - started < 10
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 1, 0)


def send(name: str, ended: threading.Event) -> int:
    """Send 150 tasks a second until the event is set; return how many."""
    sent = 0
    while not ended.wait(1 / 150):
        tasks.work.delay(f"{name}-{sent}")
        sent += 1
    return sent


def test_deploys_under_load_are_quick_and_lose_and_repeat_nothing(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    sent = 0
    for deploy in "ab":
        log, ended = tmp_path / deploy, threading.Event()
        with (
            running_worker(log, project_environment, "-c", "2") as worker,
            ThreadPoolExecutor(1) as thread,
        ):
            sending = thread.submit(send, deploy, ended)
            wait_until(partial(tasks.count, "end", f"{deploy}-100"))
            asked = time.monotonic()
            worker.send(signal.SIGTERM)
            code, took = worker.wait(60), time.monotonic() - asked
            ended.set()
            sent += sending.result()
        assert (code, took < 10) == (0, True)
    with running_worker(tmp_path / "last", project_environment, "-c", "2") as worker:
        wait_until(lambda: tasks.count("end") >= sent, 60, "all tasks end")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert sent > 200
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (sent, sent, 0)


def hang(worker: Worker) -> None:
    """Block the main process."""
    app.control.broadcast("hang", {"seconds": 60})
    wait_until(lambda: "hangs" in worker.text())


def in_session(session: int) -> list[int]:
    """Return the pids of the processes in a session, zombies left out."""
    table = subprocess.check_output(["ps", "-A", "-o", "pid=,sess=,stat="], text=True)
    rows = (line.split() for line in table.splitlines())
    return [int(pid) for pid, number, state in rows if int(number) == session and state[0] != "Z"]


@linux
def test_a_worker_whose_launcher_is_killed_ends_after_its_task(worker: Worker) -> None:
    session = worker.celery_pid
    run_task(2)
    worker.send(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert in_session(session)
    wait_until(lambda: not in_session(session), what="no orphan is left")
    assert (tasks.count("start"), tasks.count("end"), waiting()) == (1, 1, 0)


@linux
def test_children_of_others_are_buried(tmp_path: Path, project_environment: dict[str, str]) -> None:
    log = tmp_path / "log"
    # as PID 1 of a container does, this launcher inherits processes that lose their parent
    with running_worker(log, project_environment, "-c", "1", preexec_fn=inherit) as worker:
        tasks.leave_child.delay()
        wait_until(lambda: len(children(worker.process.pid)) == 2, what="it inherits a process")
        wait_until(lambda: len(children(worker.process.pid, zombies=True)) == 1)


def inherit() -> None:
    """Make the calling process the parent of what its descendants leave behind."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


WORKER = "worker", "-A", "tests.app"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([*WORKER, "--grace", "soon"], "'soon' is not a positive number of seconds"),
        ([*WORKER, "--hang", "0"], "'0' is not a positive number of seconds"),
        ([*WORKER, "--margin", "-1"], "'-1' is not a positive number of seconds"),
        ([*WORKER, "--grace", "10"], "--grace (10) must be more than --margin (10)"),
        ([*WORKER, "--heartbeat", "/no/such/folder/file"], "no place for the heartbeat"),
        ([*WORKER, "--detach"], "stays in the foreground"),
        (["worker"], "name the Celery application with -A"),
        (["check", "--max-age", "nan"], "'nan' is not a positive number of seconds"),
        (["check", "--concurrency", "2"], "unrecognized arguments"),
        (["check"], "name the application with -A"),
        (["wroker"], "`hardened-celery worker -A APP` or `hardened-celery check`"),
        ([], "`hardened-celery worker -A APP` or `hardened-celery check`"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], says: str) -> None:
    code, said = launcher(*LAUNCHER, *options)
    assert code == 2
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["WORKER_GRACE_SECONDS", "WORKER_HANG_SECONDS"])
def test_a_wrong_variable_is_one_line_that_names_it(name: str) -> None:
    code, said = launcher(*LAUNCHER, *WORKER, **{name: "soon"})
    assert (code, said.count("\n")) == (2, 1)
    assert f"{name}: 'soon' is not a positive number of seconds" in said


@pytest.mark.parametrize("form", ["", "worker", "check"])
def test_help_says_how_it_stops(form: str) -> None:
    command = [Path(sys.executable).with_name("hardened-celery"), *form.split(), "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "handed back to the broker" in said.stdout
    assert not said.stderr


def test_a_python_without_celery_is_one_line() -> None:
    (source,) = hardened_celery.__path__
    python = sys.executable, "-S", "-m", "hardened_celery"
    code, said = launcher(*python, *WORKER, PYTHONPATH=str(Path(source).parent))
    assert code == 2
    assert "Celery is not installed" in said
    assert said.count("\n") == 1
