"""The heartbeat of real workers: fresh unless their main process hangs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from config.celery import app
from config.liveness import SECONDS
from devstack import valkey
from tests import tasks
from tests.processes import LAUNCHER, Worker, running_worker, wait_until

MAX_AGE = 3 * SECONDS


def check(*options: str) -> tuple[int, str]:
    """Run `check`; return its exit code and what it said."""
    command = [sys.executable, LAUNCHER, "check", "--max-age", str(MAX_AGE), *options]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


def oldest(file: Path, worker: Worker, seconds: float) -> float:
    """Watch a heartbeat while its worker runs; return the greatest age it reached."""
    end, age = time.monotonic() + seconds, 0.0
    while time.monotonic() < end and worker.process.poll() is None:
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
        tasks.burn.delay("busy", 7)
        wait_until(lambda: tasks.count("start"))
        assert oldest(file, worker, 3) < MAX_AGE
        worker.send(signal.SIGTERM)
        assert oldest(file, worker, 30) < MAX_AGE
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
        assert oldest(file, worker, 8) < MAX_AGE
        assert worker.process.poll() is None
