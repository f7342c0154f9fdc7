"""Health of the web process."""

import pytest
from django.db import connections
from django.test import Client


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
