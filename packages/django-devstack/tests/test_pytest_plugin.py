"""Runs of pytest with the plugin: services of their own, nothing left, also under pytest-xdist."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psycopg
import pytest

from tests.waiting import wait_until

PYTEST = [
    *(sys.executable, "-m", "pytest", "-p", "devstack.pytest_plugin", "-p", "no:django"),
    *("-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir=.", "--noconftest"),
]


class PytestRun:
    """Another run of pytest with the plugin, which waits inside a test."""

    def __init__(self, folder: Path) -> None:
        self.report = folder / f"{uuid.uuid4().hex}.json"
        test = folder / "test_waiting.py"
        test.write_text(
            "import json, os, pathlib, time\n"
            "def test_waiting():\n"
            "    names = ('DATABASE_URL', 'CELERY_BROKER_URL')\n"
            "    report = pathlib.Path(os.environ['REPORT'])\n"
            "    draft = report.with_suffix('.new')\n"
            "    draft.write_text(json.dumps([os.environ[name] for name in names]))\n"
            "    draft.rename(report)\n"
            "    time.sleep(99)\n"
        )
        environment = {**os.environ, "REPORT": str(self.report)}
        for name in ("DATABASE_URL", "CELERY_BROKER_URL"):
            del environment[name]
        self.process = subprocess.Popen(
            [*PYTEST, str(test)],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            # ignored in whatever a shell started with `&`, and inherited from there
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def urls(self) -> list[str]:
        wait_until(self.report.exists)
        return json.loads(self.report.read_text())


def answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def folder_of(url: str, run: Path) -> Path:
    """Return the folder of the run whose database it is."""
    passwords = (run / ".dev" / "test").glob("*/postgres/password")
    return next(file.parent.parent for file in passwords if file.read_text() in url)


def test_test_runs_have_services_of_their_own_and_leave_nothing(tmp_path):
    interrupted, killed = runs = [PytestRun(tmp_path) for _ in range(2)]
    urls = [url for run in runs for url in run.urls()]
    assert len({*urls, os.environ["DATABASE_URL"], os.environ["CELERY_BROKER_URL"]}) == 6
    folders = [folder_of(url, tmp_path) for url in (urls[0], urls[2])]
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.process.wait(20) == pytest.ExitCode.INTERRUPTED
    assert not folders[0].exists()
    killed.process.kill()
    killed.process.wait()
    wait_until(lambda: not any(answers(url) for url in (urls[0], urls[2])))
    following = PytestRun(tmp_path)
    following.urls()
    assert not folders[1].exists()
    following.process.send_signal(signal.SIGINT)
    following.process.wait(20)


REPORTING = """
import json, os, pathlib, uuid, psycopg, redis

def test_reporting():
    names = ("PYTEST_XDIST_WORKER", "DATABASE_URL", "CELERY_BROKER_URL")
    said = [os.environ.get(name) for name in names]
    psycopg.connect(said[1]).close()
    redis.Redis.from_url(said[2]).ping()
    pathlib.Path(f"{uuid.uuid4().hex}.json").write_text(json.dumps(said))
"""


def test_each_worker_of_xdist_has_services_of_its_own_and_the_controller_none(tmp_path):
    for number in range(4):
        (tmp_path / f"test_{number}.py").write_text(REPORTING)
    # what the controller is given is not for its workers
    given = {"DATABASE_URL": "postgres://yours/x", "CELERY_BROKER_URL": "redis://yours"}
    done = subprocess.run(
        [*PYTEST, "-n", "2", "--dist", "loadfile"],
        cwd=tmp_path,
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = {tuple(json.loads(file.read_text())) for file in tmp_path.glob("*.json")}
    assert {worker for worker, _, _ in said} == {"gw0", "gw1"}
    assert len(said) == len({url for _, *urls in said for url in urls}) / 2 == 2
    wait_until(lambda: not any(answers(url) for _, url, _ in said))
    # pytest-xdist kills a worker that needs 10 s for its end; the next run sweeps what it left
    alone = {name: value for name, value in os.environ.items() if name not in given}
    subprocess.run([*PYTEST, "test_0.py"], cwd=tmp_path, env=alone, check=True, timeout=60)
    assert [file.name for file in (tmp_path / ".dev" / "test").iterdir()] == ["lock"]


def test_servers_of_yours_are_used_and_no_other_is_started(tmp_path):
    (tmp_path / "test_it.py").write_text(REPORTING)
    subprocess.run([*PYTEST], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=60)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())[1] == os.environ["DATABASE_URL"]
    assert not (tmp_path / ".dev").exists()
