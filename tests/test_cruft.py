"""Wherever the template is taken from, a project gets all of it; cruft creates, checks, updates."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PACKAGES, cookiecutter, environment, export

CHANGE = "# a line that a later release of the template brings\n"
OURS = "# a line of the owner's\n"
ENGINE = "packages/durable-jobs/src/durable_jobs/__init__.py"


def git(*arguments: str, cwd: Path) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def commit(repository: Path, message: str) -> None:
    if not (repository / ".git").exists():
        git("init", "--quiet", "--initial-branch=main", cwd=repository)
    git("add", "--all", cwd=repository)
    git("commit", "--quiet", f"--message={message}", cwd=repository)


def cruft(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "cruft", *arguments]
    identity = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.com"}
    identity |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in identity.items()}
    env = environment(HOME=str(cwd), **identity)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A repository of the template as it stands in the work tree, with one commit."""
    template = export(tmp_path / "template.git")
    commit(template, "first")
    return template


@pytest.fixture
def project(tmp_path: Path, released: Path) -> Path:
    """A project that cruft made of it, committed."""
    created = cruft("create", str(released), "--no-input", cwd=tmp_path)
    assert created.returncode == 0, created.stdout + created.stderr
    commit(tmp_path / "my_project", "generated")
    return tmp_path / "my_project"


def carries_engines(project: Path) -> None:
    """Assert that all packages are there: folders, not links, and without our tests."""
    packages = project / "packages"
    assert not packages.is_symlink()
    assert sorted(path.name for path in packages.iterdir()) == sorted(PACKAGES)
    for package, module in PACKAGES.items():
        assert (packages / package / "src" / module / "__init__.py").is_file()
        assert not (packages / package / "tests").exists()


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize("url", ["{}", "file://{}", "git+file://{}"])
def test_every_way_to_take_the_template_brings_the_engines(
    tmp_path: Path, released: Path, url: str
) -> None:
    done = cookiecutter(url.format(released), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    carries_engines(tmp_path / "my_project")


def test_archive_without_links_is_refused_in_one_line(tmp_path: Path, released: Path) -> None:
    """Unpacked by Python, as cookiecutter does, a link is a text file that says where it led."""
    archive = tmp_path / "template.zip"
    git("archive", "--format=zip", "--prefix=x/", f"--output={archive}", "HEAD", cwd=released)
    output = tmp_path / "output"
    output.mkdir()
    done = cookiecutter(archive, output)
    assert done.returncode == 1
    said = re.findall(r"^Nothing was generated\. .*packages.*$", done.stdout + done.stderr, re.M)
    assert len(said) == 1
    assert [path for path in output.iterdir() if not path.name.startswith(".")] == []


def test_project_is_created_checked_and_updated(released: Path, project: Path) -> None:
    answers = json.loads((project / ".cruft.json").read_text())["context"]["cookiecutter"]
    assert answers["django_version"] == "5.2"
    assert answers["example_app"] is True
    carries_engines(project)
    assert cruft("check", cwd=project).returncode == 0
    secrets = (project / ".env").read_text()

    append(released / "{{cookiecutter.project_slug}}" / "Makefile", CHANGE)
    append(released / ENGINE, CHANGE)
    (released / ENGINE).with_name("brand_new.py").write_text(CHANGE)
    commit(released, "second")
    assert cruft("check", cwd=project).returncode == 1
    (project / "config" / "urls.py").write_text("# the owner's own change\n")
    commit(project, "ours")
    updated = cruft("update", "--skip-apply-ask", cwd=project)
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert (project / "Makefile").read_text().endswith(CHANGE)
    assert (project / ENGINE).read_text().endswith(CHANGE)
    assert (project / ENGINE).with_name("brand_new.py").read_text() == CHANGE
    assert (project / "config" / "urls.py").read_text() == "# the owner's own change\n"
    assert (project / ".env").read_text() == secrets
    carries_engines(project)
    assert cruft("check", cwd=project).returncode == 0
    assert rejected(project) == []


def rejected(project: Path) -> list[str]:
    return [str(path.relative_to(project)) for path in project.rglob("*.rej")]


def test_own_changes_beside_ours_merge(released: Path, project: Path) -> None:
    """In one file, some lines apart: both are there, and nothing is left to be done by hand."""
    name = "config/urls.py"
    append(released / "{{cookiecutter.project_slug}}" / name, CHANGE)
    append(released / ENGINE, CHANGE)
    commit(released, "second")
    for file in (project / name, project / ENGINE):
        file.write_text(OURS + file.read_text())
    with (project / "config/settings.py").open("a") as settings:
        settings.write(OURS)
    commit(project, "ours")
    updated = cruft("update", "--skip-apply-ask", cwd=project)
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert rejected(project) == []
    for file in (project / name, project / ENGINE):
        assert file.read_text().startswith(OURS)
        assert file.read_text().endswith(CHANGE)
    assert (project / "config/settings.py").read_text().endswith(OURS)


def test_a_line_that_both_changed_gets_conflict_markers(released: Path, project: Path) -> None:
    name = "config/urls.py"
    append(released / "{{cookiecutter.project_slug}}" / name, CHANGE)
    append(released / ENGINE, CHANGE)
    commit(released, "second")
    append(project / name, OURS)
    commit(project, "ours")
    cruft("update", "--skip-apply-ask", cwd=project)
    text = (project / name).read_text()
    assert f"<<<<<<< ours\n{OURS}=======\n{CHANGE}>>>>>>> theirs\n" in text
    assert (project / ENGINE).read_text().endswith(CHANGE)
    assert rejected(project) == []
