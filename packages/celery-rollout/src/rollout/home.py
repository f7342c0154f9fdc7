"""What stands in /srv/<project>: releases side by side, complete or not there, and settings.

A release is a folder; `current` links to the one whose deploy has succeeded. What else has to be
known after a kill or a loss of power stands in a file beside it, whole or not there.
"""

import hashlib
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from rollout.shell import StepError, keep


class Home:
    """The folder of one project on one machine."""

    def __init__(self, app: str, home: Path, user: str | None = None) -> None:
        """`app`: what names of units and images begin with.

        `user`: whom processes run as; None: whom `init` was told, or one with the app's name.
        """
        told = home / "user"
        self.user = user or (told.read_text() if told.exists() else app)
        self.app = app
        self.home = home
        self.env = home / "env"
        self.releases = home / "releases"

    def built(self) -> list[str]:
        """Return the releases that are complete, the newest first."""
        found = [folder for folder in self.releases.glob("[!.]*") if not folder.is_symlink()]
        return [f.name for f in sorted(found, key=lambda f: f.stat().st_mtime, reverse=True)]

    def commit(self, release: str) -> str | None:
        """Return the commit that a release was built of, None for one without git."""
        file = self.releases / release / ".commit"
        return file.read_text() or None if file.exists() else None

    def has_run(self, release: str) -> bool:
        """Tell whether a release has ever been current."""
        return (self.releases / release / ".ran").exists()

    def current(self) -> str | None:
        """Return the release of the last deploy that succeeded."""
        link = self.releases / "current"
        if link.is_symlink() and not link.is_dir():
            named = link.readlink()
            raise StepError(f"{link} names {named}, which is gone; let it name one that is")
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

    def note(self, release: str, name: str, text: str) -> None:
        """Keep a text with a release: whole, or not at all."""
        keep(self.releases / release / name, text)

    def begin(self, what: str, release: str) -> None:
        """Note that "deploy of" or "rollback to" a release is under way; ("", "") when it ended."""
        keep(self.home / "under_way", f"{what} {release}")

    def begun(self) -> tuple[str, str]:
        """Return what `begin` has noted last."""
        noted = self.home / "under_way"
        what, _, release = (noted.read_text() if noted.exists() else "").rpartition(" ")
        return what, release

    def delete(self, release: str) -> None:
        """Delete a release that does not run."""
        (self.releases / release).rename(self.releases / f".{release}")
        shutil.rmtree(self.releases / f".{release}")

    def check_settings(self) -> None:
        """Raise StepError where a line of the settings cannot be one; it may show no secret."""
        for number, line in enumerate(self.env.read_text().splitlines(), 1):
            name, _, value = line.partition("=")
            if line.strip() and not re.match(r"#|[A-Za-z_]\w*=", line):
                raise StepError(f"line {number} of {self.env} is not NAME=value")
            if re.fullmatch(r"\w+_URL", name) and not is_url(value.strip().strip("\"'")):
                how = "in a password write `/` as %2F, `?` as %3F, `#` as %23"
                raise StepError(f"{name} in {self.env} is no URL; {how}")

    def setting(self, name: str, default: str) -> str:
        """Return a value from the file of settings."""
        lines = self.env.read_text().splitlines()
        found = [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]
        return found[-1].strip().strip("\"'") if found else default

    def fingerprint(self) -> str:
        """Return what tells these settings from others, and does not show them."""
        return hashlib.sha256(self.env.read_bytes()).hexdigest()


def is_url(text: str) -> bool:
    """Tell whether the host of a URL ends where it should; of several hosts that is not known."""
    try:
        urlsplit(text).port  # noqa: B018 - it raises ValueError
    except ValueError:
        return bool(re.match(r"[^/?#]*//[^/?#]*[,;]", text))
    return True
