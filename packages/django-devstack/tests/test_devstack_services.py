"""Private PostgreSQL and Valkey of every installation on this machine, and the files of a stack."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis

from devstack import postgres, services, state, valkey
from devstack.processes import Process, free_port, stop, wait_until_ready, which
from devstack.state import StackError, birth
from tests.waiting import wait_until

STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(99)"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")


@contextmanager
def running(process: Process) -> Iterator[Process]:
    process.start()
    try:
        wait_until_ready([process])
        yield process
    finally:
        stop([process])


def python(code: str, log: Path, **options: object) -> Process:
    """Return a process that runs Python code and is ready when it has printed."""
    return Process(
        "test", [sys.executable, "-uc", code], log, lambda: "up" in log.read_text(), **options
    )


@pytest.mark.parametrize(
    "installation", list(postgres.installations()), ids=lambda one: str(one.major)
)
def test_postgres_keeps_its_data_and_stops_at_once_though_a_client_is_there(tmp_path, installation):
    server, url = postgres.process(tmp_path / "postgres", installation=installation)
    with running(server):
        client = psycopg.connect(url, autocommit=True)
        client.execute("CREATE TABLE kept AS SELECT upper('é') AS letter")
        start = time.monotonic()
        stop([server])
        assert time.monotonic() - start < 5
        assert server.exit_code == 0
        client.close()
    server, url = postgres.process(tmp_path / "postgres", installation=installation)
    with running(server), psycopg.connect(url) as client:
        assert client.execute("SELECT letter FROM kept").fetchone() == ("É",)
        assert client.execute("SHOW fsync").fetchone() == ("on",)


def test_wheel_brings_a_postgres():
    assert any("site-packages" in str(one.folder) for one in postgres.installations())


@root_only
def test_root_runs_postgres_as_another_user_and_may_change_the_way(tmp_path):
    ways = {0: postgres.UNSHARE, 65534: postgres.SETPRIV}
    # containers often forbid the first
    possible = [user for user, way in ways.items() if subprocess.call([*way, "true"]) == 0]
    assert possible
    for user in possible + possible[:1]:
        prefix = ways[user]
        server, url = postgres.process(tmp_path / "postgres", prefix=prefix)
        with running(server), psycopg.connect(url) as client:
            assert client.execute("SELECT 1").fetchone() == (1,)
            assert Path(f"/proc/{server.pid}").stat().st_uid == user
    assert (tmp_path / "postgres" / "data").stat().st_mode & 0o777 == 0o700


def test_data_of_another_postgres_version_is_left_alone_with_a_clear_word(tmp_path):
    data = tmp_path / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("12\n")
    with pytest.raises(StackError, match=r"written by PostgreSQL 12, and here is only .*: install"):
        postgres.process(tmp_path / "postgres")
    assert [file.name for file in data.iterdir()] == ["PG_VERSION"]


def test_creation_that_was_interrupted_is_begun_again(tmp_path):
    (tmp_path / "postgres" / "data.new" / "base").mkdir(parents=True)
    server, url = postgres.process(tmp_path / "postgres")
    with running(server), psycopg.connect(url) as client:
        assert client.execute("SELECT current_database()").fetchone() == ("app",)


@pytest.mark.parametrize("server", list(valkey.servers()), ids=lambda path: path.parts[-4])
def test_acknowledged_message_survives_the_kill_of_valkey(tmp_path, server):
    process, url = valkey.process(tmp_path / "valkey", server=server)
    with running(process):
        with redis.Redis.from_url(url) as client:
            client.rpush("queue", *range(100))
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            # a write to the file is not yet on the disk, but survives the process
            wait_until(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0)
        process.send(signal.SIGKILL)
        process.popen.wait(10)
    process, url = valkey.process(tmp_path / "valkey", server=server)
    with running(process), redis.Redis.from_url(url) as client:
        assert client.llen("queue") == 100


def test_servers_of_yours_are_used_and_nothing_is_started(tmp_path):
    given = {"DATABASE_URL": "postgres://a/b", "CELERY_BROKER_URL": "amqp://c"}
    found = services.prepare(tmp_path, given)
    assert (found.environment, found.processes) == (given, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prepare", "words"),
    [(postgres.process, "or set DATABASE_URL"), (valkey.process, "or set CELERY_BROKER_URL")],
)
def test_machine_without_servers_gets_one_line_that_says_what_to_do(
    tmp_path, monkeypatch, prepare, words
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "FOLDERS", ())
    monkeypatch.setattr(valkey, "FOLDERS", ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StackError, match=words) as caught:
        prepare(tmp_path / "folder")
    assert "\n" not in str(caught.value)


def test_server_inside_the_virtual_environment_is_passed_over(tmp_path, monkeypatch):
    for folder in ("venv/bin", "system/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "redis-server").touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("PATH", f"{tmp_path}/venv/bin:{tmp_path}/system/bin")
    assert which("redis-server") == tmp_path / "system" / "bin" / "redis-server"


def test_process_that_ends_while_starting_is_reported_with_its_last_lines(tmp_path):
    process = python("print('no ' + 'luck'); raise SystemExit(4)", tmp_path / "log")
    process.start()
    with pytest.raises(StackError, match=r"exit code 4. Its last lines:\nno luck"):
        wait_until_ready([process])


def test_process_that_is_never_ready_is_reported_after_its_patience(tmp_path):
    process = python("import time; time.sleep(99)", tmp_path / "log", patience=0.2)
    process.start()
    with pytest.raises(StackError, match="was not ready after"):
        wait_until_ready([process])
    stop([process], lambda: True)


def test_process_that_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    with running(python(STUBBORN, tmp_path / "log", grace=0.5)) as process:
        start = time.monotonic()
        stop([process])
        assert 0.4 < time.monotonic() - start < 4
        assert process.exit_code == -signal.SIGKILL


def test_second_wish_to_stop_hurries(tmp_path):
    with running(python(STUBBORN, tmp_path / "log", grace=60)) as process:
        start = time.monotonic()
        stop([process], lambda: time.monotonic() > start + 0.3)
        assert time.monotonic() - start < 5


def test_port_that_is_taken_is_not_offered():
    port = free_port()
    assert free_port(port) == port
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        wait_until(lambda: free_port(port) != port)
        server.terminate()


def test_secret_is_made_once_and_for_its_owner_only(tmp_path):
    first = state.secret(tmp_path / "secret")
    assert len(first) >= 20
    assert state.secret(tmp_path / "secret") == first
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_folder_is_held_by_one_stack_at_a_time(tmp_path):
    first = state.lock(tmp_path)
    assert first
    assert state.lock(tmp_path) is None
    first.close()
    second = state.lock(tmp_path)
    assert second
    second.close()


def test_leftovers_of_a_killed_runner_are_swept_and_strangers_spared(tmp_path):
    ours, stranger = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], process_group=0)
        for _ in range(2)
    )
    with ours, stranger:
        born = {ours.pid: birth(ours.pid), stranger.pid: "another time", 1: "", 99_999_999: "5"}
        (tmp_path / state.PIDS).write_text(json.dumps(born))
        state.sweep(tmp_path)
        assert ours.wait(5) == -signal.SIGTERM
        assert stranger.poll() is None
        stranger.kill()
    assert not (tmp_path / state.PIDS).exists()
