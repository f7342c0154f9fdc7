"""Releases side by side on one machine: template units of systemd, `<app>-<role>@<release>`."""

import http.client
import json
import os
import pwd
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from rollout.platform import Platform
from rollout.shell import StepError, ending, keep, run, succeeds

UNITS = Path("/etc/systemd/system")


class Systemd(Platform):
    """Folders, units and the socket of one project."""

    SETTINGS = f"""{Platform.SETTINGS}\
# Where the proxy that speaks TLS finds the web.
WEB_LISTEN=127.0.0.1:8000
DATABASE_URL=postgres://user:password@127.0.0.1:5432/{{app}}
CELERY_BROKER_URL=redis://:password@127.0.0.1:6379/0
"""

    def init(self) -> Path:
        # The user of the processes owns nothing and cannot log in.
        if not succeeds("id", "-u", self.user):
            run("useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent", self.user)
        return super().init()

    def install(self, folder: Path, release: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
        environment |= {"UV_PYTHON_DOWNLOADS": "never", "UV_COMPILE_BYTECODE": "1"}
        environment |= {"UV_LINK_MODE": "copy", "UV_PROJECT_ENVIRONMENT": ".venv"}
        # The folder gets its last name when it is complete: so the environment is relocatable, and
        # the engines, members of the workspace, are copied into it and not linked.
        sync = ("sync", "--no-dev", "--no-editable", "--frozen")
        for command in (("venv", "--relocatable"), sync):
            run(uv(self.home), *command, "--quiet", cwd=folder, env=environment)
        python = str(folder / ".venv/bin/python")
        self._collect_static(folder, python)
        run(python, "-m", "compileall", "-q", "-x", r"\.venv", ".", cwd=folder)

    def _collect_static(self, folder: Path, python: str) -> None:
        """Run the release's own code as its user, to whom nothing belongs before and after."""
        nothing = {"DATABASE_URL": "postgres://build", "CELERY_BROKER_URL": "redis://build"}
        nothing |= {"DJANGO_SECRET_KEY": "build", "PATH": "/usr/bin:/bin"}
        static = folder / "staticfiles"
        static.mkdir(exist_ok=True)
        shutil.chown(static, self.user)
        run("chmod", "-R", "a+rX", str(folder))
        who = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}
        command = (python, "-B", "manage.py", "collectstatic", "--noinput")
        run(*command, cwd=folder, env=nothing, **who)
        run("chown", "-hR", "0:0", str(static))

    def python(self, release: str, *, tty: bool = False, unit: str = "") -> list[str]:
        while unit and alive(systemctl("show", "-P", "ActiveState", f"{unit}.service")):
            time.sleep(0.5)
        folder = self.releases / release
        named = [f"--unit={unit}"] if unit else []
        options = ["--pty" if tty else "--pipe", "--quiet", "--wait", "--collect", *named]
        options += [f"--uid={self.user}", f"--working-directory={folder}"]
        options += [f"--property=EnvironmentFile={self.env}", f"--setenv=RELEASE={release}"]
        options += [f"--setenv=PATH={folder}/.venv/bin:/usr/bin:/bin"]
        return ["systemd-run", *options, "--", f"{folder}/.venv/bin/python"]

    def forget_others(self, release: str) -> None:
        enabled = (link.name for link in UNITS.glob(f"*.wants/{self.app}-*@*.service"))
        others = [unit for unit in enabled if not unit.endswith(f"@{release}.service")]
        if others:
            systemctl("disable", "--quiet", *others)
        roles = self.roles(release)
        for file in UNITS.glob(f"{self.app}-*@.service"):
            if self._role(file) not in roles:
                file.unlink()
                systemctl("daemon-reload")
        for _, name, unit, state in self._listed():
            if name != release and not alive(state):  # killed while it was ending
                succeeds("systemctl", "reset-failed", unit)

    def _role(self, file: Path) -> str:
        return file.name.removeprefix(f"{self.app}-").removesuffix("@.service")

    def close(self) -> None:
        # A first deploy that was interrupted may have installed none or one of them.
        if (UNITS / f"{self.app}-web.socket").exists():
            systemctl("disable", "--quiet", "--now", f"{self.app}-web.socket")
        if (UNITS / f"{self.app}-web@.service").exists():
            systemctl("stop", f"{self.app}-web@current.service")  # what the socket would start

    def last_words(self, release: str) -> str:
        log = ["journalctl", "-u", f"{self.app}-*@{release}.service", "-o", "cat", "--no-pager"]
        # What they said; what systemd says of them only if that is all, as of a missing program.
        said = run(*log, "_TRANSPORT=stdout", "-n", "60", "-q")
        return ending(said or run(*log, "-n", "60"))

    def roles(self, release: str | None = None) -> list[str]:
        if release:
            files = (self.releases / release / "deploy/systemd").glob("*@.service")
            return sorted(file.name.removesuffix("@.service") for file in files)
        return sorted(self._role(file) for file in UNITS.glob(f"{self.app}-*@.service"))

    def unit(self, role: str, release: str) -> str:
        return f"{self.app}-{role}@{release}.service"

    def listen(self) -> str:
        """Return the address of the web that the settings want."""
        return self.setting("WEB_LISTEN", "127.0.0.1:8000")

    def check_settings(self) -> None:
        super().check_settings()
        address, web = self.listen(), f"{self.app}-web.socket"
        if not re.fullmatch(r"/\S+|(\d+(\.\d+){3}|\[[0-9a-fA-F:]+\]):\d{1,5}", address):
            raise StepError(f"WEB_LISTEN={address} is no `127.0.0.1:8000` or path of a socket")
        listens = systemctl("show", "-P", "Listen", web).partition(" ")[0]
        if systemctl("show", "-P", "ActiveState", web) == "active" and listens != address:
            told = self.setting("WEB_LISTEN", f"is not set, so it is {address}")
            raise StepError(
                f"the web listens on {listens}, and WEB_LISTEN {told}. To change that takes a"
                f" deploy without a web: first `systemctl stop {web} '{self.app}-web@*'`, then the"
                " same command again"
            )
        installed = UNITS / f"{self.app}-beat@.service"
        if installed.exists() and f"{self.home}/releases/" not in installed.read_text():
            raise StepError(f"{installed} belongs to another --home: one machine runs it once")

    def prepare(self, release: str) -> None:
        known = {"APP": self.app, "HOME": self.home, "USER": self.user, "LISTEN": self.listen()}
        for file in (self.releases / release / "deploy/systemd").iterdir():
            text = file.read_text()
            for name, value in known.items():
                text = text.replace(f"@{name}@", str(value))
            target = UNITS / f"{self.app}-{file.name}"
            if file.name == "common.conf":  # a drop-in of all units whose names begin so
                target = UNITS / f"{self.app}-@.service.d" / file.name
                target.parent.mkdir(exist_ok=True)
            if not target.exists() or target.read_text() != text:
                keep(target, text)
        systemctl("daemon-reload")
        systemctl("enable", "--now", f"{self.app}-web.socket")

    def units(self) -> list[tuple[str, str]]:
        return [(role, release) for role, release, _, state in self._listed() if alive(state)]

    def ailing(self, release: str) -> list[str]:
        found = self._listed()
        return [role for role, name, _, state in found if name == release and "auto" in state]

    def _listed(self) -> list[tuple[str, str, str, str]]:
        """Return role, release, unit and state of all units that systemd knows."""
        columns = rf"^({re.escape(self.app)}-([^@\s]+)@(\S+)\.service) +\S+ +(\S+ +\S+)"
        how = ("--all", "--plain", "--no-legend", "--full")
        listed = systemctl("list-units", *how, f"{self.app}-*@*.service")
        found = re.findall(columns, listed, re.MULTILINE)
        return [(role, release, unit, state) for unit, role, release, state in found]

    def start(self, release: str, *roles: str) -> None:
        units = [self.unit(role, release) for role in roles]
        if "reconcile" not in roles:  # it belongs to this deploy, and not to the next start
            systemctl("enable", "--quiet", *units)
        # The loop has a span of life; it begins anew.
        systemctl("restart" if "reconcile" in roles else "start", *units)

    def stop(self, others: dict[str, list[str]]) -> None:
        units = [self.unit(role, name) for role, names in others.items() for name in names]
        if units:
            systemctl("disable", "--quiet", *units)
            systemctl("stop", *units)
            # or what has crashed would be shown as failed until the next start of the machine
            succeeds("systemctl", "reset-failed", *units)

    def wait_for_web(self, release: str, seconds: float) -> None:
        address = self.listen()
        deadline = time.monotonic() + seconds
        seen = "nothing"
        while time.monotonic() < deadline:
            try:
                status, body = get(address, "/healthz/live")
                seen = f"status {status} of release {body.get('release')}"
                if status == 200 and body.get("release") == release:
                    return
            except (OSError, http.client.HTTPException, ValueError) as error:
                seen = repr(error)
            time.sleep(0.05)
        raise StepError(f"the new web has not answered within {seconds:g} s; last: {seen}")


def get(listen: str, path: str) -> tuple[int, Any]:
    """Ask an address as systemd writes it, `host:port` or a path; return status and JSON."""
    host, _, port = listen.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))  # noqa: S104
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    path_of_socket = listen.startswith("/")
    connection = http.client.HTTPConnection("localhost", timeout=5)
    connection.sock = socket.socket(socket.AF_UNIX if path_of_socket else kind)
    connection.sock.settimeout(5)
    try:
        connection.sock.connect(listen if path_of_socket else (host, int(port)))
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def uv(home: Path) -> str:
    """Return the path of uv; fetch it with pip when the machine has none."""
    if found := shutil.which("uv"):
        return found
    folder = home / ".tools"
    if not (folder / "bin/uv").exists():
        run("python3", "-m", "pip", "install", "-qq", "--target", str(folder), "uv")
    return str(folder / "bin/uv")


def alive(state: str) -> bool:
    """Tell whether a unit in this state runs, is about to, or ends just now."""
    return state.startswith(("activ", "reloading", "refreshing", "deactivating"))


def systemctl(*arguments: str) -> str:
    return run("systemctl", *arguments).strip()
