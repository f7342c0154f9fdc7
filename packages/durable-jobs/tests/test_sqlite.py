"""SQLite, for a first look: the same life of a job, with a real worker, and a warning."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import FAST, QUICK, wait_until


@pytest.fixture
def environment(tmp_path, broker):
    return {
        **os.environ,
        "TEST_DATABASE": str(tmp_path / "db.sqlite3"),
        "TEST_DURABLE_JOBS": json.dumps(FAST),
    }


LIFE = """
import json, sys
import tests.sqlite_app  # sets Django up
from tests import sqlite_life
print(json.dumps(getattr(sqlite_life, sys.argv[1])()))
"""


def life(stage, environment):
    """Run a stage of sqlite_life.py; return what it says, the last line of its output."""
    command = [sys.executable, "-c", LIFE, stage]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def worker(environment, tmp_path):
    """Migrate, then start one worker that is beat and loop as well."""
    assert life("migrate", environment) == {"checks": ["durable_jobs.W001"]}
    log = tmp_path / "work.log"
    words = f"-B -s {tmp_path}/beat -c 2 -Q default,control -l info"
    words += " -I tests.celery_tasks"
    command = [sys.executable, "-m", "celery", "-A", "tests.sqlite_app", "worker"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *QUICK, *words.split()], stdout=output, stderr=output, env=environment
        )
    wait_until(lambda: " ready." in log.read_text() or process.poll() is not None, 60)
    yield log
    process.terminate()
    process.wait(30)


def test_a_job_lives_on_sqlite_as_it_does_on_postgresql(worker, environment):
    assert life("live", environment) == {
        "ends": [
            3,
            [["succeeded", 1], ["succeeded", 1], ["dead", 2], ["dead", 1], ["dead", 2]],
            True,
        ],
        "keys": [1, ["end k1", "end k3"]],
        "transactions": [0, [["succeeded", 1]], ["atomic x"]],
        "many": [300, 1, 100],
        "cancelled": [
            [["cancelled", 1], ["cancelled", 0], ["cancelled", 0]],
            "expired before it started",
        ],
        "retried": [10, True, True, 1, [["dead", 1]]],
        "seen": [200, 200],
        "pruned": [True, True, 0],
    }
    assert "database is locked" not in worker.read_text()
