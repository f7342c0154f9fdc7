"""What a deploy is asked to bring up: the commit of a checkout, or a release that is there."""

import argparse
import re
import subprocess
import tomllib
from pathlib import Path

from rollout.platform import Platform
from rollout.shell import RefusedError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
NO_CHECKOUT = "it is no checkout, and no command: `deploy [init|status]`, `rollback` and `manage`"
NO_LOCK = "`uv lock` makes it; commit it, so that each build installs the same"
RESERVED = ("current", "previous", "none", "init", "status")


def app_name(folder: Path) -> str:
    """Return what names of units and images begin with, as the project's pyproject.toml has it."""
    file = folder.resolve() / "pyproject.toml"
    try:
        found = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RefusedError(f"{file} names no project: {error}") from None
    name = found.get("project", {}).get("name", folder.resolve().name)
    return str(found.get("tool", {}).get("rollout", {}).get("name", name)).replace("-", "_")


def wanted(platform: Platform, options: argparse.Namespace) -> tuple[str, Path, str | None]:
    """Return name, source and commit of the release that the command line asks for.

    Raises RefusedError when that is none, or when the name is taken by another commit.
    """
    source = Path(options.source).resolve()
    built = platform.built()
    if options.to is not None:
        if options.to not in built:
            raise RefusedError(f"there is no release {options.to}; there are: {', '.join(built)}")
        refuse_other_settings(platform, options.to)
        return options.to, source, platform.commit(options.to)
    for name, why in (("manage.py", NO_CHECKOUT), ("uv.lock", NO_LOCK)):
        if not (source / name).is_file():
            raise RefusedError(f"{source} has no {name}: {why}")
    commit = commit_of(source)
    release = (commit or "")[:12] if options.name is None else options.name
    if options.name is None and commit is None:
        raise RefusedError(f"{source} is no git checkout: name the release with --name")
    if release in RESERVED or not NAME.fullmatch(release):
        raise RefusedError(
            f"{release!r} cannot name a release: up to 40 letters, digits, `.`, `_` and `-`, the"
            f" first a letter or digit, and none of {', '.join(RESERVED)}"
        )
    if release in built and platform.commit(release) != commit:
        raise RefusedError(
            f"{release} is another commit, {platform.commit(release)}: choose another name, or"
            f" deploy that one with --to {release}"
        )
    refuse_other_settings(platform, release)
    return release, source, commit


def commit_of(source: Path) -> str | None:
    """Return the commit checked out in a folder, None where it is no git checkout.

    Raises RefusedError when git refuses, or when the folder holds changes that are not committed.
    """
    git = ["git", "-C", str(source)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        if any((folder / ".git").exists() for folder in (source, *source.parents)):
            empty = "unknown revision" in found.stderr
            why = "nothing is committed yet" if empty else found.stderr.splitlines()[0]
            if "dubious ownership" in why:  # somebody else's checkout
                why += f"; `git config --global --add safe.directory {source}` allows it to root"
            raise RefusedError(f"{source}: {why}")
        return None
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    if changes.stdout:
        raise RefusedError(f"commit these changes first, or stash them:\n{changes.stdout.rstrip()}")
    return found.stdout.strip()


def refuse_other_settings(platform: Platform, release: str) -> None:
    """Raise RefusedError where settings have changed that a running release would not read."""
    if platform.runs_with_other_settings(release):
        raise RefusedError(
            f"{release} runs with other settings than those of {platform.env}; to apply these"
            f" give it another name: deploy --name {release}-2"
        )
