"""The baked project passes its own checks, under every combination of options that matters."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import python_for, run

BROKERS = {
    "valkey": "redis://:password@127.0.0.1:1/0",
    "rabbitmq": "amqp://u:password@127.0.0.1:1//",
}
COMBINATIONS = [
    {"django_version": django, "broker": broker, "example_app": example}
    for django, broker, example in product(("5.2", "6.1"), BROKERS, (True, False))
]


def installed(project: Path, django: str) -> dict[str, str]:
    """Return the environment that makes the project use a Python its Django runs on."""
    interpreter = python_for((3, 12) if django == "6.1" else (3, 11))
    if interpreter is None:
        pytest.skip(f"no Python on this machine runs Django {django}")
    return {"UV_PYTHON": interpreter}


@pytest.mark.parametrize("answers", COMBINATIONS, ids=lambda a: "-".join(map(str, a.values())))
def test_baked_project_is_clean(bake: Callable[..., Path], answers: dict[str, object]) -> None:
    project = bake(**answers)
    python = installed(project, str(answers["django_version"]))
    run("make", "lint", cwd=project, **python)
    production = {
        "DATABASE_URL": "postgres://u:p@127.0.0.1:1/n",
        "CELERY_BROKER_URL": BROKERS[str(answers["broker"])],
        "DJANGO_SECRET_KEY": "k" * 20 + "".join(map(chr, range(33, 90))),
        "DJANGO_ALLOWED_HOSTS": "example.com",
        "DJANGO_DEBUG": "0",
    }
    manage = (".venv/bin/python", "-W", "error", "manage.py")
    run(*manage, "check", "--deploy", "--fail-level", "WARNING", cwd=project, **production)
    run(*manage, "check", "--tag", "celery", "--fail-level", "WARNING", cwd=project, **production)
    # the database is not there to compare histories with; only the models are looked at
    run(
        *manage[:1],
        *manage[3:],
        "makemigrations",
        "--check",
        "--dry-run",
        cwd=project,
        **production,
    )


# together they have every answer that reaches the code
SUITES = [
    {"django_version": "5.2"},
    {"django_version": "6.1", "example_app": False, "broker": "rabbitmq"},
]


@pytest.mark.parametrize("answers", SUITES, ids=lambda a: "-".join(map(str, a.values())))
def test_baked_project_passes_its_own_tests(
    bake: Callable[..., Path], answers: dict[str, object]
) -> None:
    project = bake(**answers)
    python = installed(project, str(answers["django_version"]))
    # Faults strike the same workers in both: those tests run in the first.
    some = {} if answers == SUITES[0] else {"ARGS": "-m 'not faults'"}
    ends = run("make", "test", cwd=project, timeout=2_700, **some, **python)
    print(ends.strip().splitlines()[-1])
