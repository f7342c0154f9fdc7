"""The heartbeat of real workers and of beat: fresh unless their main process hangs."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from devstack import valkey
from hardened_celery.liveness import SECONDS
from tests import observed, tasks
from tests.app import app
from tests.processes import LAUNCHER, children, running_worker, wait_until

pytestmark = pytest.mark.faults
MAX_AGE = 6 * SECONDS  # on a machine that is busy with other things; 120 s are usual


def check(*options: str) -> tuple[int, str]:
    """Run `check`; return its exit code and what it said."""
    command = [*LAUNCHER, "check", "-A", "tests.app", "--max-age", str(MAX_AGE), *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


def oldest(file: Path, process: subprocess.Popen[bytes], seconds: float) -> float:
    """Watch a heartbeat while its process runs; return the greatest age it reached."""
    end, age = time.monotonic() + seconds, 0.0
    while time.monotonic() < end and process.poll() is None:
        with suppress(FileNotFoundError):  # the launcher removes it just before it ends
            age = max(age, time.time() - file.stat().st_mtime)
        time.sleep(0.05)
    return age


@pytest.fixture(autouse=True)
def _table(transactional_db: None) -> None:
    tasks.create_table()
    app.control.purge()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_the_heartbeat_is_fresh_while_tasks_run_and_a_stopping_worker_waits_for_them(
    tmp_path: Path, project_environment: dict[str, str], pool: str
) -> None:
    file = tmp_path / "heartbeat"
    options = "-c", "1", "-P", pool, "--heartbeat", str(file)
    with running_worker(tmp_path / "worker.log", project_environment, *options) as worker:
        wait_until(file.exists)
        tasks.burn.delay("busy", 15)
        wait_until(lambda: tasks.count("start"))
        assert oldest(file, worker.process, 7) < MAX_AGE
        worker.send(signal.SIGTERM)
        assert oldest(file, worker.process, 30) < MAX_AGE
        assert worker.wait() == 0
    assert tasks.count("end") == 1
    assert not file.exists()


def test_the_heartbeat_stops_when_the_main_process_hangs_or_is_stopped(
    project_environment: dict[str, str], tmp_path: Path
) -> None:
    name = "-n", f"liveness-{os.getpid()}@%h"
    assert check(*name)[0] == 1
    with running_worker(tmp_path / "worker.log", project_environment, "-c", "1", *name) as worker:
        wait_until(lambda: check(*name)[0] == 0)
        os.kill(worker.celery_pid, signal.SIGSTOP)
        wait_until(lambda: check(*name)[0] == 1, what="a stopped process is noticed")
        os.kill(worker.celery_pid, signal.SIGCONT)
        wait_until(lambda: check(*name)[0] == 0, what="it is fresh again")
        app.control.broadcast("hang", {"seconds": 60})
        wait_until(lambda: check(*name)[0] == 1, what="a hanging process is noticed")
    code, said = check(*name)
    assert (code, said.count("\n")) == (1, 1)


def test_a_worker_is_ready_when_it_has_reached_its_broker_and_stays_so(
    project_environment: dict[str, str],
    tmp_path: Path,
    broker: tuple[subprocess.Popen[bytes], str],
    free_port: int,
) -> None:
    process, url = broker
    file, ready = tmp_path / "heartbeat", tmp_path / "heartbeat.ready"
    nowhere = re.sub(r"\d+(?=/\d*$)", str(free_port), url)
    options = "-c", "1", "--heartbeat", str(file)
    ready.touch()  # of one that was killed
    away = project_environment | {"CELERY_BROKER_URL": nowhere}
    with running_worker(tmp_path / "away.log", away, *options, ready=False) as worker:
        wait_until(file.exists)
        wait_until(lambda: "Cannot connect" in worker.text(), what="it tries")
        assert not ready.exists()
    there = project_environment | {"CELERY_BROKER_URL": url}
    with running_worker(tmp_path / "there.log", there, *options) as worker:
        wait_until(ready.exists)
        process.kill()
        wait_until(lambda: "Connection to broker lost" in worker.text(), what="it is away")
        assert ready.exists()
        worker.send(signal.SIGTERM)
        worker.wait()
        assert not ready.exists()


def test_a_worker_that_hangs_ends_with_its_pool_and_says_where_it_was(
    project_environment: dict[str, str], tmp_path: Path
) -> None:
    environment = project_environment | {"WORKER_HANG_SECONDS": "5"}
    with running_worker(tmp_path / "worker.log", environment, "-c", "1") as worker:
        tasks.burn.delay("busy", 60)
        wait_until(lambda: tasks.count("start"))
        assert worker.process.poll() is None
        (pool,) = children(worker.celery_pid)
        app.control.broadcast("hang", {"seconds": 60})
        assert worker.wait() == 1
        assert "in hang" in worker.text()
        wait_until(lambda: not Path(f"/proc/{pool}").exists(), what="the pool process is gone")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a broker that a test may stop."""
    process, url = valkey.process(tmp_path / "valkey")
    process.start()
    wait_until(process.ready)
    assert process.popen
    yield process.popen, url
    process.popen.kill()
    process.popen.wait()


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_the_heartbeat_is_fresh_while_the_broker_is_frozen_or_down(
    tmp_path: Path,
    project_environment: dict[str, str],
    broker: tuple[subprocess.Popen[bytes], str],
    fault: signal.Signals,
) -> None:
    process, url = broker
    file = tmp_path / "heartbeat"
    environment = project_environment | {"CELERY_BROKER_URL": url}
    options = "-c", "1", "--heartbeat", str(file)
    with running_worker(tmp_path / "worker.log", environment, *options) as worker:
        wait_until(file.exists)
        process.send_signal(fault)
        assert oldest(file, worker.process, 8) < MAX_AGE
        assert worker.process.poll() is None


@contextmanager
def running_beat(
    folder: Path, file: Path, *options: str, **more: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a beat that sends all the time, until its heartbeat is there."""
    environment = observed.environment(BEAT_HEARTBEAT_FILE=str(file), **more)
    command = "celery", "-A", "tests.app", "beat", "-s", str(folder / "schedule"), "--pidfile="
    with observed.program(folder / "beat.log", environment, *command, *options) as beat:
        wait_until(file.exists)
        yield beat


def stale(file: Path) -> bool:
    return check("--heartbeat", str(file))[0] == 1


def test_the_heartbeat_of_beat_stops_when_it_is_stopped(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    with running_beat(tmp_path, file) as beat:
        assert oldest(file, beat, 7) < MAX_AGE
        beat.send_signal(signal.SIGSTOP)
        wait_until(lambda: stale(file), what="a stopped beat is noticed")
        beat.send_signal(signal.SIGCONT)
        wait_until(lambda: not stale(file), what="it is fresh again")


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_the_heartbeat_of_beat_is_fresh_while_the_broker_is_frozen_or_down(
    tmp_path: Path, broker: tuple[subprocess.Popen[bytes], str], fault: signal.Signals
) -> None:
    process, url = broker
    file = tmp_path / "heartbeat"
    options = "-S", "tests.observed.schedulers:Impatient"
    with running_beat(tmp_path, file, *options, CELERY_BROKER_URL=url) as beat:
        process.send_signal(fault)
        assert oldest(file, beat, 20) < MAX_AGE
        assert beat.poll() is None
        said = (tmp_path / "beat.log").read_text()
    assert "Error" in said  # the fault struck


def test_a_beat_whose_scheduler_hangs_goes_stale_and_ends_and_says_where_it_was(
    tmp_path: Path,
) -> None:
    file, hang = tmp_path / "heartbeat", tmp_path / "hang"
    options = "-S", "tests.observed.schedulers:Hanging"
    with running_beat(tmp_path, file, *options, HANG_FILE=str(hang)) as beat:
        assert oldest(file, beat, 7) < MAX_AGE
        hang.touch()
        wait_until(lambda: stale(file), what="a scheduler that hangs is noticed")
        assert beat.wait(30) == 1
    assert "in tick" in (tmp_path / "beat.log").read_text()
