"""The rules of the tree: what is rendered, what is not, and what must not stand in it."""

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).resolve().parent.parent
PROJECT = TEMPLATE / "{{cookiecutter.project_slug}}"
RENDERED_PYTHON = {"config/project.py"}
JINJA = re.compile(rb"\{%|\{\{ *cookiecutter|\{#")


def template_files() -> list[str]:
    """Return the paths, from the project's folder, of the files that the template ships."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", str(PROJECT)]
    listing = subprocess.run(command, cwd=TEMPLATE, capture_output=True, check=True).stdout
    paths = (TEMPLATE / name for name in listing.decode().split("\0") if name)
    return [str(path.relative_to(PROJECT)) for path in paths if path.exists()]


def is_copied(path: str) -> bool:
    """Is this path, or a folder above it, in `_copy_without_render`?"""
    patterns = json.loads((TEMPLATE / "cookiecutter.json").read_text())["_copy_without_render"]
    above = [path, *map(str, Path(path).parents)]
    return any(fnmatch(part, pattern) for part in above for pattern in patterns)


@pytest.mark.parametrize("path", template_files())
def test_file_is_rendered_exactly_if_it_has_something_to_render(path: str) -> None:
    has_jinja = b"cookiecutter." in (PROJECT / path).read_bytes()
    assert is_copied(path) != has_jinja


@pytest.mark.parametrize("path", [path for path in template_files() if path.endswith(".py")])
def test_python_carries_no_jinja(path: str) -> None:
    if path not in RENDERED_PYTHON:
        source = (PROJECT / path).read_text()
        compile(source, path, "exec")
        assert not JINJA.search(source.encode())


def test_declined_example_leaves_no_trace(bake) -> None:
    project = bake(example_app="false")
    assert not (project / "notes").exists()
    mentions = {
        str(path.relative_to(project))
        for path in project.rglob("*")
        if path.is_file() and re.search(rb"\bnotes[./\"']", path.read_bytes())
    }
    # the places that ask whether it is there
    assert mentions <= SWITCHED


SWITCHED = {
    "devstack/commands.py",
    "config/settings.py",
    "config/urls.py",
    ".dockerignore",
    "pyproject.toml",
}


def test_generated_project_has_no_file_of_a_tool(bake) -> None:
    left = [path for path in bake().rglob("*") if path.name in {"__pycache__", ".ruff_cache"}]
    assert left == []
