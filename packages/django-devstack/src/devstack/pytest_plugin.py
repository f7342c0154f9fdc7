"""Real services for the tests: `-p devstack.pytest_plugin` starts them once, before Django loads.

`DATABASE_URL` and `CELERY_BROKER_URL` of the environment are used when they are set. Those of
`.env` are not: tests send tasks, and a worker of yours would take them.
"""

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from devstack import services, state

DEV = Path.cwd() / ".dev"
# Tests mean the same on every machine, whatever its `.env` says.
DEFAULTS = {
    "DJANGO_SECRET_KEY": "only-for-tests",
    "DJANGO_DEBUG": "1",
    "CELERY_TASK_ALWAYS_EAGER": "0",
    "SENTRY_DSN": "",
}


# A wrapper runs before every plain hook, also before the one in which pytest-django loads settings.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Start the services, and stop them however the run ends."""
    stack = ExitStack()
    early_config.add_cleanup(stack.close)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not (os.environ.get("DATABASE_URL") and os.environ.get("CELERY_BROKER_URL")):
        folder = _own_folder(stack)
        try:
            started = stack.enter_context(services.running(folder, os.environ, durable=False))
        except state.StackError as error:
            raise pytest.UsageError(str(error)) from None
        os.environ.update(started.environment)
    return (yield)


def _own_folder(stack: ExitStack) -> Path:
    """Return a new folder. Runs beside this one have theirs; those of killed runs are removed."""
    DEV.mkdir(mode=0o700, exist_ok=True)
    if sweeping := state.lock(DEV / "test"):  # one at a time: they would remove the same folders
        for folder in filter(Path.is_dir, (DEV / "test").iterdir()):
            # A run that ends just now removes its own.
            with suppress(FileNotFoundError):
                if held := state.lock(folder):
                    state.sweep(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    held.close()
        sweeping.close()
    folder = DEV / "test" / uuid.uuid4().hex[:8]
    held = state.lock(folder)
    assert held, f"{folder} is somebody else's"
    stack.callback(held.close)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder
