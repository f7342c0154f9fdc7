"""A generated project follows the template: cruft creates, checks and updates it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment, export

CHANGE = "# a line that a later release of the template brings\n"


def git(*arguments: str, cwd: Path) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def cruft(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "cruft", *arguments]
    env = environment(HOME=str(cwd))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A repository of the template as it stands in the work tree, with one commit."""
    template = export(tmp_path / "template")
    git("init", "--quiet", "--initial-branch=main", cwd=template)
    git("add", "--all", cwd=template)
    git("commit", "--quiet", "--message=first", cwd=template)
    return template


def test_project_is_created_checked_and_updated(tmp_path: Path, released: Path) -> None:
    created = cruft("create", str(released), "--no-input", cwd=tmp_path)
    assert created.returncode == 0, created.stdout + created.stderr
    project = tmp_path / "my_project"
    answers = json.loads((project / ".cruft.json").read_text())["context"]["cookiecutter"]
    assert answers["django_version"] == "5.2"
    assert answers["example_app"] is True
    git("init", "--quiet", "--initial-branch=main", cwd=project)
    git("add", "--all", cwd=project)
    git("commit", "--quiet", "--message=generated", cwd=project)
    assert cruft("check", cwd=project).returncode == 0
    secrets = (project / ".env").read_text()

    makefile = released / "{{cookiecutter.project_slug}}" / "Makefile"
    makefile.write_text(makefile.read_text() + CHANGE)
    git("commit", "--quiet", "--all", "--message=second", cwd=released)
    assert cruft("check", cwd=project).returncode == 1
    (project / "config" / "urls.py").write_text("# the owner's own change\n")
    git("commit", "--quiet", "--all", "--message=ours", cwd=project)
    updated = cruft("update", "--skip-apply-ask", cwd=project)
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert (project / "Makefile").read_text().endswith(CHANGE)
    assert (project / "config" / "urls.py").read_text() == "# the owner's own change\n"
    assert (project / ".env").read_text() == secrets
    assert cruft("check", cwd=project).returncode == 0
