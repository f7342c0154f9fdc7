"""Each thing that would silently do nothing, or fail at night, is said by `manage.py check`."""

from datetime import timedelta
from unittest.mock import Mock

import pytest
from celery import Celery, Task, current_app, shared_task
from django.contrib.auth.models import Group

from durable_jobs import JobTask, checks, reconciler, reconcilers

ENTRY = {"task": "durable_jobs.reconcile", "schedule": 5}


def do_nothing(pk=None):
    return None


def ids():
    return [message.id.removeprefix("durable_jobs.") for message in checks.check_all()]


@pytest.fixture
def make():
    """Make tasks that no other test sees."""
    before = set(current_app.tasks)

    def make(name, base, **options):
        return shared_task(base=base, name=f"shop.{name}", **options)(do_nothing)

    yield make
    for name in set(current_app.tasks) - before:
        current_app.tasks.unregister(name)
        reconcilers._registered.pop(name, None)


def test_a_project_that_is_in_order_gets_no_message():
    assert ids() == []


def test_the_first_protocol_of_celery_is_refused():
    current_app.conf.task_protocol = 1
    try:
        assert ids() == ["E011"]
    finally:
        current_app.conf.task_protocol = 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE", "30"),
        ("LEASE", timedelta(seconds=30)),
        ("LEASE", None),
        ("MAX_ATTEMPTS", 0),
        ("MAX_ATTEMPTS", 1.5),
        ("TICK", True),
        ("DATABASE", None),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_names_it(settings, name, value):
    settings.DURABLE_JOBS = {name: value}
    (message,) = checks.check_all()
    assert message.id == "durable_jobs.E007"
    assert message.msg == f"DURABLE_JOBS[{name!r}] is {value!r}."


@pytest.mark.parametrize("value", [None, ["LEASE"]])
def test_settings_that_are_no_dict_are_an_error(settings, value):
    settings.DURABLE_JOBS = value
    (message,) = checks.check_all()
    assert (message.id, message.msg) == ("durable_jobs.E007", f"DURABLE_JOBS is {value!r}.")


@pytest.mark.parametrize(("name", "value"), [("LEASE", 60), ("SLICE_MAX", 1), ("TICK", 2.5)])
def test_whole_numbers_and_fractions_are_fine_for_spans(settings, name, value):
    settings.DURABLE_JOBS = {name: value}
    assert ids() == []


def test_a_celery_app_that_django_does_not_load_is_an_error(monkeypatch):
    default = Celery("default", loader="default", set_as_current=False)
    monkeypatch.setattr(checks, "current_app", Mock(_get_current_object=lambda: default))
    assert ids() == ["E008"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["W004"]),
        ({"queue": "default"}, ["W004"]),
        ({"queue": "control"}, []),
        ({"queue": "nobody-declared-it"}, []),
    ],
)
def test_a_loop_behind_all_other_tasks_is_a_warning(settings, options, expected):
    settings.CELERY_BEAT_SCHEDULE = {"loop": {**ENTRY, "options": options}}
    assert ids() == expected


@pytest.mark.parametrize("option", [{"atomic": True}, {"max_attempts": 3}, {"rerun": False}])
def test_an_option_that_a_plain_task_would_ignore_is_an_error(make, option):
    make("plain", Task, **option)
    (message,) = checks.check_all()
    assert message.id == "durable_jobs.E009"
    assert message.msg.startswith("The task shop.plain is plain Celery")
    assert next(iter(option)) in message.msg


def test_a_reconciler_of_a_plain_task_is_an_error(make):
    reconciler(Group.objects.all)(make("plain", Task))
    assert ids() == ["E009"]


def test_a_project_without_any_durable_task_is_warned(make, monkeypatch):
    monkeypatch.setattr(checks, "own_tasks", lambda app: {"shop.plain": make("plain", Task)})
    assert ids() == []  # this project's tasks are durable by default
    monkeypatch.setattr(current_app._get_current_object(), "Task", Task)
    assert ids() == ["W005"]


class Audited(Task):
    """A base as projects have them, and a task as a class."""

    name = "shop.audited"

    def run(self):
        return None


def test_a_task_that_is_plain_because_of_its_own_base_is_a_warning(make, monkeypatch):
    make("opted_out", Task)
    make("durable", type("Durable", (JobTask,), {}))
    make("based", Audited)
    current_app.register_task(Audited())
    found = checks.check_all()
    assert [message.id for message in found] == ["durable_jobs.W007"] * 2
    assert [message.msg.split()[2] for message in found] == ["shop.audited", "shop.based"]
    assert all("class Audited(JobTask)" in message.hint for message in found)
    monkeypatch.setattr(current_app._get_current_object(), "Task", Task)
    assert "W007" not in ids()  # where tasks are plain unless they ask for more


def test_a_rate_limit_of_a_durable_task_is_a_warning(make):
    make("plain", Task, rate_limit="1/m")
    make("durable", JobTask, rate_limit="1/m")
    (message,) = checks.check_all()
    assert (message.id, "shop.durable" in message.msg) == ("durable_jobs.W006", True)
