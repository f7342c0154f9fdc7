"""Log lines of web, worker and beat as real processes: JSON, with ids that tie them together."""

import decimal
import io
import json
import logging
import logging.config
import math
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from celery import current_app
from django.apps import apps

from hardened_celery.logging import logging_config
from tests import observed
from tests.observed import tasks
from tests.processes import wait_until

SECRET = secrets.token_hex()
REQUEST_ID = "request-of-a-test"
Lines = list[dict[str, Any]]


def lines(log: Path) -> Lines:
    """Return the lines of a log; each has to be an object in JSON."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def having(lines: Lines, **fields: Any) -> Lines:
    return [line for line in lines if fields.items() <= line.items()]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lines]:
    """Run web, worker and beat, ask for some pages, and return what each program logged."""
    folder = tmp_path_factory.mktemp("logs")
    port = observed.free_port()
    environment = observed.environment()
    # -q: no banner, which is no log line
    celery = "celery", "-q", "-A", "tests.app"
    worker, web, beat = (folder / name for name in ("worker", "web", "beat"))
    with (
        observed.program(worker, environment, *celery, "worker", "-c", "1"),
        observed.program(beat, environment, *celery, "beat", "-s", str(folder / "schedule")),
        observed.web(web, port, environment),
    ):
        for path in ("/healthz/live", "/nowhere", f"/fail?q={SECRET}"):
            observed.status(port, path)
        observed.status(port, f"/send?q={SECRET}", X_Request_ID=REQUEST_ID)
        for text in ("from beat", "from a view", "from a task"):
            wait_until(lambda text=text: text in worker.read_text(), 60, f"a line {text}")
        tasks.fail.delay(SECRET, password=SECRET)
        wait_until(lambda: "on purpose" in worker.read_text(), 60, "the task fails")
        # before they are asked to stop: Celery prints its farewell
        return {path.name: lines(path) for path in (worker, web, beat)}


def test_each_line_has_time_level_logger_and_event(logs: dict[str, Lines]) -> None:
    for name, found in logs.items():
        assert found, name
        for line in found:
            assert {"timestamp", "level", "logger", "event"} <= line.keys()


def test_task_carries_the_request_id_of_the_view_that_sent_it(logs: dict[str, Lines]) -> None:
    (sent,) = having(logs["web"], event="task_enqueued")
    (spoken,) = having(logs["worker"], event="from a view")
    assert sent["request_id"] == spoken["request_id"] == REQUEST_ID
    assert sent["child_task_id"] == spoken["task_id"]
    assert spoken["task"] == tasks.speak_twice.name


def test_task_sent_by_a_task_carries_the_same_request_id(logs: dict[str, Lines]) -> None:
    (parent,) = having(logs["worker"], event="from a view")
    (sent,) = having(logs["worker"], event="task_enqueued")
    (child,) = having(logs["worker"], event="from a task")
    assert child["request_id"] == REQUEST_ID
    assert child["task_id"] == sent["child_task_id"]
    assert child["parent_task_id"] == parent["task_id"]
    assert child["task"] == tasks.speak.name


def test_task_sent_by_beat_has_the_id_that_beat_logged(logs: dict[str, Lines]) -> None:
    spoken = having(logs["worker"], event="from beat")[0]
    assert "request_id" not in spoken
    assert having(logs["beat"], event="task_enqueued", child_task_id=spoken["task_id"])


def test_task_leaves_a_line_at_its_start_and_one_at_its_end(logs: dict[str, Lines]) -> None:
    (spoken,) = having(logs["worker"], event="from a view")
    own = [line["event"] for line in having(logs["worker"], task_id=spoken["task_id"])]
    assert own == ["task_started", "from a view", "task_enqueued", "task_succeeded"]


def test_fields_of_a_log_call_are_fields_of_the_line(logs: dict[str, Lines]) -> None:
    assert having(logs["worker"], event="from a view", order=7)


def test_warnings_of_python_are_log_lines(logs: dict[str, Lines]) -> None:
    (warning,) = [line for line in logs["web"] if "a view warns" in line["event"]]
    assert warning["logger"] == "py.warnings"
    assert warning["request_id"] == REQUEST_ID


@pytest.mark.parametrize(
    ("program", "event", "message"),
    [("web", "request_failed", "a view fails"), ("worker", "task_failed", "on purpose")],
)
def test_traceback_is_inside_one_line(
    logs: dict[str, Lines], program: str, event: str, message: str
) -> None:
    (failure,) = [line for line in logs[program] if message in line.get("exception", "")]
    assert failure["event"] == event
    assert failure["level"] == "error"
    assert failure["exception"].startswith("Traceback (most recent call last):\n")
    assert failure["exception"].endswith(f"ValueError: {message}")


def test_request_is_one_line_with_its_duration_and_health_checks_are_none(
    logs: dict[str, Lines],
) -> None:
    finished = having(logs["web"], event="request_finished")
    assert [line["request"] for line in finished] == ["GET /nowhere", "GET /send"]
    assert [line["code"] for line in finished] == [404, 200]
    assert [line["level"] for line in finished] == ["warning", "info"]
    assert all(line["duration_ms"] >= 0 for line in finished)
    assert not having(logs["web"], logger="gunicorn.access")


def test_neither_query_strings_nor_arguments_nor_addresses_are_logged(
    logs: dict[str, Lines],
) -> None:
    text = json.dumps(logs)
    assert SECRET not in text
    assert "Python-urllib" not in text
    assert not any("ip" in line for found in logs.values() for line in found)


def test_value_that_is_not_json_in_the_context_does_not_stop_a_task() -> None:
    with structlog.contextvars.bound_contextvars(basket=object()):
        tasks.speak.delay("sent nevertheless")
    current_app.control.purge()


class Key:
    """A primary key of a class of its own."""

    def __init__(self, text: Any) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("key", "inherited"),
    [
        (7, 7),
        ("a", "a"),
        (True, "True"),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        (Key("k"), "k"),
        ((1, Key("k")), None),
        (b"\xff", "b'\\xff'"),
        (decimal.Decimal("NaN"), "NaN"),
        (math.nan, "nan"),
        (2**60, str(2**60)),
        (10**5000, None),
        ("a\0b", "ab"),
        ("\ud800", "\\ud800"),
        (Key(None), None),
        ("x" * 10_000, "x" * 200),
        (None, None),
    ],
    ids=[str(number) for number in range(16)],
)
@pytest.mark.django_db
def test_key_of_a_user_of_any_class_never_fails_a_call(key: Any, inherited: Any) -> None:
    pytest.importorskip("durable_jobs")
    from tests.observed import jobs

    with structlog.contextvars.bound_contextvars(user_id=key, request_id="r"):
        tasks.speak.delay("sent nevertheless")
        job = jobs.fail_once.delay()
    current_app.control.purge()
    row = apps.get_model("durable_jobs.Job").objects.get(pk=job.id)
    context = row.options["headers"]["__django_structlog__"]
    assert context["request_id"] == "r"
    if inherited is None:
        assert len(str(context.get("user_id", ""))) <= 200
    else:
        assert context["user_id"] == inherited


@contextmanager
def configured(*, json_lines: bool) -> Iterator[io.StringIO]:
    """Log to a buffer with the project's configuration, for a logger `shop`."""
    config = logging_config(json_lines=json_lines, level="INFO")
    buffer = io.StringIO()
    config["handlers"]["stderr"]["stream"] = buffer
    config["loggers"] = {"shop": {"handlers": ["stderr"], "propagate": False, "level": "INFO"}}
    del config["root"]
    logging.config.dictConfig(config)
    yield buffer
    logging.getLogger("shop").handlers.clear()


@pytest.mark.parametrize("logger", [logging.getLogger("shop"), structlog.get_logger("shop")])
def test_structlog_and_standard_library_write_the_same_line(logger: Any) -> None:
    with configured(json_lines=True) as written:
        logger.warning("sold out")
    line = json.loads(written.getvalue())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "sold out", "level": "warning", "logger": "shop"}


def test_development_reads_like_text() -> None:
    with configured(json_lines=False) as written:
        logging.getLogger("shop").warning("sold out", extra={"order": 7})
    assert "[warning  ] sold out" in written.getvalue()
    assert "order=7" in written.getvalue()


def test_object_that_is_not_json_is_written_as_its_repr() -> None:
    with configured(json_lines=True) as written:
        logging.getLogger("shop").warning("odd", extra={"thing": {1}})
    assert json.loads(written.getvalue())["thing"] == "{1}"
