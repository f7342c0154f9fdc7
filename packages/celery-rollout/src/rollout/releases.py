"""Releases side by side in a folder, complete or not there; which of them is the current one."""

import hashlib
import os
import re
import secrets
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class StepError(Exception):
    """A step did not reach its end; the message says which, and what was printed."""


class Releases(ABC):
    """`<home>/releases`: a folder for each release, and a link to the current one."""

    # What `init` writes, for people to fill: {app} and {secret} are known.
    SETTINGS = """\
# Settings of {app}, for all releases: NAME=value, without quotes and without a `$`.
DJANGO_SECRET_KEY={secret}
# Names that lead here, with commas between.
DJANGO_ALLOWED_HOSTS=
DJANGO_BEHIND_PROXY=1
# SENTRY_DSN=
# DJANGO_ADMINS=ops@example.com
# FLOWER_BASIC_AUTH=user:password
"""

    def __init__(self, app: str, home: Path, user: str | None) -> None:
        """`app`: what names of units and images begin with; `home`: also of settings and lock.

        `user`: whom processes run as; None: whom `init` was told, or one with the app's name.
        """
        told = home / "user"
        user = user or (told.read_text() if told.exists() else app)
        self.app = app
        self.home = home
        self.user = user
        self.releases = home / "releases"
        self.under_way = home / "under_way"

    def built(self) -> list[str]:
        """Return the releases that are complete, the newest first."""
        if not self.releases.is_dir():
            return []
        folders = (f for f in self.releases.iterdir() if f.is_dir() and not f.is_symlink())
        complete = [folder for folder in folders if not folder.name.startswith(".")]
        return [f.name for f in sorted(complete, key=lambda f: f.stat().st_mtime, reverse=True)]

    def commit(self, release: str) -> str | None:
        """Return the commit that a release was built of, None for one without git."""
        file = self.releases / release / ".commit"
        return file.read_text() or None if file.exists() else None

    def has_run(self, release: str) -> bool:
        """Tell whether a release has ever been current."""
        return (self.releases / release / ".ran").exists()

    def check_settings(self) -> None:
        """Raise StepError where a line of the settings cannot be one."""
        for number, line in enumerate((self.home / "env").read_text().splitlines(), 1):
            name, _, value = line.partition("=")
            # not what it says, which may be a secret
            if line.strip() and not re.match(r"#|[A-Za-z_]\w*=", line):
                raise StepError(f"line {number} of {self.home}/env is not NAME=value")
            if re.fullmatch(r"\w+_URL", name) and not is_url(value.strip().strip("\"'")):
                raise StepError(
                    f"{name} in {self.home}/env is no URL; in a password write `/` as %2F, `?` as"
                    " %3F, `#` as %23"
                )

    def note_settings(self, release: str) -> None:
        """Note with which settings this release starts: "mixed" if some of it runs with others."""
        if not self._serves(release):
            self.note(release, ".settings", self._settings())
        elif self.runs_with_other_settings(release):
            self.note(release, ".settings", "mixed")

    def note(self, release: str, name: str, text: str) -> None:
        """Keep a text with a release: whole, or not at all."""
        keep(self.releases / release / name, text)

    def runs_with_other_settings(self, release: str) -> bool:
        """Tell whether something of this release runs, and was not started with these settings."""
        noted = self.releases / release / ".settings"
        known = noted.exists() and self._serves(release)
        return known and noted.read_text() != self._settings()

    def _serves(self, release: str) -> bool:
        """Tell whether any of this release runs but the loop, which each deploy starts anew."""
        return any(name == release and role != "reconcile" for role, name in self.units())

    def _settings(self) -> str:
        return hashlib.sha256((self.home / "env").read_bytes()).hexdigest()

    def begin(self, what: str, release: str) -> None:
        """Note that "deploy of" or "rollback to" a release is under way, until `under_way` goes."""
        keep(self.under_way, f"{what} {release}")

    def begun(self) -> tuple[str, str]:
        """Return what `begin` has noted last, ("", "") when that has ended."""
        text = self.under_way.read_text() if self.under_way.exists() else ""
        what, _, release = text.rpartition(" ")
        return what, release

    def build(self, source: Path, release: str, commit: str | None) -> None:
        """Make the folder of a release: complete, or not there at all."""
        for left in self.releases.glob(".*"):  # behind by builds that were killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        # Of its own: what a killed build has started may still be writing.
        partial = self.releases / f".{release}.{os.getpid()}"
        try:
            self._fill(partial, source, release, commit)
            os.sync()  # a name that survives a loss of power names a folder that did
            partial.rename(self.releases / release)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _fill(self, partial: Path, source: Path, release: str, commit: str | None) -> None:
        if commit:
            partial.mkdir(parents=True)
            archive = subprocess.Popen(
                ["git", "-C", str(source), "archive", commit], stdout=subprocess.PIPE
            )
            run("tar", "-x", "-C", str(partial), stdin=archive.stdout)
            if archive.wait():
                raise StepError(f"git archive {commit} failed")
        else:
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        self.install(partial, release)
        (partial / ".commit").write_text(commit or "")
        run("chmod", "-R", "a+rX,go-w", str(partial))

    def current(self) -> str | None:
        """Return the release of the last deploy that succeeded."""
        link = self.releases / "current"
        if link.is_symlink() and not link.is_dir():
            raise StepError(
                f"{link} names {link.readlink()}, which is gone; let it name one that is"
            )
        return link.readlink().name if link.is_symlink() else None

    def previous(self) -> str | None:
        """Return the release that was current before, None where none is known and still there."""
        noted = self.releases / "current/.before"
        release = noted.read_text() if noted.exists() else None
        return release if release in self.built() else None

    def is_current(self, release: str, *, back: bool = False) -> None:
        """Note that this release runs, and what was current as `previous`, or none if `back`.

        Killed at any time, the current release and the one before are the old ones or the new.
        """
        before = self.current()
        (self.releases / release / ".ran").touch()
        if before == release:
            return
        self.note(release, ".before", "" if back else before or "")
        partial = self.releases / ".current"
        partial.unlink(missing_ok=True)
        partial.symlink_to(release)
        partial.rename(self.releases / "current")

    def tidy(self, kept: int) -> None:
        """Delete what neither runs nor is among the newest that have run."""
        ran = [release for release in self.built() if self.has_run(release)]
        needed = {self.current(), self.previous(), *self.all_running(), *ran[:kept]}
        for release in self.built():
            if release not in needed:
                self.delete(release)

    def delete(self, release: str) -> None:
        """Delete a release that does not run."""
        folder = self.releases / release
        folder.rename(self.releases / f".{release}")
        shutil.rmtree(self.releases / f".{release}")

    def wants_flower(self) -> bool:
        """Tell whether Flower has a password, without which it must not run."""
        return ":" in self.setting("FLOWER_BASIC_AUTH", "")

    def setting(self, name: str, default: str) -> str:
        """Return a value from the file of settings."""
        lines = (self.home / "env").read_text().splitlines()
        found = [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]
        return found[-1].strip().strip("\"'") if found else default

    def all_running(self) -> set[str]:
        """Return all releases of which something runs."""
        return {release for _, release in self.units()}

    def running(self, role: str) -> list[str]:
        """Return the releases that run in a role, or are about to, or end just now."""
        return [release for found, release in self.units() if found == role]

    # What each platform does in its own way

    def init(self) -> Path:
        """Make folders and the file of settings, unless they are there; return the file."""
        self.releases.mkdir(parents=True, exist_ok=True)
        (self.home / "user").write_text(self.user)
        settings = self.home / "env"
        if not settings.exists():
            settings.touch(mode=0o600)
            known = {"app": self.app, "secret": secrets.token_urlsafe(50)}
            settings.write_text(self.SETTINGS.format(**known, password=secrets.token_urlsafe(24)))
        return settings

    @abstractmethod
    def install(self, folder: Path, release: str) -> None:
        """Make the source in `folder` ready to run; raise StepError."""

    @abstractmethod
    def forget_others(self, release: str) -> None:
        """See that nothing of other releases is left behind, or starts when the machine does."""

    def close(self) -> None:  # noqa: B027 - only a socket has to be closed
        """Take no requests any more: nothing is there to answer them."""

    @abstractmethod
    def ailing(self, release: str) -> list[str]:
        """Return the roles of a release whose process has crashed and is started again."""

    @abstractmethod
    def last_words(self, release: str) -> str:
        """Return the last lines that the processes of a release have logged."""

    @abstractmethod
    def inside(self, release: str, *command: str, stdin: str = "", alone: bool = False) -> str:
        """Run a Python file of a release, with its settings, as its user; return what it prints.

        `alone`: not beside the same program of a deploy that was killed. Raises StepError.
        """

    @abstractmethod
    def attended(self, release: str, *command: str) -> int:
        """Run a Python file of a release for the person at the terminal; return its exit code."""

    @abstractmethod
    def roles(self, release: str | None = None) -> list[str]:
        """Return the roles that there are: in this release, or of anything on this machine."""

    @abstractmethod
    def units(self) -> list[tuple[str, str]]:
        """Return role and release of all that runs, is about to, or ends just now."""

    @abstractmethod
    def provide(self, release: str) -> None:
        """Have what every release needs to be asked anything; what runs is not disturbed."""

    @abstractmethod
    def prepare(self, release: str) -> None:
        """Install what all releases share as this one has it; what runs is not disturbed."""

    @abstractmethod
    def start(self, release: str, *roles: str) -> None:
        """Start roles of a release, now and whenever the machine starts; raise StepError."""

    @abstractmethod
    def stop(self, others: dict[str, list[str]]) -> None:
        """End roles of releases side by side; return when all have ended."""

    @abstractmethod
    def wait_for_web(self, release: str, seconds: float) -> None:
        """Return when requests reach the web of this release; raise StepError."""


def run(*command: str, **how: Any) -> str:
    """Run a program; return what it prints; raise StepError with its end when it fails."""
    try:
        done: subprocess.CompletedProcess[str]
        done = subprocess.run(command, capture_output=True, text=True, **how)
    except FileNotFoundError:
        raise StepError(f"{command[0]} is not installed") from None
    if done.returncode:
        said = [text.strip() for text in (done.stdout, done.stderr)]
        words = [reason(text) for text in said if text]
        text = "\n".join(words)[-3000:]
        name = " ".join(command[command.index("--") + 2 :] if "--" in command else command)
        told = "deploy/release.py" in command and done.returncode == 1  # its own words suffice
        raise StepError(text if told else f"`{name}` ended with {done.returncode}:\n{text}")
    return done.stdout


def keep(path: Path, text: str) -> None:
    """Write a file: whole, or not at all, whenever the process or the machine stops."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def is_url(text: str) -> bool:
    """Tell whether the host of a URL ends where it should; of several hosts that is not known."""
    try:
        urlsplit(text).port  # noqa: B018 - it raises ValueError
    except ValueError:
        return bool(re.match(r"[^/?#]*//[^/?#]*[,;]", text))
    return True


def ending(text: str, lines: int = 12) -> str:
    """Return the last lines of a log, each of them once."""
    found = dict.fromkeys(line[:300] for line in text.splitlines() if line.strip())
    return "\n".join(["the end of its log:", *list(found)[-lines:]])


def reason(text: str) -> str:
    """Return what was printed; of the last traceback only the line that names its exception.

    Not what follows, as DETAIL of PostgreSQL, which may show a row; nor a value, as of a setting.
    """
    last = text.rpartition("Traceback (most recent call last)")
    found = re.search(r"^[\w.<>]+(: .*)?$", last[2], re.MULTILINE) if last[1] else None
    line = found[0] if found else text
    return re.sub(r"(['\"]).*\1", "'...'", line) if line.startswith("ValueError: ") else line
