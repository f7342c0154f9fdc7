"""What `deploy` asks of a release: can it run what the release before still sends?"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from django.test import modify_settings
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as tried
from hypothesis import strategies as st

from durable_jobs import Job
from queue_probes.conf import queues
from queue_probes.models import Node, Queue
from rollout.release import doubts, found_in_settings
from rollout.signs import now, without_answer, without_worker
from rollout.tasks import Parameter, check, refusals, tasks
from rollout.tasks import queues as queues_of_release
from tests.app import sleep
from tests.conftest import Ask, Crew, wait_until

pytestmark = pytest.mark.django_db
KINDS = list(inspect._ParameterKind)
DEFAULTS = st.sampled_from([None, inspect.Parameter.empty])


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    return [
        Parameter(p.name, p.kind.name, p.default is not p.empty or p.kind in (2, 4))
        for p in inspect.signature(function).parameters.values()
    ]


@st.composite
def signatures(draw: st.DrawFn) -> inspect.Signature:
    """Any signature of up to four parameters out of four names."""
    names = draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=4))
    kinds = sorted(draw(st.sampled_from(KINDS)) for _ in names)
    found: list[inspect.Parameter] = []
    optional = False
    for name, kind in zip(names, kinds, strict=True):
        if kind in (2, 4):
            # `bind` refuses f(a, /, **rest) an `a` in `rest`, which Python takes
            if any(p.kind in (kind, 0 if kind == 4 else kind) for p in found):
                continue
            found.append(inspect.Parameter(name, kind))
        else:
            optional = draw(st.booleans()) or (optional and kind < 2)
            default = None if optional else inspect.Parameter.empty
            found.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(found)


def listed(signature: inspect.Signature) -> list[Parameter]:
    return [
        Parameter(p.name, p.kind.name, p.default is not p.empty or p.kind in (2, 4))
        for p in signature.parameters.values()
    ]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[inspect.Signature, inspect.Signature]:
    """A signature, and one that came of it by a change or two."""
    old = draw(signatures())
    found = list(old.parameters.values())
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(found)))
        change = draw(st.sampled_from(["add", "drop", "kind", "default"]))
        if change == "add" or place == len(found):
            free = sorted(set("abcdefg") - {p.name for p in found})
            kind = draw(st.sampled_from(KINDS))
            default = inspect.Parameter.empty if kind in (2, 4) else draw(DEFAULTS)
            found.insert(place, inspect.Parameter(free[0], kind, default=default))
        elif change == "drop":
            del found[place]
        elif change == "kind":
            kind = draw(st.sampled_from(KINDS))
            default = inspect.Parameter.empty if kind in (2, 4) else found[place].default
            found[place] = inspect.Parameter(found[place].name, kind, default=default)
        elif found[place].kind not in (2, 4):
            found[place] = found[place].replace(default=draw(DEFAULTS))
    # `bind` refuses f(a, /, **rest) an `a` in `rest`, which Python takes
    assume(not {0, 4} <= {p.kind for p in found})
    try:
        return old, inspect.Signature(sorted(found, key=lambda p: p.kind))
    except ValueError:
        assume(False)
        raise


@tried(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    pairs(),
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(10, 19), max_size=4),
)
def test_what_is_not_refused_runs_with_each_argument_under_its_name(
    pair: tuple[inspect.Signature, inspect.Signature], args: list[int], kwargs: dict[str, int]
) -> None:
    old, new = pair
    try:
        before = old.bind(*args, **kwargs).arguments
    except TypeError:
        assume(False)
    assume(not refusals(listed(old), listed(new)))
    after = new.bind(*args, **kwargs).arguments  # raises where the call is not understood
    rest = {
        k: v
        for p in new.parameters.values()
        if p.kind == 4
        for k, v in after.get(p.name, {}).items()
    }
    for name, value in before.items():
        if old.parameters[name].kind in (1, 3):
            assert {**after, **rest}[name] == value


@given(signatures())
def test_a_task_that_stays_as_it_is_is_not_refused(signature: inspect.Signature) -> None:
    assert refusals(listed(signature), listed(signature)) == []


def test_words_name_what_the_running_release_sends() -> None:
    def old(note: int, *, late: bool = False) -> None: ...

    def renamed(text: int, *, late: bool = False) -> None: ...
    def wants(note: int, more: int, *, late: bool = False) -> None: ...
    def loses(note: int) -> None: ...
    def moves(first: int = 0, note: int = 0, *, late: bool = False) -> None: ...
    def grows(note: int, more: int = 0, *, late: bool = True, **rest: int) -> None: ...

    def said(new: Callable[..., Any]) -> list[str]:
        return refusals(parameters(old), parameters(new))

    assert said(renamed) == [
        "no longer takes `note`",
        "takes `text` where it took `note`",
        "now wants `text`",
    ]
    assert said(wants) == ["now wants `more`"]
    assert said(loses) == ["no longer takes `late`"]
    assert said(moves) == ["takes `first` where it took `note`"]
    assert said(grows) == []


def test_a_task_may_only_go_when_nobody_sends_it_and_no_job_of_it_is_left() -> None:
    other = {"tasks": {**tasks(), "shop.tasks.gone": []}}
    (line,) = check(other, set())
    assert line.startswith("shop.tasks.gone does not exist")
    assert line.endswith("--gone shop.tasks.gone")
    assert check(other, {"shop.tasks.gone"}) == []
    Job.objects.create(task="shop.tasks.gone", queue="default", due_at=Now())
    (line,) = check(other, {"shop.tasks.gone"})
    assert line == "shop.tasks.gone is gone, and 1 of its jobs are not finished"


def test_a_queue_may_only_go_when_nobody_sends_to_it_and_no_job_is_left_on_it() -> None:
    other = {"queues": ["default", "old"]}
    (line,) = check(other, set())
    assert line.startswith("the queue old does not exist")
    assert line.endswith("--gone old")
    assert check(other, {"old"}) == []
    Job.objects.create(task="any", queue="old", due_at=Now())
    assert check(other, {"old"}) == ["the queue old is gone, and 1 jobs on it are not finished"]
    assert any(line.startswith("old: jobs wait") for line in doubts())


def ago(seconds: float) -> Any:
    return Now() - timedelta(seconds=seconds)


def low_waits(**facts: Any) -> None:
    """Let a probe of `low` be on its way for a minute; other queues have answered release `r1`."""
    for name in queues():
        Queue.objects.create(name=name, seen_at=ago(-1), release="r1", answered_at=ago(-1))
    Queue.objects.filter(name="low").update(
        **{"outstanding_since": ago(60), "release": "r0", **facts}
    )


def low_worker(release: str, **facts: Any) -> None:
    facts = {"slots": 2, "seen_at": ago(-1), **facts}
    Node.objects.create(name=f"low@{release}", queues=["low"], pid=1, release=release, **facts)


BUSY = ["low: its workers start tasks, the probe waits behind them"]


def test_a_queue_that_is_too_busy_for_a_probe_moves_when_workers_of_the_release_start_tasks() -> (
    None
):
    low_waits(moved_at=ago(-1))
    low_worker("r1", active=1, oldest_at=Now())
    assert without_answer("r1", now()) == ([], BUSY)
    assert doubts() == ["low: late, but its workers work"]
    # Another release's may have started them
    low_worker("r0")
    assert without_answer("r1", now())[1] == []
    Node.objects.update(active=2, oldest_at=ago(100))
    assert without_answer("r1", now()) == ([], BUSY)


@pytest.mark.parametrize(
    ("queue", "worker"),
    [
        ({}, {}),
        ({}, {"active": 1, "oldest_at": ago(100)}),
        ({"moved_at": ago(5)}, {}),
        ({"moved_at": ago(-1), "seen_at": ago(5)}, {}),  # beat of the release has sent nothing
        ({"moved_at": ago(-1), "failing_since": ago(1)}, {}),
        ({"moved_at": ago(-1), "outstanding_since": ago(1)}, {}),
        ({"moved_at": ago(-1)}, {"seen_at": ago(5)}),
        ({}, {"active": 2, "oldest_at": ago(1_000)}),  # beyond the time limit: they hang
    ],
)
def test_a_queue_whose_workers_have_started_nothing_yet_is_no_proof(
    queue: dict[str, Any], worker: dict[str, Any]
) -> None:
    low_waits(**queue)
    low_worker("r1", **worker)
    (line,), busy = without_answer("r1", now())
    assert line.startswith("low: no probe answered")
    assert busy == []


def test_a_worker_that_was_killed_just_now_serves_nothing() -> None:
    low_worker("r1", seen_at=ago(4))
    assert "low: no worker" not in without_worker("r1", now())[0]
    Node.objects.update(seen_at=ago(9))
    assert "low: no worker" in without_worker("r1", now())[0]


@pytest.mark.faults
def test_a_deploy_ends_well_beside_long_jobs(crew: Crew, ask: Ask) -> None:
    for _ in range(2):
        sleep.apply_async((60,), queue="low")
    crew.worker("low", "low", 2)
    crew.worker("rest", "default,high,control")
    wait_until(lambda: Node.objects.filter(name="low@test", active=2).exists(), 60, "low is busy")
    crew.beat()
    done = ask("queues", "r1", "30", **crew.environment)
    proof = "it has answered a probe of every other queue"
    assert (done.returncode, done.stdout.splitlines()) == (0, [*BUSY, proof])


def test_columns_that_are_yet_to_come_keep_nobody_from_deploying() -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE queue_probes_queue DROP COLUMN told")
    with transaction.atomic():
        (line,) = doubts()
        transaction.set_rollback(True)
    assert line.endswith("column queue_probes_queue.told does not exist")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKER_HANG_SECONDS", "abc"),
        ("WORKER_HANG_SECONDS", "nan"),
        ("WORKER_GRACE_SECONDS", "10"),
        ("WEB_CONCURRENCY", "1.5"),
    ],
)
def test_numbers_that_workers_and_web_could_not_start_with_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    (line,) = [line for line in found_in_settings()[0] if name in line]
    assert value in line
    monkeypatch.setenv(name, "20")
    assert not any(name in line for line in found_in_settings()[0])


def test_settings_that_leave_no_page_are_told_from_those_that_are_only_unwise(
    settings: Any,
) -> None:
    settings.DEBUG = False
    settings.ALLOWED_HOSTS, settings.SECURE_HSTS_SECONDS = [], 0
    useless, rest = found_in_settings()
    assert any("security.W020" in line for line in useless)
    assert any("security.W004" in line for line in rest)


def test_a_release_can_run_what_it_sends_itself(ask: Ask) -> None:
    done = ask("tasks")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "queue_probes.probe" in found["tasks"]
    assert not any(name.startswith("celery.") for name in found["tasks"])
    assert check(found, set()) == []


@pytest.mark.django_db(transaction=True)
def test_a_release_may_run_beside_itself_and_not_beside_one_that_sends_more(
    project_environment: dict[str, str], ask: Ask
) -> None:
    sent = ask("tasks").stdout
    for other in (sent, "{}", "null"):
        done = ask("check", stdin=other, **project_environment)
        assert done.returncode == 0, done.stdout + done.stderr
    done = ask("check", stdin=sent.replace("tests.sleep", "tests.gone"), **project_environment)
    assert done.returncode == 1
    assert done.stdout.startswith("tests.gone does not exist")


def test_without_probes_nobody_says_that_work_moves() -> None:
    with modify_settings(INSTALLED_APPS={"remove": ["queue_probes", "durable_jobs"]}):
        assert without_answer("r1", now()) == (
            [],
            ["queue_probes is not installed: nothing shows that work moves"],
        )
        assert (doubts(), queues_of_release()) == ([], ["control", "default", "high", "low"])
        # Asked over the broker: no worker runs here.
        assert len(without_worker("r1", now())[0]) == 4


def test_bound_tasks_are_listed_without_self() -> None:
    assert [p.name for p in tasks()["queue_probes.probe"]] == ["queue", "asked"]


@pytest.mark.django_db(transaction=True)
def test_a_migration_gives_up_waiting_for_a_lock_whatever_the_settings_say(
    project_environment: dict[str, str], ask: Ask
) -> None:
    endless = {"PGOPTIONS": "-c lock_timeout=0 -c statement_timeout=60s"}
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("LOCK TABLE django_migrations")
        done = ask("migrate", **project_environment | endless)
    assert done.returncode == 1
    assert "due to lock timeout" in done.stderr


def test_the_application_is_the_one_that_pyproject_names_else_config(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    made = "from django.conf import settings; settings.configure()\nfrom celery import Celery\n"
    (tmp_path / "config/__init__.py").write_text(f"{made}app = Celery('config')\n")
    (tmp_path / "shop.py").write_text(
        f"{made}app = Celery('shop')\n@app.task(name='shop.sell')\ndef sell(what): ...\n"
    )
    command = [sys.executable, "-m", "rollout.release", "tasks"]
    for name, found in (("config", []), ("shop", ["shop.sell"])):
        if name == "shop":
            (tmp_path / "pyproject.toml").write_text(f'[tool.rollout]\napp = "{name}"\n')
        environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (list(answer["tasks"]), answer["queues"]) == (found, ["celery"])
