"""The whole stack of `devstack up`, in copies of a small project: real processes and signals."""

import http.cookiejar
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from devstack.postgres import other_user
from devstack.state import birth
from tests.stack import Project
from tests.waiting import wait_until

PROGRAMS = {"web", "worker", "control", "beat", "flower", "postgres", "valkey"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose stack is up; every test leaves it up."""
    project = Project(tmp_path_factory.mktemp("devstack") / "project")
    project.up()
    yield project
    if project.runner.poll() is None:
        project.down()


def family(pid: int) -> set[int]:
    """Return a process and all its descendants, those in other sessions too."""
    table = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True)
    parents = dict(map(int, line.split()) for line in table.splitlines())
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def get(url: str) -> int:
    """Return the status code, 0 when nobody answers."""
    try:
        with urllib.request.build_opener().open(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def log_in(web: str, password: str) -> bool:
    """Log into the admin as a browser would."""
    cookies = http.cookiejar.CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(cookies))
    with opener.open(f"{web}admin/login/", timeout=10) as page:
        token = re.search(r'csrfmiddlewaretoken" value="(\w+)"', page.read().decode())
    fields = {"username": "admin", "password": password, "csrfmiddlewaretoken": token[1]}
    fields["next"] = "/admin/"
    with opener.open(f"{web}admin/login/", urllib.parse.urlencode(fields).encode()) as page:
        return page.url == f"{web}admin/"


def test_every_program_runs_and_is_named_with_its_pid(project):
    assert project.pids.keys() == PROGRAMS
    names = {name: Path(f"/proc/{pid}/cmdline") for name, pid in project.pids.items()}
    assert all(birth(pid) for pid in project.pids.values())
    if sys.platform == "linux":
        assert b"celery" in names["worker"].read_bytes()
        assert b"postgres" in names["postgres"].read_bytes()


def test_web_reaches_database_and_broker(project):
    assert get(f"{project.state['web']}health") == 200


def test_admin_takes_the_login_that_is_printed(project):
    password = (project.folder / ".dev" / "admin-password").read_text()
    assert f"admin / {password}" in project.text
    assert log_in(project.state["web"], password)


def test_printed_line_runs_a_task(project):
    line = re.search(r"(\S+ manage.py shell -c .*)", project.text)[1]
    before = len(project.successes())
    subprocess.run(line, shell=True, cwd=project.folder, env=project.environment(), check=True)  # noqa: S602
    wait_until(lambda: len(project.successes()) > before, 60)


def test_workers_share_the_queues_as_in_production(project):
    command = (sys.executable, "-m", "celery", "-A", "mysite", "inspect", "active_queues", "--json")
    answers = json.loads(project.run("run", "--", *command).stdout)
    queues = {
        node.partition("@")[0]: {one["name"] for one in all_} for node, all_ in answers.items()
    }
    assert queues == {"worker": {"default", "high", "low"}, "control": {"control"}}


def test_nobody_gets_in_without_a_password(project):
    state = project.state
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=urllib.parse.urlsplit(state["broker_url"]).port).ping()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(re.sub(":[^:@]+@", ":wrong@", state["database_url"]))
    assert get(state["flower"]) == 401


@linux
def test_everything_listens_on_loopback_only(project):
    sockets = set()
    for pid in family(project.runner.pid):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            if descriptor.is_symlink() and os.readlink(descriptor).startswith("socket:["):
                sockets.add(os.readlink(descriptor)[8:-1])
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    addresses = [line[1] for line in lines if line[3] == "0A" and line[9] in sockets]
    assert len(addresses) == 4  # PostgreSQL, Valkey, web, Flower
    assert {address.partition(":")[0] for address in addresses} == {"0100007F"}


def test_secrets_are_for_their_owner_only_and_in_no_command_line(project):
    folder = project.folder / ".dev"
    files = [
        folder / "env",
        folder / "stack.json",
        *folder.rglob("*password"),
        folder / "secret-key",
    ]
    assert len(files) == 7
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}
    secrets = [file.read_text() for file in folder.rglob("*password")]
    arguments = subprocess.check_output(["ps", "-A", "-o", "args="], text=True)
    assert not [secret for secret in secrets if secret in arguments]


def test_second_up_is_refused_in_one_line_that_names_the_first(project):
    second = project.run("up")
    assert second.returncode == 1
    assert second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert project.state["web"] in line
    assert str(project.runner.pid) in line


def test_run_uses_the_stack_that_is_up(project):
    code = "import os; print(os.environ['DATABASE_URL']); raise SystemExit(3)"
    done = project.run("run", "--", sys.executable, "-c", code)
    assert (done.stdout.strip(), done.returncode) == (project.state["database_url"], 3)


def test_run_from_a_folder_below_runs_the_command_there(project):
    code = "import os; print(os.getcwd(), os.environ['DATABASE_URL'])"
    done = subprocess.run(
        [*project.devstack, "run", "--", sys.executable, "-c", code],
        cwd=project.folder / "greetings",
        env=project.environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [f"{project.folder}/greetings", project.state["database_url"]]


@pytest.mark.faults
@pytest.mark.parametrize("names", [("worker", "web", "beat"), ("postgres", "valkey", "control")])
def test_killed_processes_come_back(project, names):
    before, position = project.pids, len(project.text)
    for name in names:
        os.kill(before[name], signal.SIGKILL)
    for name in names:
        project.wait_for_output(f"{name} DIED: killed by SIGKILL", position)
        project.wait_for_output(f"{name} is up again", position)
        wait_until(lambda name=name: project.pids[name] != before[name], 10)
    project.run_task()
    assert get(f"{project.state['web']}health") == 200
    # their logs stay in their files
    assert not re.search(r"^(postgres|valkey) *\|", project.text, re.MULTILINE)


@pytest.mark.faults
@linux
def test_killed_launcher_takes_its_worker_down_and_both_come_back(project):
    worker, position = project.pids["worker"], len(project.text)
    launcher = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())[1])
    os.kill(launcher, signal.SIGKILL)
    project.wait_for_output("worker DIED: killed by SIGKILL", position)
    project.wait_for_output("worker is up again", position)
    assert not birth(worker)
    assert project.pids["worker"] != worker


def test_code_that_cannot_be_loaded_shows_a_short_traceback_and_changes_nothing(project):
    tasks = project.folder / "greetings" / "tasks.py"
    good, before = tasks.read_text(), project.pids
    for bad, said in (("def x(:", "SyntaxError: "), ("nothing_of_this_name", "NameError: name")):
        position = len(project.text)
        tasks.write_text(f"{good}\n{bad}\n")
        project.wait_for_output(said, position)
        shown = [line for line in project.text[position:].splitlines() if line.startswith("stack")]
        assert "greetings/tasks.py changed and cannot be loaded" in shown[0]
        assert any('File "greetings/tasks.py", line' in line for line in shown)
        assert len(shown) <= 6
        project.run_task()
    # a page is no reason to give the web the code that cannot be loaded
    (project.folder / "greetings" / "page.html").write_text("news")
    wait_until(lambda: "greetings/page.html" in project.text, 30)
    assert get(f"{project.state['web']}health") == 200
    assert project.pids == before
    assert "DIED" not in project.text[position:]
    tasks.write_text(good)
    project.wait_for_output("ready again", position)
    (project.folder / "greetings" / "page.html").unlink()


def test_saved_code_is_live_and_the_reload_says_so_in_two_lines(project):
    urls, before, position = project.folder / "mysite" / "urls.py", project.pids, len(project.text)
    with urls.open("a") as file:
        file.write('urlpatterns.append(path("new-page", health))\n')
    project.wait_for_output("ready again", position)
    assert get(f"{project.state['web']}new-page") == 200
    said = project.text[position:].splitlines()
    # a busy machine: a worker that is still there after 4 s is told so
    said = [line for line in said if "worker: time is up" not in line]
    assert len(said) == 2, said
    assert "mysite/urls.py changed: web, worker, control, beat start again" in said[0]
    project.run_task()
    changed = {name for name, pid in project.pids.items() if pid != before[name]}
    assert changed == {"web", "worker", "control", "beat"}


def test_program_that_dies_while_it_starts_again_shows_what_it_said(project):
    wsgi, position = project.folder / "mysite" / "wsgi.py", len(project.text)
    good = wsgi.read_text()
    # only gunicorn imports it
    wsgi.write_text("raise LookupError('gone')\n")
    project.wait_for_output("web DIED: exit code", position)
    project.wait_for_output("LookupError: gone", position)
    wsgi.write_text(good)
    wait_until(lambda: get(f"{project.state['web']}health") == 200, 60)
    project.run_task()


def test_app_that_is_made_meanwhile_is_watched_as_well(project):
    app, position = project.folder / "later", len(project.text)
    app.mkdir()
    (app / "__init__.py").write_text("")
    project.wait_for_output("later/__init__.py changed", position)
    project.wait_for_output("ready again", position)
    position = len(project.text)
    (app / "tasks.py").write_text("")
    project.wait_for_output("later/tasks.py changed", position)
    project.wait_for_output("ready again", position)


def test_sigterm_stops_everything_in_reverse_order_and_the_data_stays(project):
    password = (project.folder / ".dev" / "admin-password").read_text()
    redis.Redis.from_url(project.state["broker_url"]).rpush("kept", "message")
    everything, position = family(project.runner.pid), len(project.text)
    assert project.down(signal.SIGTERM) == 0
    assert [pid for pid in everything if birth(pid)] == []
    assert not project.state_file.exists()
    assert not (project.folder / ".dev" / "env").exists()
    said = re.findall(r"stack +\| stopping (.*)", project.text[position:])
    assert said == ["flower, beat, control, worker, web", "valkey, postgres"]
    project.up()
    assert log_in(project.state["web"], password)
    assert redis.Redis.from_url(project.state["broker_url"]).lrange("kept", 0, -1) == [b"message"]


@pytest.mark.faults
@linux
def test_neighbour_runs_beside_it_as_an_ordinary_user_and_leaves_nothing_when_killed(
    project, tmp_path
):
    neighbour = Project(tmp_path / "neighbour", *other_user())
    neighbour.up()
    everything = family(neighbour.runner.pid)
    try:
        ports = re.compile(r":(\d+)/")
        assert not {*ports.findall(str(project.state))} & {*ports.findall(str(neighbour.state))}
        neighbour.run_task()
        assert get(f"{project.state['web']}health") == 200
        assert get(f"{neighbour.state['web']}health") == 200
    finally:
        neighbour.runner.kill()
        neighbour.runner.wait()
    wait_until(lambda: not [pid for pid in everything if birth(pid)], 30)


def test_stack_that_cannot_start_says_why_and_ends(tmp_path):
    project = Project(tmp_path / "project")
    start = time.monotonic()
    done = project.run("up", DATABASE_URL="postgres://nobody:x@127.0.0.1:1/none")
    assert done.returncode == 1
    assert time.monotonic() - start < 40
    assert "the database could not be prepared" in done.stdout
    assert "refused" in done.stdout.splitlines()[-2] + done.stdout.splitlines()[-1]
    assert "stopping valkey\n" in done.stdout
    assert not (project.folder / ".dev" / "postgres").exists()


def test_command_runs_on_services_of_its_own_when_no_stack_is_up(tmp_path):
    project = Project(tmp_path / "project")
    code = (
        "import os, psycopg, redis;"
        "database = psycopg.connect(os.environ['DATABASE_URL']);"
        "database.execute('SELECT count(*) FROM auth_user').close(); database.close();"
        "redis.Redis.from_url(os.environ['CELERY_BROKER_URL']).ping();"
        "print(open('.dev/stack.json').read()); raise SystemExit(7)"
    )
    folder = project.folder / ".dev"
    folder.mkdir()
    for stale in ("stack.json", "env"):
        (folder / stale).write_text("DATABASE_URL=left by a killed stack")
    done = project.run("run", "--", sys.executable, "-c", code)
    assert done.returncode == 7, done.stderr
    pids = json.loads(done.stdout)["processes"]
    assert pids.keys() == {"postgres", "valkey"}
    assert [pid for pid in pids.values() if birth(pid)] == []
    assert not (folder / "env").exists()
