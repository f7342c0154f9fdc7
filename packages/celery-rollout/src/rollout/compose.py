"""Releases side by side on one machine as projects of Docker Compose: `<app>-<release>`."""

import json
import re
import time
from pathlib import Path
from typing import Any

from rollout.platform import Platform
from rollout.shell import StepError, ending, keep, run, succeeds

FILE = "compose.production.yaml"
LABEL = "com.docker.compose"
# A connection for each request: none is reused while its web process ends.
UPSTREAM = "reverse_proxy web-{release}:8000 {{\n\ttransport http {{\n\t\tkeepalive off\n\t}}\n}}\n"
# What the proxy had taken before it knew of the new release has got through to the old one by then.
DRAIN_SECONDS = 2
RELOAD = ("exec", "--no-TTY", "proxy", "caddy", "reload", "--config", "/etc/caddy/Caddyfile")


class Compose(Platform):
    """Images, containers and the proxy in front of the web."""

    SETTINGS = f"""{Platform.SETTINGS}\
# The name that leads to this machine; the proxy gets its certificate by itself.
SITE_ADDRESS=example.com
SERVICES_PASSWORD={{password}}
DATABASE_URL=postgres://app:{{password}}@postgres:5432/app
# rabbitmq: amqp://app:{{password}}@rabbitmq:5672//
CELERY_BROKER_URL=redis://:{{password}}@valkey:6379/0
"""

    def init(self) -> Path:
        run("docker", "compose", "version")
        settings = super().init()
        (self.home / "compose").touch()  # from now on `deploy` knows that it works with containers
        return settings

    def check_settings(self) -> None:
        super().check_settings()
        for number, line in enumerate(self.env.read_text().splitlines(), 1):
            # Compose would put a variable, that is mostly nothing, in the place of a part of it.
            if not line.startswith("#") and "$" in line and not re.fullmatch(r"\w+='[^']*'", line):
                name = line.partition("=")[0]
                raise StepError(
                    f"{name} in line {number} of {self.env} has a `$`, which Compose replaces:"
                    " put the value into single quotes"
                )

    def compose(self, release: str, *arguments: str, **how: Any) -> str:
        """Run a command of Compose on a release."""
        return run(*self._command(f"{self.app}-{release}", release), *arguments, **how)

    def shared(self, release: str, *arguments: str) -> None:
        """Run a command of Compose on what all releases share, as this one has it."""
        run(*self._command(self.app, release), "--profile", "shared", *arguments)

    def _command(self, project: str, release: str) -> list[str]:
        environment = ("env", f"RELEASE={release}", f"APP_HOME={self.home}")
        files = ("-f", f"{self.releases / release}/{FILE}", "--env-file", str(self.env))
        return [*environment, "docker", "compose", "--progress=quiet", "-p", project, *files]

    def install(self, folder: Path, release: str) -> None:
        if not re.fullmatch("[a-z0-9][a-z0-9_-]*", release):
            raise StepError(f"{release!r} cannot name containers: lower case, digits, `_`, `-`")
        run("docker", "build", "--quiet", "--tag", f"{self.app}:{release}", str(folder))

    def delete(self, release: str) -> None:
        run("docker", "image", "rm", "--force", f"{self.app}:{release}")
        super().delete(release)

    def python(self, release: str, *, tty: bool = False, unit: str = "") -> list[str]:
        while unit and run("docker", "ps", "--quiet", "--filter", f"name=^{unit}$"):
            time.sleep(0.5)
        if unit:
            succeeds("docker", "rm", "--force", unit)
        options = [] if tty else ["--no-TTY"]
        options += ["--name", unit] if unit else []
        command = self._command(f"{self.app}-{release}", release)
        return [*command, "run", "--rm", "--no-deps", *options, "manage", "python"]

    def last_words(self, release: str) -> str:
        how = ("--no-color", "--no-log-prefix", "--tail=8")
        return ending(self.compose(release, "--profile", "release", "logs", *how))

    def roles(self, release: str | None = None) -> list[str]:
        if release is None:
            return sorted({role for role, _ in self.units()})
        return sorted(self.compose(release, "--profile", "release", "config", "--services").split())

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
        shown = ("--format", "json", "--filter", f"label={LABEL}.project", *filters)
        found = []
        for row in map(json.loads, run("docker", "ps", *shown).splitlines()):
            labels = dict(pair.partition("=")[::2] for pair in row["Labels"].split(","))
            app, _, release = labels[f"{LABEL}.project"].partition("-")
            if app == self.app and release and labels.get(f"{LABEL}.oneoff") != "True":
                found.append((labels[f"{LABEL}.service"], release, row["Names"]))
        return found

    def provide(self, release: str) -> None:
        config = json.loads(self.compose(release, "--profile", "*", "config", "--format", "json"))
        for kind in ("network", "volume"):
            for thing in config.get(f"{kind}s", {}).values():
                if thing.get("external") and not succeeds("docker", kind, "inspect", thing["name"]):
                    run("docker", kind, "create", thing["name"])
        (self.home / "proxy").mkdir(exist_ok=True)
        if not (self.home / "proxy/upstream.caddy").exists():
            self.prepare(release)
            self.send_to(release)
        # What runs stays as it is: a new image of the database is for a person to bring in.
        self.shared(release, "up", "--detach", "--wait", "--no-recreate")

    def prepare(self, release: str) -> None:
        source = self.releases / release / "deploy/proxy/Caddyfile"
        (self.home / "proxy/Caddyfile").write_text(source.read_text())

    def send_to(self, release: str) -> None:
        """Write which release the proxy has to send requests to."""
        keep(self.home / "proxy/upstream.caddy", UPSTREAM.format(release=release))

    def wait_for_web(self, release: str, seconds: float) -> None:
        # It is healthy: `start` waited for that.
        self.send_to(release)
        self.shared(release, *RELOAD)
        time.sleep(DRAIN_SECONDS)

    def start(self, release: str, *roles: str) -> None:
        anew = ["--force-recreate"] if "reconcile" in roles else []  # the loop has a span of life
        self.compose(release, "up", "--detach", "--no-deps", "--wait", *anew, *roles)

    def stop(self, others: dict[str, list[str]]) -> None:
        for release in sorted({name for names in others.values() for name in names}):
            roles = [role for role, names in others.items() if release in names]
            self.compose(release, "rm", "--stop", "--force", *roles)
