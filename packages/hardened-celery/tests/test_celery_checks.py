"""Each system check finds its fault, says what to write, and is silent once that is written."""

import os
import re
import ssl
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, Task, shared_task
from django.core.checks import CheckMessage
from kombu import Queue

from hardened_celery import checks as celery_checks

OPTIONS = {"visibility_timeout": 900, "socket_timeout": 2, "socket_connect_timeout": 1}
SOUND = {
    "broker_url": "redis://127.0.0.1:1/0",
    "broker_transport_options": OPTIONS,
    "task_acks_late": True,
    "task_retry_on_worker_lost": True,
    "task_reject_on_worker_lost": True,
    "task_time_limit": 300,
    "worker_prefetch_multiplier": 1,
    "task_queues": [Queue("default"), Queue("high")],
    "task_default_queue": "default",
    "task_create_missing_queues": False,
}
BEAT = {"task": "job", "schedule": timedelta(minutes=1), "args": [1]}
NO_RETRY = {"task_retry_on_worker_lost": False}
NEITHER = NO_RETRY | {"task_reject_on_worker_lost": False}
EARLY = {"task_acks_late": False}
# Celery says it will ignore the attribute one day; today it obeys.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*The 'queue' task attribute")


@pytest.fixture(autouse=True)
def no_broker_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Celery prefers it to the setting.
    monkeypatch.delenv("CELERY_BROKER_URL")


def found(settings: dict[str, Any] | None = None, **options: Any) -> list[CheckMessage]:
    """Return what is found in a sound project with these settings and one task of these options."""
    app = Celery("checked", set_as_current=False, namespace="CELERY")
    app.conf.update(SOUND | (settings or {}))

    @app.task(name="job", base=Task, shared=False, **options)
    def job(number: int) -> None:
        """Do nothing."""

    for name in app.tasks.keys() - {"job"}:
        app.tasks.unregister(name)  # tasks of the project, which are shared with all apps
    return [message for rule in celery_checks.RULES for message in rule(app)]


def ids(messages: list[CheckMessage]) -> list[str]:
    return [str(message.id).removeprefix("celery.") for message in messages]


def beat(**changes: Any) -> dict[str, Any]:
    return {"beat_schedule": {"often": BEAT | changes}}


def broker(url: str, **options: Any) -> dict[str, Any]:
    return {"broker_url": url, "broker_transport_options": options}


# id, settings, options of the task, what the message names, what the hint says to write
FAULTS: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("E002", {}, {"queue": "hihg"}, "the task job", "one of default, high"),
    ("E002", {"task_default_queue": "celery"}, {}, "CELERY_TASK_DEFAULT_QUEUE", "default"),
    ("E002", {"task_routes": {"job": {"queue": "hihg"}}}, {}, "_ROUTES for 'job'", "high"),
    ("E002", {"task_routes": [{"job": "hihg"}]}, {}, "_ROUTES for 'job'", "high"),
    ("E002", beat(options={"queue": "hihg"}), {}, "beat entry 'often'", "CELERY_TASK_QUEUES"),
    ("E003", beat(task="jop"), {}, "'jop'", "Write 'job'."),
    ("E003", beat(task="something.else"), {}, "'something.else'", "imported by the workers"),
    ("E004", beat(args=[]), {}, "'number'", "what job takes"),
    ("E004", beat(kwargs={"colour": "red"}), {}, "'colour'", "what job takes"),
    ("E005", {"task_time_limit": 900}, {}, "CELERY_TASK_TIME_LIMIT allows 900 s", "to 2100"),
    ("E005", {}, {"time_limit": 1000}, "`time_limit` of the task job", "to 2300"),
    ("E005", {"worker_soft_shutdown_timeout": 600}, {}, "allows 900 s", "to 2100"),
    ("E006", {}, {"default_retry_delay": 900}, "`default_retry_delay` of the task job", "less"),
    ("E006", {}, {"retry_backoff": True, "retry_backoff_max": 3600}, "retry_backoff_max", "less"),
    ("E006", beat(options={"countdown": 3600}), {}, "`countdown` of the beat entry", "beat"),
    ("E007", {}, {"max_retries": None}, "`max_retries` of the task job is None", "a number"),
    ("E009", {"task_acks_on_timeout": False}, {}, "CELERY_TASK_ACKS_ON_TIMEOUT", "Remove it"),
    ("E009", {"task_acks_on_failure_or_timeout": False}, {}, "time limit", "Remove it"),
    ("E009", {}, {"acks_on_timeout": False}, "of the task job", "Remove it"),
    ("E010", {"accept_content": ["json", "pickle"]}, {}, "CELERY_ACCEPT_CONTENT", '"json"'),
    ("E010", {"task_serializer": "pickle"}, {}, "CELERY_TASK_SERIALIZER", '"json"'),
    ("E010", {}, {"serializer": "pickle"}, "`serializer` of the task job", '"json"'),
    ("E011", broker("filesystem://"), {}, "filesystem://", "redis://"),
    ("E011", broker("sqla+sqlite:///tasks.db"), {}, "sqla://", "redis://"),
    ("E011", broker("memory://"), {}, "memory://", "in tests only"),
    ("E012", {"broker_url": "rediss://127.0.0.1"}, {}, "rediss://", "ssl.CERT_REQUIRED"),
    ("E012", {"broker_url": "rediss://h", "broker_use_ssl": True}, {}, "rediss", "CELERY_BROKER_"),
    ("E012", {"broker_url": "rediss://h?ssl_cert_reqs=none"}, {}, "rediss://", "in the URL"),
    ("E012", broker("amqps://h") | {"broker_use_ssl": {"cert_reqs": 0}}, {}, "amqps://", "Set"),
    ("E013", {"task_always_eager": True}, {}, "CELERY_TASK_ALWAYS_EAGER", "to False"),
    ("E017", {"task_publish_retry_policy": {"max_retries": None}}, {}, "max_retries", "Write 1"),
    ("W002", {"task_create_missing_queues": True}, {}, "QUEUES = True", "CELERY_TASK_QUEUES"),
    ("W003", NO_RETRY, {}, "CELERY_TASK_REJECT_ON_WORKER_LOST", "CELERY_TASK_RETRY_ON_WORKER_LOST"),
    ("W003", {}, {"retry_on_worker_lost": False}, "the task job", "`retry_on_worker_lost`"),
    ("W004", EARLY, {}, "CELERY_TASK_ACKS_LATE is False", "to True"),
    ("W005", NEITHER, {}, "CELERY_TASK_ACKS_LATE is True", "CELERY_TASK_RETRY_ON_WORKER_LOST"),
    ("W006", {"task_time_limit": None}, {}, "CELERY_TASK_TIME_LIMIT = None", "300"),
    ("W007", {"broker_transport_options": {}}, {}, "socket_connect_timeout and no", "2 seconds"),
    ("W007", broker("amqp://h", confirm_publish=True), {}, "no read_timeout", "2 seconds"),
    ("W008", {"result_backend": "redis://h"}, {}, "CELERY_RESULT_BACKEND_TRANSPORT", "max_retries"),
    ("W009", {"worker_prefetch_multiplier": 4}, {}, "PREFETCH_MULTIPLIER = 4", "to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("identity", "settings_", "options", "named", "hint"), FAULTS)
def test_fault_is_found_and_the_hint_says_what_to_write(
    identity: str, settings_: dict[str, Any], options: dict[str, Any], named: str, hint: str
) -> None:
    messages = found(settings_, **options)
    assert ids(messages) == [identity]
    assert named in messages[0].msg
    assert hint in str(messages[0].hint)


@pytest.mark.parametrize(
    ("settings_", "options"),
    [
        ({}, {}),
        (beat(), {}),
        (beat(options={"queue": "high", "countdown": 600}), {}),
        ({"task_routes": {"job": {"queue": "high"}}}, {"queue": "high"}),
        ({"task_routes": [lambda *_: {"queue": "computed"}]}, {}),
        ({"task_time_limit": 800}, {"time_limit": 899}),
        ({}, {"retry_backoff": True}),
        ({}, {"max_retries": None, "retry_on_worker_lost": False, "reject_on_worker_lost": False,
              "acks_late": False}),
        ({}, {"acks_late": False, "time_limit": 9000}),
        (broker("amqp://h"), {"time_limit": 9000, "default_retry_delay": 9000}),
        (broker("amqp://h", confirm_publish=True, read_timeout=2), {}),
        ({"broker_url": "rediss://h", "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED}}, {}),
        ({"broker_url": "rediss://h?ssl_ca_certs=ca.pem"}, {}),
        ({"result_backend": "redis://h/1",
          "result_backend_transport_options": {"retry_policy": {"max_retries": 3}}}, {}),
    ],
)  # fmt: skip
def test_sound_project_is_left_in_peace(settings_: dict[str, Any], options: dict[str, Any]) -> None:
    assert ids(found(settings_, **options)) == []


def test_all_faults_are_reported_at_once() -> None:
    faults = {"task_time_limit": None, "worker_prefetch_multiplier": 4} | beat(task="jop")
    assert ids(found(faults)) == ["E003", "W006", "W009"]


def test_task_that_differs_is_named_and_one_that_does_not_is_not() -> None:
    by_default, by_task = found(NO_RETRY), found(retry_on_worker_lost=False)
    assert "the task job" not in by_default[0].msg
    assert "the task job" in by_task[0].msg
    assert ids(by_default) == ids(by_task) == ["W003"]


@pytest.mark.parametrize("options", [{}, {"acks_late": False}])
def test_remapped_sigterm_is_an_error_for_what_is_acknowledged_early(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("REMAP_SIGTERM", "SIGQUIT")
    messages = found({} if options else EARLY, **options)
    assert ids(messages) == ["E008"]
    assert "remove REMAP_SIGTERM" in str(messages[0].hint)
    assert ids(found()) == []


# What projects shipped for years while Celery ignored it.
NAMES = [
    ("CELERY_TASK_AKS_LATE", "E001", "Did you mean CELERY_TASK_ACKS_LATE?"),
    ("CELERY_COMPRESSION", "E001", "Did you mean CELERY_TASK_COMPRESSION?"),
    ("CELERY_SEND_TASK_ERROR_EMAILS", "E001", "Remove it; it may be a task's option."),
    ("CELERY_WORKER_LOG_LEVEL", "E001", "CELERY_WORKER_LOG_COLOR"),
    ("CELERY_TASK_MAX_RETRIES", "E001", "Remove it; it may be a task's option."),
    ("CELERY_TASK_RESULT_EXPIRES", "W001", "Write CELERY_RESULT_EXPIRES."),
    ("CELERY_MESSAGE_COMPRESSION", "W001", "Write CELERY_TASK_COMPRESSION."),
    ("CELERY_SEND_EVENTS", "W001", "Write CELERY_WORKER_SEND_TASK_EVENTS."),
    ("CELERYD_CONSUMER", "W001", "Write CELERY_WORKER_CONSUMER."),
    # old names of what this project sets under the new ones
    ("CELERY_ACKS_LATE", "E001", "Remove it: CELERY_TASK_ACKS_LATE is set."),
    ("CELERYD_TASK_TIME_LIMIT", "E001", "Remove it: CELERY_TASK_TIME_LIMIT is set."),
]


@pytest.mark.parametrize(("name", "identity", "hint"), NAMES)
def test_name_that_celery_does_not_know_is_found(
    settings: Any, name: str, identity: str, hint: str
) -> None:
    setattr(settings, name, 1)
    messages = found()
    assert ids(messages) == [identity]
    assert messages[0].msg.startswith(f"{name} ")
    assert hint in str(messages[0].hint)


@pytest.mark.parametrize("name", ["CELERY_DB_REUSE_MAX", "CELERY_REDBEAT_REDIS_URL"])
def test_name_that_others_read_is_left_in_peace(settings: Any, name: str) -> None:
    setattr(settings, name, 1)
    assert found() == []


def test_old_name_works_only_as_long_as_nothing_sets_the_new_one() -> None:
    # The reason for a warning and an error above. Celery 5.6 ignored it in both cases.
    def acks_late(**names: Any) -> Any:
        app = Celery("names", set_as_current=False)
        app.config_from_object(type("Settings", (), names), namespace="CELERY")
        return app.conf.task_acks_late

    assert acks_late(CELERY_ACKS_LATE=True) is True
    assert acks_late(CELERY_ACKS_LATE=True, CELERY_TASK_ACKS_LATE=False) is False


def test_eager_mode_is_only_a_warning_in_development(settings: Any) -> None:
    settings.DEBUG = True
    assert ids(found({"task_always_eager": True})) == ["W010"]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of a settings module, to be written."""
    module = ModuleType("imaginary.settings")
    module.__file__ = str(tmp_path / "settings.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", module.__name__)
    return tmp_path / "settings.py"


@pytest.mark.parametrize(
    ("line", "identities"),
    [
        ('CELERY_BROKER_URL = "redis://:hunter2@broker:6379/0"', ["E014"]),
        ("CELERY_BROKER_URL = env('BROKER', default='amqp://me:hunter2@broker')", ["E014"]),
        ('CELERY_BROKER_URL = f"redis://:{password}@broker"', []),
        ('CELERY_BROKER_URL = "redis://:%s@broker" % password', []),
        ('CELERY_BROKER_URL = "redis://broker:6379/0"', []),
        ('CELERY_BROKER_URL = "amqp://guest:guest@localhost//"', []),
        ('"""Set CELERY_BROKER_URL, like redis://:password@host."""', []),
        ("# redis://:hunter2@broker", []),
    ],
)
def test_password_in_the_code_is_found(source: Path, line: str, identities: list[str]) -> None:
    source.write_text(f"{line}\n")
    messages = found()
    assert ids(messages) == identities
    assert not identities or messages[0].msg.startswith(f"{source.parent.name}/settings.py:1 ")
    assert "hunter2" not in str(messages)


@pytest.mark.parametrize(
    ("key", "debug", "identities"),
    [
        ("django-insecure-x", False, ["E015"]),
        ("written-in-the-code", False, ["E015"]),
        ("written-in-the-code", True, []),
        ("from-the-environment", False, []),
    ],
)
def test_secret_key_that_others_know_is_refused_in_production(
    source: Path, settings: Any, key: str, debug: bool, identities: list[str]
) -> None:
    source.write_text('SECRET_KEY = env("DJANGO_SECRET_KEY", default="written-in-the-code")\n')
    settings.SECRET_KEY, settings.DEBUG = key, debug
    assert ids(found()) == identities


def test_debug_is_an_error_where_the_project_is_deployed(settings: Any) -> None:
    assert celery_checks.check_debug() == []
    settings.DEBUG = True
    assert ids(celery_checks.check_debug()) == ["E016"]


def test_command_finds_nothing_in_this_project() -> None:
    # in a process of its own: this one has the tasks of all tests
    options = ("--tag", "celery", "--deploy", "--fail-level", "WARNING")
    production = {
        "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
        "DJANGO_DEBUG": "0",
        "DJANGO_SECRET_KEY": "k" * 50,
    }
    command = [sys.executable, "-m", "django", "check", *options]
    said = subprocess.run(command, env=os.environ | production, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "no issues" in said.stdout


def test_tasks_are_imported_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> None:
        """Do nothing."""

    durable_jobs = pytest.importorskip("durable_jobs")
    for base in (Task, durable_jobs.JobTask):
        shared_task(name=f"tests.endless.{base.__name__}", max_retries=None, base=base)(endless)
    try:
        messages = celery_checks.check_celery()
    finally:
        for name in ("tests.endless.Task", "tests.endless.JobTask"):
            celery_checks.current_app.tasks.unregister(name)
    # a durable job's row counts its attempts
    (message,) = [m for m in messages if "tests.endless" in m.msg]
    assert (message.id, "tests.endless.Task" in message.msg) == ("celery.E007", True)


def check_plain_project(
    tmp_path: Path, package: str, settings_: str
) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a project that has heard of nothing else of ours."""
    plain = tmp_path / "plain"
    plain.mkdir(exist_ok=True)
    (plain / "__init__.py").write_text(package)
    apps = "INSTALLED_APPS = ['hardened_celery']"
    (plain / "settings.py").write_text(f"SECRET_KEY = 'x'\nDEBUG = True\n{apps}\n{settings_}\n")
    command = [sys.executable, "-m", "django", "check", "--tag", "celery"]
    environment = {"DJANGO_SETTINGS_MODULE": "plain.settings", "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


APP = """
from celery import Celery
app = Celery("plain")
app.config_from_object("django.conf:settings", namespace={!r})
app.autodiscover_tasks()
"""


@pytest.mark.parametrize(
    ("package", "settings_", "identities"),
    [
        (APP.format("CELERY"), "CELERY_BROKER_URL = 'redis://h'", "W002 W004 W006 W007"),
        (APP.format("CELERY"), "CELERY_BROKER_URL = 'amqp://h'", "W002 W004 W006"),
        (APP.format("WORK"), "WORK_BROKER_URL = 'amqp://h'; WORK_IT = 1", "E001 W002 W004 W006"),
        ("", "CELERY_BROKER_URL = 'redis://h'", "W011"),
    ],
)
def test_added_to_a_plain_project_it_only_finds_what_is_wrong(
    tmp_path: Path, package: str, settings_: str, identities: str
) -> None:
    result = check_plain_project(tmp_path, package, settings_)
    said = sorted(re.findall(r"celery\.([EW]\d+)", result.stderr))
    assert said == identities.split()
    assert result.returncode == ("E" in identities)


NO_QUEUES = "CELERY_TASK_CREATE_MISSING_QUEUES = False; CELERY_TASK_QUEUES = 7"


@pytest.mark.parametrize(
    ("package", "settings_", "says"),
    [
        (APP.format("CELERY"), "CELERY_BROKER_URL = 'nonsense://h'", "No such transport: nonsense"),
        (APP.format("CELERY"), "CELERY_IMPORTS = ['plain.gone']", "No module named 'plain.gone'"),
        (APP.format("CELERY"), "CELERY_IMPORTS = ['plain.broken']", "(broken.py, line 1)"),
        (
            APP.format("CELERY"),
            "CELERY_TASK_CREATE_MISSING_QUEUES = False; CELERY_TASK_QUEUES = 7",
            "'int' object is not iterable",
        ),
        (APP.format("CELERY"), "CELERY_BEAT_SCHEDULE = {'x': 1}", "'int' object has no attribute"),
        # the port is a part of the password
        (APP.format("CELERY"), "CELERY_BROKER_URL = 'redis://:pw/x@h'", "integer value as '...'"),
    ],
)
def test_check_that_raises_is_a_warning_and_the_others_still_look(
    tmp_path: Path, package: str, settings_: str, says: str
) -> None:
    (tmp_path / "plain").mkdir()
    if "broken" in settings_:
        (tmp_path / "plain" / "broken.py").write_text("def broken(:\n")
    said = check_plain_project(tmp_path, package, f"CELERY_TASK_AKS_LATE = 1; {settings_}")
    warnings = [line for line in said.stderr.splitlines() if "celery.W012" in line]
    assert len({*warnings}) == len(warnings)
    assert any(says in line for line in warnings), said.stderr
    assert "celery.E001" in said.stderr
    assert "Traceback" not in said.stderr


def test_every_fault_has_a_test() -> None:
    (folder,) = celery_checks.__path__
    source = "".join(path.read_text() for path in Path(folder).glob("*.py"))
    rules = set(re.findall(r'"([EW]\d{3})"', source))
    tests = set(re.findall(r"\b([EW]\d{3})\b", Path(__file__).read_text()))
    assert rules == tests
