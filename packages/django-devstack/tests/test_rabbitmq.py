"""RabbitMQ in the stack, where it is installed; Valkey and a line that says so where it is not."""

import os
import signal
import subprocess
import urllib.parse
from pathlib import Path

import pytest
from celery import Celery

from devstack import rabbitmq
from devstack.processes import free_port, stop, wait_until_ready
from devstack.state import birth
from tests.stack import Project
from tests.waiting import wait_until

installed = pytest.mark.skipif(not rabbitmq.server(), reason="no RabbitMQ here")
BROKER = 'broker = "rabbitmq"\n'


def rows(word: str) -> list[str]:
    table = subprocess.check_output(["ps", "-A", "-o", "pid=,args="], text=True)
    return [line for line in table.splitlines() if word in line]


@installed
def test_node_keeps_its_messages_when_killed_and_leaves_nothing_when_stopped(tmp_path):
    server, ports = rabbitmq.server(), tuple((free_port(),) for _ in range(3))
    for number in (signal.SIGKILL, signal.SIGTERM):
        processes, url = rabbitmq.processes(tmp_path / "rabbitmq", server, ports=ports)
        names, node = processes
        for process in processes:
            process.start()
        try:
            wait_until_ready(processes)
            with Celery(broker=url, set_as_current=False).connection_for_write() as connection:
                queue = connection.SimpleQueue("kept")
                if number == signal.SIGKILL:
                    queue.put("message")
                else:
                    assert queue.get(timeout=5).payload == "message"
                queue.close()
            node.send(number)
            wait_until(lambda node=node: not node.running)
        finally:
            stop([node, names])
    assert not rows(str(tmp_path))
    assert (tmp_path / "rabbitmq" / ".erlang.cookie").stat().st_mode & 0o777 == 0o400
    assert (tmp_path / "rabbitmq" / "rabbitmq.conf").stat().st_mode & 0o777 == 0o600


@installed
@pytest.mark.faults
def test_stack_runs_on_rabbitmq_of_its_own_and_stops_it(tmp_path: Path):
    project = Project(tmp_path / "project")
    project.settings(BROKER)
    project.up()
    try:
        assert {"rabbitmq", "epmd"} < project.pids.keys()
        assert "valkey" not in project.pids
        assert project.state["broker_url"].startswith("amqp://")
        assert f":{urllib.parse.urlsplit(project.state['broker_url']).port}/" in str(project.state)
        project.run_task()
        position = len(project.text)
        os.kill(project.pids["rabbitmq"], signal.SIGKILL)
        project.wait_for_output("rabbitmq is up again", position)
        project.run_task()
        everything = project.pids.values()
    finally:
        project.down()
    assert not [pid for pid in everything if birth(pid)]
    assert not rows(str(project.folder))


def test_where_it_is_not_installed_a_line_says_that_valkey_runs(tmp_path: Path):
    project = Project(tmp_path / "project")
    project.settings(BROKER)
    project.devstack[-2:] = [
        "-c",
        "import sys; from devstack import __main__, rabbitmq\n"
        "rabbitmq.server = lambda: None; sys.exit(__main__.main())",
    ]
    done = project.run("run", "--", "env")
    assert "RabbitMQ is not installed here" in done.stderr
    assert "CELERY_BROKER_URL=redis://" in done.stdout
