"""What runs of a project's releases, and how it is started and ended: one class for each way."""

import os
import secrets
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from rollout.home import Home
from rollout.shell import StepError, run


class Platform(Home, ABC):
    """A home whose releases run on this machine, side by side, in the roles that each one has."""

    # What `init` writes, for people to fill: {app} and {secret} are known.
    SETTINGS = """\
# Settings of {app}, for all releases: NAME=value; a value with a `$` in single quotes.
DJANGO_SECRET_KEY={secret}
# Names that lead here, with commas between.
DJANGO_ALLOWED_HOSTS=
DJANGO_BEHIND_PROXY=1
# SENTRY_DSN=
# DJANGO_ADMINS=ops@example.com
# FLOWER_BASIC_AUTH=user:password
"""

    def init(self) -> Path:
        """Make folders and the file of settings, unless they are there; return the file."""
        self.releases.mkdir(parents=True, exist_ok=True)
        (self.home / "user").write_text(self.user)
        if not self.env.exists():
            self.env.touch(mode=0o600)
            known = {"app": self.app, "secret": secrets.token_urlsafe(50)}
            self.env.write_text(self.SETTINGS.format(**known, password=secrets.token_urlsafe(24)))
        return self.env

    def build(self, source: Path, release: str, commit: str | None) -> None:
        """Make the folder of a release: complete, or not there at all."""
        for left in self.releases.glob(".*"):  # behind by builds that were killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        # Of its own: what a killed build has started may still be writing.
        partial = self.releases / f".{release}.{os.getpid()}"
        try:
            unpack(source, commit, partial)
            self.install(partial, release)
            (partial / ".commit").write_text(commit or "")
            run("chmod", "-R", "a+rX,go-w", str(partial))
            os.sync()  # a name that survives a loss of power names a folder that did
            partial.rename(self.releases / release)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def tidy(self, kept: int) -> None:
        """Delete what neither runs nor is among the newest that have run."""
        ran = [release for release in self.built() if self.has_run(release)]
        needed = {self.current(), self.previous(), *self.all_running(), *ran[:kept]}
        for release in self.built():
            if release not in needed:
                self.delete(release)

    def all_running(self) -> set[str]:
        """Return all releases of which something runs."""
        return {release for _, release in self.units()}

    def running(self, role: str) -> list[str]:
        """Return the releases that run in a role, or are about to, or end just now."""
        return [release for found, release in self.units() if found == role]

    def wanted(self, release: str) -> list[str]:
        """Return the roles that a release has to run in when its deploy is done."""
        # without a password Flower must not run
        flower = ":" in self.setting("FLOWER_BASIC_AUTH", "")
        unwanted = {"reconcile"} if flower else {"reconcile", "flower"}
        return [role for role in self.roles(release) if role not in unwanted]

    def note_settings(self, release: str) -> None:
        """Note with which settings this release starts: "mixed" if some of it runs with others."""
        if not self._serves(release):
            self.note(release, ".settings", self.fingerprint())
        elif self.runs_with_other_settings(release):
            self.note(release, ".settings", "mixed")

    def runs_with_other_settings(self, release: str) -> bool:
        """Tell whether something of this release runs, and was not started with these settings."""
        noted = self.releases / release / ".settings"
        known = noted.exists() and self._serves(release)
        return known and noted.read_text() != self.fingerprint()

    def inside(self, release: str, *command: str, stdin: str = "", alone: bool = False) -> str:
        """Run Python in a release; return what it prints; raise StepError.

        `alone`: not beside the same of a deploy that was killed.
        """
        unit = f"{self.app}-alone" if alone else ""
        return run(*self.python(release, unit=unit), *command, input=stdin)

    def attended(self, release: str, *command: str) -> int:
        """Run Python in a release for the person at the terminal; return its exit code."""
        return subprocess.run([*self.python(release, tty=os.isatty(0)), *command]).returncode

    def _serves(self, release: str) -> bool:
        """Tell whether any of this release runs but the loop, which each deploy starts anew."""
        return any(name == release and role != "reconcile" for role, name in self.units())

    def provide(self, release: str) -> None:
        """Have what every release needs to be asked anything; what runs is not disturbed."""

    def close(self) -> None:
        """Take no requests any more: nothing is there to answer them."""

    @abstractmethod
    def install(self, folder: Path, release: str) -> None:
        """Make the source in `folder` ready to run; raise StepError."""

    @abstractmethod
    def python(self, release: str, *, tty: bool = False, unit: str = "") -> list[str]:
        """Return the command that runs Python in a release, with its settings, as its user.

        `unit`: its name; returns when nothing runs under that, as of a deploy that was killed.
        """

    @abstractmethod
    def roles(self, release: str | None = None) -> list[str]:
        """Return the roles that there are: in this release, or of anything on this machine."""

    @abstractmethod
    def units(self) -> list[tuple[str, str]]:
        """Return role and release of all that runs, is about to, or ends just now."""

    @abstractmethod
    def ailing(self, release: str) -> list[str]:
        """Return the roles of a release whose process has crashed and is started again."""

    @abstractmethod
    def last_words(self, release: str) -> str:
        """Return the last lines that the processes of a release have logged."""

    @abstractmethod
    def prepare(self, release: str) -> None:
        """Install what all releases share as this one has it; what runs is not disturbed."""

    @abstractmethod
    def start(self, release: str, *roles: str) -> None:
        """Start roles of a release, now and whenever the machine starts; raise StepError."""

    @abstractmethod
    def wait_for_web(self, release: str, seconds: float) -> None:
        """Return when requests reach the web of this release; raise StepError."""

    @abstractmethod
    def stop(self, others: dict[str, list[str]]) -> None:
        """End roles of releases side by side; return when all have ended."""

    @abstractmethod
    def forget_others(self, release: str) -> None:
        """See that nothing of other releases is left behind, or starts when the machine does."""


def unpack(source: Path, commit: str | None, folder: Path) -> None:
    """Copy a commit to a new folder, or the files as they are where there is no git."""
    if commit is None:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        return
    folder.mkdir(parents=True)
    archive = subprocess.Popen(
        ["git", "-C", str(source), "archive", commit], stdout=subprocess.PIPE
    )
    run("tar", "-x", "-C", str(folder), stdin=archive.stdout)
    if archive.wait():
        raise StepError(f"git archive {commit} failed")
