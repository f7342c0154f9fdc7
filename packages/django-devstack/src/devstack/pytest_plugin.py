"""Real services for the tests: `-p devstack.pytest_plugin` starts them once, before Django loads.

`DATABASE_URL` and `CELERY_BROKER_URL` of the environment are used when they are set. Those of
`.env` are not: tests send tasks, and a worker of yours would take them.

With pytest-xdist each of its workers has services of its own, whatever the environment names:
workers that share a broker would take each other's messages. Its controller runs no test.
"""

import argparse
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from devstack import services, state

# Tests mean the same on every machine, whatever its `.env` says.
DEFAULTS = {
    "DJANGO_SECRET_KEY": "only-for-tests",
    "DJANGO_DEBUG": "1",
    "CELERY_TASK_ALWAYS_EAGER": "0",
    "SENTRY_DSN": "",
}
SERVERS = ("DATABASE_URL", "CELERY_BROKER_URL")
# Settings that are loaded in the controller want URLs; nothing listens there.
NOWHERE = ("postgres://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1/0")
# Which worker of which run the URLs in the environment belong to.
OWNER = "DEVSTACK_XDIST_WORKER"


# A wrapper runs before every plain hook, also before the one in which pytest-django loads settings.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Start the services, and stop them however the run ends."""
    stack = ExitStack()
    early_config.add_cleanup(stack.close)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if _is_new_worker():
        for name in SERVERS:
            os.environ.pop(name, None)
    elif _is_controller(early_config.known_args_namespace):
        for name, value in zip(SERVERS, NOWHERE, strict=True):
            os.environ.setdefault(name, value)
    if not all(os.environ.get(name) for name in SERVERS):
        folder = _own_folder(early_config.rootpath / ".dev" / "test", stack)
        try:
            started = stack.enter_context(services.running(folder, os.environ, durable=False))
        except state.StackError as error:
            raise pytest.UsageError(str(error)) from None
        os.environ.update(started.environment)
    return (yield)


def _is_new_worker() -> bool:
    """Tell whether this is a worker of pytest-xdist, and not a run that one of its tests began."""
    run, worker = (os.environ.get(f"PYTEST_XDIST_{name}") for name in ("TESTRUNUID", "WORKER"))
    owner = f"{run} {worker}"
    if not worker or os.environ.get(OWNER) == owner:
        return False
    os.environ[OWNER] = owner
    return True


def _is_controller(options: argparse.Namespace) -> bool:
    """Tell whether pytest-xdist runs the tests in other processes than this one."""
    elsewhere = getattr(options, "numprocesses", None) or getattr(options, "tx", None)
    return bool(elsewhere) and not (options.usepdb or options.collectonly)


def _own_folder(runs: Path, stack: ExitStack) -> Path:
    """Return a new folder. Runs beside this one have theirs; those of killed runs are removed."""
    # One at a time: a run must not find the folder that another has made and not yet locked.
    with state.waiting_lock(runs):
        for folder in filter(Path.is_dir, runs.iterdir()):
            # A run that ends just now removes its own.
            with suppress(FileNotFoundError):
                if held := state.lock(folder):
                    state.sweep(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    held.close()
        folder = runs / uuid.uuid4().hex[:8]
        held = state.lock(folder)
    assert held, f"{folder} is somebody else's"
    stack.callback(held.close)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder
