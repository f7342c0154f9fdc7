"""The Celery settings do what their comments say: on real sockets, a real broker, a real worker."""

import os
import runpy
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, current_app
from celery.app.defaults import DEFAULTS
from celery.exceptions import QueueNotFound
from kombu.exceptions import OperationalError

from devstack import valkey
from devstack.processes import Process, stop, wait_until_ready
from tests.processes import running_worker, wait_until
from tests.wiring import TEMPLATE_SETTINGS

PUBLISHER = ["gunicorn", "config.wsgi"]
WORKER = ["celery", "-A", "config", "worker", "-Q", "high"]
LONGEST = 7  # seconds that publishing may take, as the settings say
URLS = ["redis://h/0", "rediss://h/0", "sentinel://h", "amqp://h//", "amqps://h//", "pyamqp://h//"]


def load(url: str, argv: list[str] = PUBLISHER, **environment: str) -> dict[str, Any]:
    """Return the settings of a process that was started by the command `argv`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CELERY_RESULT_BACKEND", raising=False)
        for name, value in {"CELERY_BROKER_URL": url, **environment}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", argv)
        names = runpy.run_path(str(TEMPLATE_SETTINGS))
    return {name: names[name] for name in names["__all__"]}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that makes an app with the task `job` from settings, closed at the end."""
    # Celery prefers them to the settings.
    monkeypatch.delenv("CELERY_BROKER_URL")
    monkeypatch.delenv("CELERY_RESULT_BACKEND", raising=False)
    with ExitStack() as stack:

        def make(settings: dict[str, Any], **options: Any) -> Celery:
            made = Celery("made", set_as_current=False)
            made.conf.update({k.removeprefix("CELERY_").lower(): v for k, v in settings.items()})
            made.task(name="job", base=Task, shared=False, **options)(do_nothing)
            stack.callback(made.close)
            return made

        yield make


def do_nothing() -> None:
    """Do nothing."""


def publish(app: Celery, queue: str = "high", **options: Any) -> None:
    app.tasks["job"].apply_async(queue=queue, **options)


def seconds_until_it_fails(app: Celery, **options: Any) -> float:
    started = time.monotonic()
    with pytest.raises(OperationalError):
        publish(app, **options)
    return time.monotonic() - started


def test_star_import_brings_nothing_but_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TEMPLATE_SETTINGS.parent)
    names: dict[str, Any] = {}
    exec("from celery_settings import *", names)  # noqa: S102
    assert len(names) > 20
    assert {name for name in names if not name.startswith("CELERY_")} == {"__builtins__"}


@pytest.mark.parametrize("url", URLS)
def test_every_name_is_one_that_celery_reads(url: str) -> None:
    names = load(url, CELERY_RESULT_BACKEND="rediss://h/1")
    assert {name.removeprefix("CELERY_").lower() for name in names} <= DEFAULTS.keys()


@pytest.mark.parametrize("url", ["", "filesystem://", "sqs://me:hunter2@", "h:6379", "hunter2@h"])
def test_broker_that_is_not_supported_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ValueError, match="CELERY_BROKER_URL") as refusal:
        load(url)
    assert "redis://, rediss://, sentinel://, amqp://, amqps://, pyamqp://" in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize("url", URLS[:3])
def test_nothing_that_runs_or_waits_is_delivered_again(url: str) -> None:
    settings = load(url)
    options = settings["CELERY_BROKER_TRANSPORT_OPTIONS"]
    assert settings["CELERY_TASK_SOFT_TIME_LIMIT"] < settings["CELERY_TASK_TIME_LIMIT"] == 300
    assert options["visibility_timeout"] == 900
    # the smallest applies to all processes, so they must not differ
    assert load(url, WORKER)["CELERY_BROKER_TRANSPORT_OPTIONS"]["visibility_timeout"] == 900
    assert settings["CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS"] is False


@pytest.mark.parametrize("url", URLS[3:])
def test_rabbitmq_confirms_messages_and_drops_what_it_will_deliver_again(url: str) -> None:
    settings = load(url)
    wanted = {"confirm_publish": True, "read_timeout": 2, "write_timeout": 2}
    assert settings["CELERY_BROKER_TRANSPORT_OPTIONS"] == wanted
    assert settings["CELERY_BROKER_HEARTBEAT"] == 30
    assert settings["CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS"] is True


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """Return a Valkey of this module's own, and its URL."""
    process, url = valkey.process(tmp_path_factory.mktemp("broker"))
    process.start()
    try:
        wait_until_ready([process])
        yield process, url
    finally:
        stop([process])


COMMANDS = [
    (WORKER, (10, 3)),
    (["/venv/celery/__main__.py", "--app=config", "beat", "-s", "/data/schedule"], (10, 3)),
    (PUBLISHER, (2, 1)),
    (["manage.py", "shell"], (2, 1)),
    (["celery", "-A", "config", "flower"], (2, 1)),
]


@pytest.mark.parametrize(("command", "timeouts"), COMMANDS)
def test_sockets_of_worker_and_beat_are_patient_and_all_others_are_not(
    app: Any, broker: tuple[Process, str], command: list[str], timeouts: tuple[int, int]
) -> None:
    with app(load(broker[1], command)).connection_for_write() as connection:
        opened = connection.default_channel.client.connection_pool.get_connection()
        assert (opened.socket_timeout, opened.socket_connect_timeout) == timeouts
        assert opened._sock.gettimeout() == timeouts[0]
        assert opened._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_running_worker_has_the_timeouts_of_a_worker(
    tmp_path: Path, project_environment: dict[str, str]
) -> None:
    assert current_app.conf.broker_connection_timeout == 2
    with running_worker(tmp_path / "log", project_environment, "-Q", "high", "-n", "w@h"):
        inspect = current_app.control.inspect(destination=["w@h"], timeout=1)
        conf = wait_until(inspect.conf, what="the worker tells its settings")["w@h"]
        stats = wait_until(inspect.stats, what="the worker tells its state")["w@h"]
    assert conf["CELERY_BROKER_CONNECTION_TIMEOUT"] == 4
    assert conf["CELERY_TASK_PUBLISH_RETRY_POLICY"]["max_retries"] == 3
    assert 0 < stats["pool"]["max-concurrency"] <= (os.cpu_count() or 1)  # "auto"


# --- Publishing -----------------------------------------------------------------------------------


def refusing(stack: ExitStack) -> socket.socket:
    """Return a port that is taken, so that nobody else answers, and listens to nobody."""
    taken = stack.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    return taken


def silent(stack: ExitStack) -> socket.socket:
    """Return a server whose system accepts connections, and which never answers."""
    return stack.enter_context(socket.create_server(("127.0.0.1", 0)))


def dropping(stack: ExitStack) -> socket.socket:
    """Return a server whose queue of connections is full, so that the system drops new ones."""
    server = stack.enter_context(socket.socket())
    server.bind(("127.0.0.1", 0))
    server.listen(0)
    for _ in range(8):
        caller = stack.enter_context(socket.socket())
        caller.setblocking(False)
        caller.connect_ex(server.getsockname())
    return server


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{}/0", "amqp://127.0.0.1:{}//"])
@pytest.mark.parametrize(
    ("broken", "longest"),
    [
        (refusing, 2),
        (silent, LONGEST),
        pytest.param(
            dropping,
            LONGEST,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="others refuse, not drop"),
        ),
    ],
)
def test_publishing_fails_soon_when_the_broker_is_out_of_reach(
    app: Any, url: str, broken: Any, longest: float
) -> None:
    with ExitStack() as stack:
        port = broken(stack).getsockname()[1]
        took = seconds_until_it_fails(app(load(url.format(port))))
    print(f"{url.partition(':')[0]}, {broken.__name__}: {took:.1f} s")
    assert took < longest


def test_publishing_fails_soon_when_the_broker_freezes_and_works_when_it_is_back(
    app: Any, broker: tuple[Process, str]
) -> None:
    process, url = broker
    web = app(load(url))
    publish(web)
    process.send(signal.SIGSTOP)
    try:
        took = seconds_until_it_fails(web)
        without_retry = seconds_until_it_fails(web, retry=False)
        took_of_threads = seconds_of_threads_until_all_fail(web, 30)
    finally:
        process.send(signal.SIGCONT)
    print(
        f"frozen: {took:.1f} s, {without_retry:.1f} s with retry=False,"
        f" {took_of_threads:.1f} s for the last of 30 threads"
    )
    assert took < LONGEST
    assert without_retry < LONGEST
    assert took_of_threads < LONGEST
    publish(web)


def seconds_of_threads_until_all_fail(app: Celery, count: int) -> float:
    """Publish from `count` threads at once, more than there are connections in the pool."""
    took: list[float] = []
    threads = [
        threading.Thread(target=lambda: took.append(seconds_until_it_fails(app)))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) == count
    return max(took)


def test_queue_that_is_not_declared_is_refused_when_a_task_is_sent(
    app: Any, broker: tuple[Process, str]
) -> None:
    web = app(load(broker[1]))
    with pytest.raises(QueueNotFound, match="hihg"):
        publish(web, queue="hihg")
    with web.connection_for_write() as connection:
        assert not connection.default_channel.client.keys("*hihg*")


@pytest.mark.parametrize("url", URLS)
def test_no_queue_gets_what_is_meant_for_another(app: Any, url: str) -> None:
    queues = app(load(url)).amqp.queues
    names = ["default", "high", "low", "control"]
    assert [(q.name, q.exchange.name, q.routing_key) for q in queues.values()] == [
        (name, name, name) for name in names
    ]


# --- Results, certificates, eager mode ------------------------------------------------------------


def test_result_backend_is_off_unless_the_environment_names_one(app: Any) -> None:
    assert app(load(URLS[0])).backend.as_uri() == "disabled://"


def test_publishing_does_not_touch_the_result_backend_unless_a_result_is_wanted(
    app: Any, broker: tuple[Process, str]
) -> None:
    with ExitStack() as stack:
        port = refusing(stack).getsockname()[1]
        settings = load(broker[1], CELERY_RESULT_BACKEND=f"redis://127.0.0.1:{port}/0")
        started = time.monotonic()
        publish(app(settings))
        without = time.monotonic() - started
        with pytest.raises(RuntimeError, match="Retry limit"):
            publish(app(settings, ignore_result=False))
        wanted = time.monotonic() - started - without
    print(f"result backend refuses: {without:.2f} s ignored, {wanted:.2f} s wanted")
    assert without < 2
    assert wanted < LONGEST


def test_certificates_are_verified(app: Any) -> None:
    redis = load("rediss://h", CELERY_RESULT_BACKEND="rediss://h/1")
    assert redis["CELERY_BROKER_USE_SSL"] == {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    assert app(redis).backend.connparams["ssl_cert_reqs"] == ssl.CERT_REQUIRED
    assert load("amqps://h")["CELERY_BROKER_USE_SSL"] == {"server_hostname": None}
    assert "CELERY_BROKER_USE_SSL" not in load("redis://h")


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("0", False), ("", False), ("no", False)]
)
def test_eager_mode_is_switched_on_by_one_variable(value: str, on: bool) -> None:
    assert load(URLS[0], CELERY_TASK_ALWAYS_EAGER=value)["CELERY_TASK_ALWAYS_EAGER"] is on


def test_lost_task_runs_again_soon_unless_it_names_a_delay_of_its_own(app: Any) -> None:
    settings = load(URLS[0])
    assert app(settings).tasks["job"].default_retry_delay == 30
    assert app(settings, default_retry_delay=5).tasks["job"].default_retry_delay == 5
