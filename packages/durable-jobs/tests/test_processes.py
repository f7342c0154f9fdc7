"""Callers of every kind of process: their hints go out without the loop, so jobs start at once."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from django.db import connection

from durable_jobs import Job
from tests.conftest import FAST, WORK, Worker, effects, wait_until

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db", "broker")


@pytest.fixture(scope="module", autouse=True)
def work(django_db_setup, tmp_path_factory):
    """A worker and no loop: a job whose hint was not sent stays where it is."""
    worker = Worker(tmp_path_factory.mktemp("processes") / "work.log", *WORK.split())
    yield worker.wait_until_ready()
    worker.kill()


@pytest.fixture
def environment():
    return {
        **os.environ,
        "TEST_DATABASE": str(connection.settings_dict["NAME"]),
        "TEST_DURABLE_JOBS": json.dumps(FAST),
    }


@pytest.fixture
def gunicorn(environment, free_port, tmp_path):
    """Return a gunicorn that loads the application before it forks, and its address."""
    pytest.importorskip("gunicorn")
    address = f"127.0.0.1:{free_port}"
    log = tmp_path / "gunicorn.log"
    words = f"--preload -w 2 -k gthread --threads 4 -b {address} --log-level info"
    command = [sys.executable, "-m", "gunicorn", "tests.wsgi_app", *words.split()]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    wait_until(lambda: log.read_text().count("Booting worker") == 2 or process.poll() is not None)
    assert process.poll() is None, log.read_text()
    yield process, address
    if process.poll() is None:
        process.kill()
        process.wait(10)


def get(address, path):
    with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as response:
        return response.read().decode().split()


def test_a_preloading_gunicorn_sends_hints_from_master_and_workers_up_to_its_stop(gunicorn):
    process, address = gunicorn
    wait_until(lambda: effects("end") == ["end loaded"])
    answers = [get(address, f"r{number}") for number in range(20)]
    process.send_signal(signal.SIGTERM)  # with the last hints still to be collected
    assert process.wait(15) == 0
    wait_until(lambda: len(effects("end r")) == 20)
    assert {pid for _, pid in answers} != {str(process.pid)}
    assert Job.objects.filter(state=State.SUCCEEDED, attempts=1).count() == 21


SCRIPT = """
import sys
from tests import wsgi_app
from tests.tasks import write
for number in range(3):
    write.delay(f"{sys.argv[1]}{number}")
{end}
"""
ENDS = {"returns": "", "exits": "sys.exit(3)", "raises": "raise KeyError"}


def test_a_command_that_enqueues_and_ends_at_once_has_sent_its_hints(environment):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.replace("{end}", end), name],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        for name, end in ENDS.items()
    ]
    assert [process.wait(60) for process in processes] == [0, 3, 1]
    wait_until(lambda: len(effects("end")) == 9)


FORK = """
import ctypes, os, sys
from durable_jobs.publisher import publisher
from tests import wsgi_app
from tests.tasks import write
from django.db import connections
write.delay("parent")
assert publisher.flush(5)
connections.close_all()
child = {fork}
write.delay("child" if child == 0 else "after")
if child:
    os.waitpid(child, 0)
"""


# The second is what servers written in C do: none of Python's hooks is called.
@pytest.mark.parametrize("fork", ["os.fork()", "ctypes.PyDLL(None).fork()"])
def test_a_process_that_forks_after_it_enqueued_sends_hints_from_both_sides(environment, fork):
    command = [sys.executable, "-W", "ignore", "-c", FORK.replace("{fork}", fork)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    wait_until(lambda: len(effects("end")) == 3)
    assert sorted(effects("end")) == ["end after", "end child", "end parent"]
