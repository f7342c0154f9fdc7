"""Health of the web process."""

import contextlib
import socket
import threading

import pytest
from django.db import connections
from django.test import Client

from tests.conftest import wait_until

QUESTIONS = ("/healthz/ready?only=database", "/healthz/queues", "/metrics")


class Proxy:
    """Stands before PostgreSQL. While `frozen`, it swallows all ("connect"), or what follows the
    login ("query"); such a connection stays open and silent after that, others are served."""

    def __init__(self, settings: dict) -> None:
        host, port = settings["HOST"], settings["PORT"] or 5432
        self.family = socket.AF_UNIX if host.startswith("/") else socket.AF_INET
        self.target = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))
        self.frozen, self.sockets = "", []
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            self.sockets.append(client)
            if self.frozen == "connect":
                continue
            database = socket.socket(self.family)
            database.connect(self.target)
            self.sockets.append(database)
            muted = threading.Event()
            for pair in ((client, database), (database, client)):
                threading.Thread(target=self.pump, args=(*pair, muted), daemon=True).start()

    def pump(self, source, sink, muted: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if muted.is_set():
                    continue
                if self.frozen == "query" and b"Z\0\0\0\5I" in data:  # ready for a query
                    muted.set()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for each in (self.server, *self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def proxy(settings):
    """A proxy that the checks reach the database through; its connections end with the test."""
    settings.QUEUE_PROBES = {"TIMEOUT": 0.5}
    known = connections["default"].settings_dict
    proxy, before = Proxy(known), {name: known[name] for name in ("HOST", "PORT")}
    known.update(HOST="127.0.0.1", PORT=proxy.server.getsockname()[1])
    yield proxy
    known.update(before)
    proxy.close()
    wait_until(nothing_hangs)


def nothing_hangs() -> bool:
    return not any(thread.name.startswith("health-") for thread in threading.enumerate())


def test_live_needs_neither_database_nor_broker(client: Client) -> None:
    # no `django_db` mark: a query would fail this test
    assert client.get("/healthz/live").status_code == 200


@pytest.mark.parametrize("path", ["/healthz/live", "/healthz/ready", "/healthz/queues", "/metrics"])
@pytest.mark.django_db(transaction=True)
def test_health_is_told_to_who_asks_by_address(path: str, settings) -> None:
    settings.ALLOWED_HOSTS, settings.DEBUG = ["example.com"], False
    assert Client(headers={"Host": "10.1.2.3:8000"}).get(path).status_code in {200, 503}
    assert Client(headers={"Host": "10.1.2.3:8000"}).get("/status/").status_code == 400


@pytest.mark.django_db
def test_ready_reaches_database_and_broker(client: Client) -> None:
    answer = client.get("/healthz/ready")
    assert (answer.status_code, answer.json()) == (200, {"database": "ok", "broker": "ok"})


@pytest.mark.django_db
def test_ready_names_the_broker_that_is_down(client: Client, monkeypatch, free_port: int) -> None:
    url = f"redis://:secret@127.0.0.1:{free_port}/0"
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", url)
    answer = client.get("/healthz/ready")
    assert answer.status_code == 503
    assert answer.json() == {"database": "ok", "broker": "OperationalError"}


@pytest.mark.django_db
def test_ready_can_leave_the_broker_out(client: Client, monkeypatch, free_port: int) -> None:
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", f"redis://127.0.0.1:{free_port}/0")
    answer = client.get("/healthz/ready?only=database")
    assert (answer.status_code, answer.json()) == (200, {"database": "ok"})
    answer = client.get("/healthz/ready?only=databse")
    assert answer.status_code == 400
    assert answer.json() == {"error": "only=databse: there are database, broker"}


@pytest.mark.django_db(transaction=True)
def test_ready_names_the_database_that_is_down(client: Client, free_port: int) -> None:
    database = connections["default"]
    database.close()
    port = database.settings_dict["PORT"]
    database.settings_dict["PORT"] = free_port
    try:
        answer = client.get("/healthz/ready")
    finally:
        database.close()
        database.settings_dict["PORT"] = port
    assert answer.status_code == 503
    assert answer.json() == {"database": "OperationalError", "broker": "ok"}


@pytest.mark.parametrize("frozen", ["connect", "query"])
@pytest.mark.django_db(transaction=True)
def test_a_database_that_answers_again_is_seen_though_checks_hang(client, proxy, frozen) -> None:
    proxy.frozen = frozen
    for _ in range(6):
        assert [client.get(path).status_code for path in QUESTIONS] == [503] * 3
    if frozen == "connect":  # each ends by itself
        wait_until(nothing_hangs, 10)
    proxy.frozen = ""
    for path in QUESTIONS:
        wait_until(lambda path=path: b"TimeoutError" not in client.get(path).content, 10, path)


@pytest.mark.django_db(transaction=True)
def test_a_process_that_could_start_no_thread_goes_on_when_it_can(client: Client) -> None:
    before = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread(target=print).start()
        for _ in range(6):
            answers = [client.get(path) for path in QUESTIONS]
            assert all(b"RuntimeError" in answer.content for answer in answers)
    finally:
        threading.stack_size(before)
    assert all(b"Error" not in client.get(path).content for path in QUESTIONS)
