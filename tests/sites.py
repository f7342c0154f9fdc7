"""A project on a server, and deploys of it: with units of systemd, or with containers."""

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import TEMPLATE, cookiecutter, environment, export
from tests.docker_engine import engine
from tests.systemd_lab import Server, server

APP = "my_project"
HEAD = """\
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("load_app", "0001_initial")]
"""
# What becomes of the models, and the operation that brings it about.
MIGRATIONS = {
    "drops a column": (
        "    release = models.CharField(max_length=100)\n",
        "",
        '    operations = [migrations.RemoveField("Effect", "release")]\n',
    ),
    "drops a default": (
        "countdown = models.FloatField()\n    at = models.DateTimeField(db_default=Now())",
        "countdown = models.FloatField()\n    at = models.DateTimeField(auto_now_add=True)",
        '    operations = [migrations.AlterField("Wanted", "at",'
        " models.DateTimeField(auto_now_add=True))]\n",
    ),
}
ENGINE = "packages/celery-rollout/src/rollout/__init__.py"
MARK = "import rollout; print(rollout.__doc__)"
NEVER_ROOT = """
import os
if os.geteuid() == 0:
    raise SystemExit("code of a release runs as root")
"""
# uv, its downloads of this machine, and what it trusts
TOOLS = {
    "PATH": "/opt/uv:/usr/sbin:/usr/bin:/sbin:/bin",
    "UV_CACHE_DIR": "/opt/uv-cache",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def bake(folder: Path) -> tuple[Path, str]:
    """Bake a project with the load app, in a git repository; return its folder and uv's path."""
    done = cookiecutter(export(folder / "template"), folder)
    assert done.returncode == 0, done.stderr
    source = folder / APP
    shutil.copytree(TEMPLATE / "tests/load_app", source / "load_app")
    with (source / "config/settings.py").open("a") as file:
        file.write('\nINSTALLED_APPS += ["load_app"]\n')
    with (source / "config/urls.py").open("a") as file:
        file.write('\nurlpatterns.append(path("", include("load_app.urls")))\n')
    uv = shutil.which("uv") or str(TEMPLATE / ".tools/bin/uv")
    subprocess.run([uv, "lock", "--quiet", "--python", sys.executable], cwd=source, check=True)
    subprocess.run(["git", "init", "-q", "-b", "main", source], check=True)
    return source, uv


class Site(ABC):
    """The source of releases, and how to deploy them; `run` runs a command on the server."""

    home = f"/srv/{APP}"
    script = f"/srv/{APP}-source/deploy"
    psql: tuple[str, ...]

    def __init__(self, source: Path, seed: int) -> None:
        self.source = source
        self.random = random.Random(seed)
        self.port = free_port()
        self.changes = 0
        self.commit("first")

    @abstractmethod
    def run(self, *command: str) -> str:
        """Run a command on the server; return its output, or fail."""

    @abstractmethod
    def start(self, name: str, *arguments: str) -> "subprocess.Popen[str]":
        """Start `deploy` or `rollback`; its output and errors can be read from `stdout`."""

    def count(self, query: str) -> float:
        """Return the one number that a query answers."""
        return float(self.ask(query))

    def ask(self, query: str) -> str:
        """Return what psql prints for a query."""
        return self.run(*self.psql, "-tAc", query)

    def engine(self, release: str) -> str:
        """Return the mark of the engine that is installed in a release."""
        return self.python(release, "-c", MARK).strip()

    @abstractmethod
    def python(self, release: str, *arguments: str) -> str:
        """Run Python of a release; return what it prints."""

    @abstractmethod
    def reload(self) -> None:
        """Have gunicorn load the code of the current release anew."""

    @abstractmethod
    def log(self) -> str:
        """Return what the processes of all releases have logged."""

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", "-C", self.source, *arguments], check=True, capture_output=True)

    def commit(self, kind: str) -> None:
        """Commit what makes a release of this kind out of the one before."""
        tasks, urls = self.source / "load_app/tasks.py", self.source / "load_app/urls.py"
        # Each release has an engine of its own, and has to run that one.
        self.mark = secrets.token_hex(4)
        (self.source / ENGINE).write_text(f'"""{self.mark}"""\n')
        if kind in ("changed", "killed", "undone", "rolled back"):
            self.changes += 1
            text = tasks.read_text()
            tasks.write_text(text.replace(") -> None", f", more_{self.changes}: int = 0) -> None"))
        if kind in ("changed", "killed"):  # those that stay; the others could not be gone back from
            text = urls.read_text()
            urls.write_text(text.replace("= {", f'= {{"more_{self.changes}": 1, '))
        if kind == "broken":
            with tasks.open("a") as file:
                file.write('\nimport sys\nif "worker" in sys.argv: raise SystemExit("broken")\n')
        if kind == "refused":
            tasks.write_text(tasks.read_text().replace("def work(wanted: int", "def work(it: int"))
        if kind in MIGRATIONS:
            before, after, operation = MIGRATIONS[kind]
            text = (self.source / "load_app/models.py").read_text()
            assert before in text
            (self.source / "load_app/models.py").write_text(text.replace(before, after))
            (self.source / "load_app/migrations/0002_more.py").write_text(HEAD + operation)
        self.git("add", "-A")
        self.git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", kind)

    def deploy(
        self, *arguments: str, kill_after: str = "", name: str = "deploy"
    ) -> tuple[int, str]:
        """Run a script; return exit code and output.

        `kill_after`: words of the line to kill it after, and `+` seconds more.
        """
        process = self.start(name, *arguments)
        assert process.stdout is not None
        lines = []
        words, _, seconds = kill_after.partition("+")
        for line in process.stdout:
            lines.append(line)
            if words and words in line:
                time.sleep(float(seconds or 0))
                # the script, and not what it has begun
                noted = self.run("cat", f"{self.home}/deploy.lock")  # "process 12, deploy ..."
                self.run("kill", "-KILL", noted.split()[1].rstrip(","))
                break
        lines += process.stdout.readlines()
        process.stdout.close()
        return process.wait(), "".join(lines)


class SystemdSite(Site):
    """On a server with systemd, PostgreSQL and Valkey."""

    def __init__(self, host: Server, source: Path, seed: int) -> None:
        super().__init__(source, seed)
        self.host = host
        password = secrets.token_hex(8)
        database, broker = free_port(), free_port()
        self.psql = ("psql", f"postgres://app:{password}@127.0.0.1:{database}/app")
        ports = map(str, (database, broker, self.port))
        self.run(f"/srv/{APP}-source/load_app/server.sh", APP, *ports, password)

    def run(self, *command: str) -> str:
        return self.host.run(*command)

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[str]":
        variables = [f"{name}={value}" for name, value in TOOLS.items()]
        return self.host.start(
            "env", "-C", f"/srv/{APP}-source", *variables, f"{self.script}/{name}", *arguments
        )

    def python(self, release: str, *arguments: str) -> str:
        return self.run(f"{self.home}/releases/{release}/.venv/bin/python", *arguments)

    def reload(self) -> None:
        current = self.run("readlink", f"{self.home}/releases/current").strip()
        self.run("systemctl", "reload", f"{APP}-web@{current}.service")

    def log(self) -> str:
        return self.run("journalctl", "-u", f"{APP}-*", "-o", "short-precise", "--no-pager")

    def end_loop(self) -> str:
        """Have the loop of the current release end as when its time is over; return its state."""
        current = self.run("readlink", f"{self.home}/releases/current").strip()
        unit = f"{APP}-reconcile@{current}.service"
        self.run("systemctl", "kill", "--kill-whom=main", unit)
        deadline = time.monotonic() + 20
        while (state := self.state(unit)) in ("active", "deactivating"):
            assert time.monotonic() < deadline, f"{unit} is still {state}"
            time.sleep(0.1)
        return state

    def state(self, unit: str) -> str:
        return self.run("systemctl", "show", "-P", "ActiveState", unit).strip()

    def environments(self, release: str) -> list[list[str]]:
        """Return the environment of each process that runs of a release."""
        pattern = f"{APP}-*@{release}.service"
        listed = self.run("systemctl", "list-units", "--plain", "--no-legend", pattern)
        units = [line.split()[0] for line in listed.splitlines()]
        pids = self.run("systemctl", "show", "-P", "MainPID", *units).split()
        return [self.run("cat", f"/proc/{pid}/environ").split("\0") for pid in pids]

    def audit(self) -> dict[str, float]:
        """Return how exposed each running unit is, 0 to 10; fail on a unit that is not valid."""
        pattern = f"{APP}-*@*.service"
        listed = self.run("systemctl", "list-units", "--plain", "--no-legend", pattern)
        units = [line.split()[0] for line in listed.splitlines()]
        assert self.run("systemd-analyze", "verify", *units) == ""
        words = [self.run("systemd-analyze", "security", "--no-pager", unit) for unit in units]
        levels = (word.rpartition("exposure level for ")[2].split()[1] for word in words)
        return dict(zip(units, map(float, levels), strict=True))


class ComposeSite(Site):
    """With containers, on this machine's engine."""

    def __init__(self, prefix: list[str], source: Path, seed: int) -> None:
        super().__init__(source, seed)
        self.prefix = prefix
        self.home = str(source.parent / "home")
        self.script = f"{source}/deploy"
        self.psql = ("docker", "exec", f"{APP}-postgres-1", "psql", "-U", "app")
        code, output = self.deploy("init", "--compose")
        assert code == 0, output
        settings = Path(self.home, "env")
        changes = f"""
SITE_ADDRESS=:80
HTTP_PORT=127.0.0.1:{self.port}
HTTPS_PORT=127.0.0.1:{free_port()}
DJANGO_ALLOWED_HOSTS=127.0.0.1
DJANGO_SECURE_SSL_REDIRECT=0
"""
        text = settings.read_text().splitlines()
        replaced = ("DJANGO_ALLOWED_HOSTS", "DJANGO_BEHIND_PROXY", "SITE_ADDRESS")
        kept = [line for line in text if not line.startswith(replaced)]
        settings.write_text("\n".join(kept) + changes)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [*self.prefix, *command], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.prefix, f"{self.script}/{name}", "--home", self.home, *arguments],
            env=environment(),
            cwd=self.source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def python(self, release: str, *arguments: str) -> str:
        return self.run("docker", "run", "--rm", f"{APP}:{release}", "python", *arguments)

    def reload(self) -> None:
        current = self.run("readlink", f"{self.home}/releases/current").strip()
        self.run("docker", "kill", "--signal=HUP", f"{APP}-{current}-web-1")

    def log(self) -> str:
        names = self.run("docker", "ps", "--all", "--format", "{{.Names}}").split()
        return "\n".join(self.run("docker", "logs", "-t", n) for n in names if n.startswith(APP))

    def clear(self) -> None:
        """Remove containers, images, networks and volumes of the project."""
        for kind, remove in (
            ("container", ("container", "rm", "--force", "--volumes")),
            ("network", ("network", "rm")),
            ("volume", ("volume", "rm")),
        ):
            options = ("--all",) if kind == "container" else ()
            names = "{{.Names}}" if kind == "container" else "{{.Name}}"
            found = self.run("docker", kind, "ls", *options, "--format", names).split()
            if ours := [name for name in found if name.startswith(APP)]:
                self.run("docker", *remove, *ours)
        images = self.run("docker", "image", "ls", "--quiet", APP).split()
        if images:
            self.run("docker", "image", "rm", "--force", *images)


@contextmanager
def systemd_site(folder: Path, seed: int) -> Iterator[SystemdSite]:
    """Yield a site on a fresh server; skip the test where there can be none."""
    source, uv = bake(folder)
    with (source / "config/settings.py").open("a") as file:
        file.write(NEVER_ROOT)
    cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
    binds = (
        f"{source}:/srv/{APP}-source",
        f"{Path(uv).parent}:/opt/uv:ro",
        f"{cache.stdout.strip()}:/opt/uv-cache",
    )
    with server(folder, *binds) as host:
        yield SystemdSite(host, source, seed)


@contextmanager
def compose_site(folder: Path, seed: int) -> Iterator[ComposeSite]:
    """Yield a site of containers; skip the test where there is no engine."""
    with engine("caddy") as prefix:
        if os.getuid() != 0:
            pytest.skip("only root may deploy")
        site = ComposeSite(prefix, bake(folder)[0], seed)
        try:
            yield site
        finally:
            site.clear()
