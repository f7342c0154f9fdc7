"""A Docker engine for tests, and one project's stack in it."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TEMPLATE, environment

# An engine for machines that reach no container registry; see its README.
LAB = TEMPLATE.parent / "shared" / "docker-lab" / "docker-lab"


def succeeds(*command: str | Path) -> bool:
    """Tell whether a command exists and exits with 0."""
    try:
        return subprocess.run(command, capture_output=True, timeout=900).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def engine(*images: str) -> Iterator[list[str]]:
    """Yield what stands before `docker` on a command line; skip the test if there is no engine.

    `images`: what the lab has to build besides its usual ones; a real engine fetches them.
    """
    if succeeds("docker", "info") and succeeds("docker", "compose", "version"):
        yield []
    elif LAB.exists() and os.getuid() == 0:
        was_up = succeeds(LAB, "status")
        if not (succeeds(LAB, "up") and (not images or succeeds(LAB, "up", *images))):
            pytest.fail(f"`{LAB} up` failed")
        try:
            yield [str(LAB), "exec"]
        finally:
            if not was_up:
                succeeds(LAB, "down")
    else:
        pytest.skip("no Docker engine with Compose here, and no docker-lab beside the repository")


@dataclass
class Stack:
    """The containers of one baked project, under a name of their own."""

    prefix: list[str]
    folder: Path
    name: str

    def docker(self, *arguments: str, timeout: float = 300) -> str:
        """Run a docker command in the project's folder; return its output or fail the test."""
        command = [*self.prefix, "docker", *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            # port 0: any that is free
            env=environment(WEB_PORT="0", FLOWER_PORT="0", COMPOSE_PROJECT_NAME=self.name),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            output = (done.stdout + done.stderr)[-6_000:]
            pytest.fail(f"`{' '.join(command)}` exited with {done.returncode}:\n{output}")
        return done.stdout

    def compose(self, *arguments: str) -> str:
        """Run a command of Compose, with the test's settings on top of the project's."""
        files = ("-f", "compose.yaml", "-f", "quick.yaml")
        return self.docker("compose", "--progress=quiet", *files, *arguments)

    def start_python(self, service: str, code: str, *arguments: str) -> None:
        """Start Python code in a running container; it may end the container."""
        self.compose("exec", "--detach", service, "python", "-c", code, *arguments)

    def state(self, service: str) -> dict:
        """Return what the engine knows about the container of a service."""
        (container,) = self.compose("ps", "--all", "--quiet", service).split()
        return json.loads(self.docker("inspect", container))[0]

    def health(self, service: str) -> str:
        """Return "starting", "healthy" or "unhealthy"."""
        return self.state(service)["State"]["Health"]["Status"]

    def url(self, service: str, port: int) -> str:
        """Return where a service is published on this machine."""
        return f"http://{self.compose('port', service, str(port)).strip()}"

    def copies(self, text: str) -> int:
        """Count, in the database, the copies of the note with this text."""
        query = "SELECT count(*) FROM notes_copy WHERE text = '" + text + "'"  # noqa: S608
        psql = ("psql", "--username=app", "--tuples-only", "--no-align", f"--command={query}")
        return int(self.compose("exec", "-T", "postgres", *psql))

    def leftovers(self) -> str:
        """Return the ids of this stack's containers, volumes and networks."""
        label = f"label=com.docker.compose.project={self.name}"
        listings = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return "".join(self.docker(*each, "--quiet", "--filter", label) for each in listings)
