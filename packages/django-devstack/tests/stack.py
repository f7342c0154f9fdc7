"""A copy of the small project, and its stack."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from celery import Celery

from devstack.processes import free_port
from tests.waiting import wait_until

PROJECT = Path(__file__).with_name("project")
OURS = re.compile("DATABASE_URL|CELERY_|DJANGO_|FLOWER_|SENTRY_|GUNICORN_|WEB_|WORKER_")
APP = Celery(set_as_current=False)


class Project:
    """A copy of the project without `.env`, as after a fresh clone, and its stack."""

    def __init__(self, folder: Path, *prefix: str, source: Path = PROJECT) -> None:
        self.folder = folder
        self.devstack = [*prefix, sys.executable, "-m", "devstack"]
        self.output = folder.with_suffix(".out")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        # two stacks that begin together would find the same ports free
        self.settings(f"web_port = {free_port()}\nflower_port = {free_port()}\n")

    def settings(self, lines: str) -> None:
        """Put lines into `[tool.devstack]`."""
        file = self.folder / "pyproject.toml"
        text = file.read_text() if file.exists() else "[tool.devstack]\n"
        file.write_text(text.replace("[tool.devstack]\n", f"[tool.devstack]\n{lines}", 1))

    def environment(self, **more: str) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not OURS.match(name)} | more

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.devstack, *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=90,
        )

    def up(self) -> None:
        with self.output.open("a") as output:
            self.runner = subprocess.Popen(
                [*self.devstack, "up"],
                cwd=self.folder,
                env=self.environment(),
                stdout=output,
                stderr=output,
            )
        wait_until(lambda: self.state_file.exists() or self.runner.poll() is not None, 120)
        assert self.state_file.exists(), self.text

    def down(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.runner.send_signal(number)
        return self.runner.wait(60)

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def state_file(self) -> Path:
        return self.folder / ".dev" / "stack.json"

    @property
    def state(self) -> dict:
        return json.loads(self.state_file.read_text())

    @property
    def pids(self) -> dict[str, int]:
        return self.state["processes"]

    def wait_for_output(self, text: str, after: int = 0) -> None:
        wait_until(lambda: text in self.text[after:], 90, text)

    def run_task(self) -> None:
        """Send a task and wait until the worker says that it ran."""
        with APP.connection_for_write(self.state["broker_url"]) as broker:
            result = APP.send_task("greetings.tasks.hello", connection=broker, queue=self.queue)
        wait_until(lambda: any(result.id in line for line in self.successes()), 60, result.id)

    queue = "high"

    def successes(self) -> list[str]:
        lines = self.text.splitlines()
        return [line for line in lines if line.startswith("worker") and "succeeded" in line]
