"""Releases side by side on one machine as projects of Docker Compose: `<app>-<release>`."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from rollout.releases import Releases, StepError, ending, run

FILE = "compose.production.yaml"
# A connection for each request: none is reused while its web process ends.
UPSTREAM = "reverse_proxy web-{release}:8000 {{\n\ttransport http {{\n\t\tkeepalive off\n\t}}\n}}\n"
# What the proxy had taken before it knew of the new release has got through to the old one by then.
DRAIN_SECONDS = 2


class Compose(Releases):
    """Images, containers and the proxy in front of the web."""

    SETTINGS = (
        Releases.SETTINGS
        + """\
# The name that leads to this machine; the proxy gets its certificate by itself.
SITE_ADDRESS=example.com
SERVICES_PASSWORD={password}
DATABASE_URL=postgres://app:{password}@postgres:5432/app
# rabbitmq: amqp://app:{password}@rabbitmq:5672//
CELERY_BROKER_URL=redis://:{password}@valkey:6379/0
"""
    )

    def init(self) -> Path:
        run("docker", "compose", "version")
        settings = super().init()
        (self.home / "compose").touch()  # from now on `deploy` knows that it works with containers
        return settings

    def compose(self, release: str, *arguments: str, shared: bool = False, **how: Any) -> str:
        """Run a command of Compose on a release, or on what all releases share."""
        return run(*self._command(release, shared=shared), *arguments, **how)

    def _command(self, release: str, *, shared: bool = False) -> list[str]:
        project = self.app if shared else f"{self.app}-{release}"
        environment = (f"RELEASE={release}", f"APP_HOME={self.home}")
        files = ("-f", f"{self.releases / release}/{FILE}", "--env-file", f"{self.home}/env")
        return ["env", *environment, "docker", "compose", "--progress=quiet", "-p", project, *files]

    def install(self, folder: Path, release: str) -> None:
        if not re.fullmatch("[a-z0-9][a-z0-9_-]*", release):
            raise StepError(f"{release!r} cannot name containers: lower case, digits, `_`, `-`")
        run("docker", "build", "--quiet", "--tag", f"{self.app}:{release}", str(folder))

    def delete(self, release: str) -> None:
        run("docker", "image", "rm", "--force", f"{self.app}:{release}")
        super().delete(release)

    def inside(self, release: str, *command: str, stdin: str = "", alone: bool = False) -> str:
        options = []
        if alone:
            name = f"{self.app}-alone"
            options += ["--name", name]
            while run("docker", "ps", "--quiet", "--filter", f"name=^{name}$"):
                time.sleep(0.5)
            subprocess.run(["docker", "rm", "--force", name], capture_output=True)
        program = ("run", "--rm", "--no-TTY", "--no-deps", *options, "manage", "python", *command)
        return self.compose(release, *program, input=stdin)

    def attended(self, release: str, *command: str) -> int:
        tty = [] if os.isatty(0) else ["--no-TTY"]
        program = ("run", "--rm", "--no-deps", *tty, "manage", "python", *command)
        return subprocess.run([*self._command(release), *program]).returncode

    def last_words(self, release: str) -> str:
        how = ("--no-color", "--no-log-prefix", "--tail=8")
        return ending(self.compose(release, "--profile", "release", "logs", *how))

    def roles(self, release: str | None = None) -> list[str]:
        if release is None:
            return sorted({role for role, _ in self.units()})
        services = self.compose(release, "--profile", "release", "config", "--services")
        return sorted(services.split())

    def units(self) -> list[tuple[str, str]]:
        return [(role, release) for role, release, _ in self._listed()]

    def ailing(self, release: str) -> list[str]:
        restarting = self._listed("--filter", "status=restarting")
        return [role for role, name, _ in restarting if name == release]

    def forget_others(self, release: str) -> None:
        # By itself: the loop, after its time.
        ended = self._listed("--all", "--filter", "status=exited")
        if others := [unit for _, name, unit in ended if name != release]:
            run("docker", "rm", *others)

    def _listed(self, *filters: str) -> list[tuple[str, str, str]]:
        """Return role, release and name of the containers that run, or that the filters want."""
        label = "com.docker.compose"
        shown = ("--format", "json", "--filter", f"label={label}.project", *filters)
        rows = [json.loads(line) for line in run("docker", "ps", *shown).splitlines()]
        found = []
        for row in rows:
            labels = dict(pair.partition("=")[::2] for pair in row["Labels"].split(","))
            project = labels[f"{label}.project"]
            if project.startswith(f"{self.app}-") and labels.get(f"{label}.oneoff") != "True":
                release = project.removeprefix(f"{self.app}-")
                found.append((labels[f"{label}.service"], release, row["Names"]))
        return found

    def provide(self, release: str) -> None:
        config = json.loads(self.compose(release, "--profile", "*", "config", "--format", "json"))
        for kind in ("networks", "volumes"):
            for thing in config.get(kind, {}).values():
                if thing.get("external"):
                    make(kind.removesuffix("s"), thing["name"])
        (self.home / "proxy").mkdir(exist_ok=True)
        if not (self.home / "proxy/upstream.caddy").exists():
            self.prepare(release)
            self.send_to(release)
        # What runs stays as it is: a new image of the database is for a person to bring in.
        shared = ("--profile", "shared", "up", "--detach", "--wait", "--no-recreate")
        self.compose(release, *shared, shared=True)

    def prepare(self, release: str) -> None:
        source = self.releases / release / "deploy/proxy/Caddyfile"
        (self.home / "proxy/Caddyfile").write_text(source.read_text())

    def send_to(self, release: str) -> None:
        """Write which release the proxy has to send requests to."""
        partial = self.home / "proxy/.upstream"
        partial.write_text(UPSTREAM.format(release=release))
        partial.rename(self.home / "proxy/upstream.caddy")

    def wait_for_web(self, release: str, seconds: float) -> None:
        # It is healthy: `start` waited for that.
        self.send_to(release)
        command = (
            "exec",
            "--no-TTY",
            "proxy",
            "caddy",
            "reload",
            "--config",
            "/etc/caddy/Caddyfile",
        )
        self.compose(release, "--profile", "shared", *command, shared=True)
        time.sleep(DRAIN_SECONDS)

    def start(self, release: str, *roles: str) -> None:
        anew = ["--force-recreate"] if "reconcile" in roles else []  # the loop has a span of life
        self.compose(release, "up", "--detach", "--no-deps", "--wait", *anew, *roles)

    def stop(self, others: dict[str, list[str]]) -> None:
        for release in sorted({name for names in others.values() for name in names}):
            roles = [role for role, names in others.items() if release in names]
            self.compose(release, "rm", "--stop", "--force", *roles)


def make(kind: str, name: str) -> None:
    """Make a network or a volume of this name, unless there is one."""
    if subprocess.run(["docker", kind, "inspect", name], capture_output=True).returncode:
        run("docker", kind, "create", name)
