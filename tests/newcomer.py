"""A project that was never baked, whose owner follows the READMEs of the packages to the letter."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.conftest import TEMPLATE, environment

# Celery's introduction for Django: https://docs.celeryq.dev/en/stable/django/
CELERY = """\
import os
from celery import Celery
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
app = Celery("mysite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
"""
SETTINGS = """
INSTALLED_APPS += ["shop"]
import os
CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]
DATABASES = {{"default": {{
    "ENGINE": "django.db.backends.postgresql", "NAME": {name!r}, "HOST": {host!r},
    "PORT": {port!r}, "USER": {user!r}, "PASSWORD": {password!r},
}}}}
"""


def steps(package: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of the section Install: language and text."""
    readme = (TEMPLATE / "packages" / package / "README.md").read_text()
    section = re.search(r"^## Install\n(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, f"the README of {package} has no section Install"
    return re.findall(r"^```(\w+)\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


def wait_until(what: str, look: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


class Newcomer:
    """The project, and the processes it runs."""

    def __init__(self, folder: Path, uv: str, dist: Path, servers: dict[str, str]) -> None:
        """Start a project in an empty environment; `dist` has the wheels of the packages."""
        self.folder, self.dist = folder, dist
        self.bin = folder.parent / "environment/bin"
        self.processes: list[subprocess.Popen[bytes]] = []
        broker = urlsplit(servers["CELERY_BROKER_URL"])._replace(path="/9").geturl()
        self.environment = environment(
            PATH=f"{self.bin}:/usr/bin:/bin",
            VIRTUAL_ENV=str(self.bin.parent),
            CELERY_BROKER_URL=broker,
        )
        self.database = servers["DATABASE_URL"]
        self.name = f"newcomer_{os.getpid()}"
        folder.mkdir()
        subprocess.run([uv, "venv", "--quiet", str(self.bin.parent)], check=True)
        # The same answers as those of pip, from downloads that lie on this machine.
        (self.bin / "pip").write_text(f'#!/bin/sh\nexec {shlex.quote(uv)} pip "$@" --quiet\n')
        (self.bin / "pip").chmod(0o755)
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {self.name}")
        self.run('pip install "django~=5.2.0" "celery[redis]>=5.7,<5.8" "psycopg[binary]"')
        self.run("django-admin startproject mysite . && python manage.py startapp shop")
        (folder / "mysite/celery.py").write_text(CELERY)
        (folder / "mysite/__init__.py").write_text(
            'from mysite.celery import app as celery_app\n\n__all__ = ("celery_app",)\n'
        )
        url = urlsplit(self.database)
        where = {"host": url.hostname, "port": url.port, "user": url.username}
        told = SETTINGS.format(name=self.name, password=url.password, **where)
        self.append("mysite/settings.py", told)

    def append(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text((file.read_text() if file.exists() else "") + text)

    def run(self, script: str) -> str:
        """Run what a shell would; return what it printed."""
        script = self.with_wheels(script)
        done = subprocess.run(
            ["sh", "-ec", script],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=180,
            text=True,
        )
        if done.returncode:
            pytest.fail(f"{script}\n{done.stdout}")
        return done.stdout

    def with_wheels(self, script: str) -> str:
        """Name the wheels where a README names the folders."""

        def wheel(match: re.Match[str]) -> str:
            (found,) = self.dist.glob(f"{match[1].replace('-', '_')}-*.whl")
            return f"{found}{match[2] or ''}"

        return re.sub(r"\./packages/([a-z-]+)(\[[\w,]+\])?", wheel, script)

    def shell(self, code: str) -> str:
        return self.run(f"python manage.py shell -v 0 -c {shlex.quote(code)}")

    def follow(self, package: str) -> list[str]:
        """Take the steps of a README; return the lines of the processes it wants to run."""
        lines = []
        for language, text in steps(package):
            if language == "processes":
                lines += text.strip().splitlines()
            elif language == "sh":
                self.run(text)
            else:
                self.write(text)
        return lines

    def write(self, text: str) -> None:
        """Add a block to the file that its first line names."""
        head, _, body = text.partition("\n")
        named = re.match(r"# ([\w./]+\.(?:py|toml))", head)
        assert named, f"which file is it? {head}"
        name = named[1] if "/" in named[1] or named[1].endswith(".toml") else f"mysite/{named[1]}"
        if "in place of the line that makes the app" in head:
            old = (self.folder / name).read_text()
            (self.folder / name).write_text(re.sub(r"^app = Celery\(.*\n", body, old, flags=re.M))
            return
        schedule = "CELERY_BEAT_SCHEDULE = {"
        if schedule in (self.folder / name).read_text():  # "or add the entry to yours"
            body = body.replace(schedule, "CELERY_BEAT_SCHEDULE |= {")
        self.append(name, "\n" + body)

    def start(self, line: str) -> subprocess.Popen[bytes]:
        """Start a program as a service does: as the leader of a group of its own."""
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                shlex.split(line),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                executable=str(self.bin / shlex.split(line)[0]),
            )
        self.processes.append(process)
        wait_until(
            f"{line} is ready",
            lambda: " ready." in log.read_text() or process.poll() is not None,
        )
        assert process.poll() is None, log.read_text()
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to the whole group, as the loss of a machine is."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def rows(self, query: str) -> list[tuple]:
        url = urlsplit(self.database)._replace(path=f"/{self.name}").geturl()
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(query).fetchall()

    def close(self) -> None:
        for process in self.processes:
            self.kill(process)
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
