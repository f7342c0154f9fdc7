"""Private PostgreSQL and Valkey of every installation on this machine, and the files of a stack."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis

from devstack import postgres, services, state, valkey
from devstack.processes import Process, free_port, stop, wait_until_ready, which
from devstack.state import StackError, birth
from tests.processes import wait_until

ROOT = Path(__file__).resolve().parent.parent
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


def test_command_runs_on_services_of_its_own_when_no_stack_is_up(tmp_path):
    installed = shutil.ignore_patterns(".dev", ".git", ".tools", ".venv")
    shutil.copytree(ROOT, tmp_path, ignore=installed, dirs_exist_ok=True)
    code = (
        "import os, psycopg, redis;"
        "database = psycopg.connect(os.environ['DATABASE_URL']);"
        "database.execute('SELECT count(*) FROM auth_user').close(); database.close();"
        "redis.Redis.from_url(os.environ['CELERY_BROKER_URL']).ping();"
        "print(open('.dev/stack.json').read()); raise SystemExit(7)"
    )
    (tmp_path / ".dev").mkdir()
    for stale in ("stack.json", "env"):
        (tmp_path / ".dev" / stale).write_text("DATABASE_URL=left by a killed stack")
    environment = os.environ | {"DATABASE_URL": "", "CELERY_BROKER_URL": ""}
    done = subprocess.run(
        [sys.executable, "-m", "devstack", "run", "--", sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    pids = json.loads(done.stdout)["processes"]
    assert pids.keys() == {"postgres", "valkey"}
    assert [pid for pid in pids.values() if birth(pid)] == []
    assert not (tmp_path / ".dev" / "env").exists()


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
        plain = ("-p", "no:django", "-p", "no:cacheprovider", "-c", "/dev/null", "--noconftest")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "devstack.pytest_plugin", *plain, str(test)],
            cwd=ROOT,
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


def folder_of(url: str) -> Path:
    """Return the folder of the run whose database it is."""
    passwords = (ROOT / ".dev" / "test").glob("*/postgres/password")
    return next(file.parent.parent for file in passwords if file.read_text() in url)


def test_test_runs_have_services_of_their_own_and_leave_nothing(tmp_path):
    interrupted, killed = runs = [PytestRun(tmp_path) for _ in range(2)]
    urls = [url for run in runs for url in run.urls()]
    assert len({*urls, os.environ["DATABASE_URL"], os.environ["CELERY_BROKER_URL"]}) == 6
    folders = [folder_of(urls[0]), folder_of(urls[2])]
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
