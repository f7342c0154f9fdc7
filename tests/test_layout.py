"""The rules of the tree: what is rendered, what is not, and what must not stand in it."""

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).resolve().parent.parent
PROJECT = TEMPLATE / "{{cookiecutter.project_slug}}"
JINJA = re.compile(rb"\{%|\{\{ *cookiecutter|\{#")


def template_files() -> list[str]:
    """Return the paths, from the project's folder, of the files that the template ships."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", str(PROJECT)]
    listing = subprocess.run(command, cwd=TEMPLATE, capture_output=True, check=True).stdout
    paths = (TEMPLATE / name for name in listing.decode().split("\0") if name)
    return [str(path.relative_to(PROJECT)) for path in paths if path.is_file()]


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
    source = (PROJECT / path).read_text()
    compile(source, path, "exec")
    assert not JINJA.search(source.encode())


def owned(project: Path) -> dict[str, str]:
    """Return the text of each file of a bake that is the person's, by path."""
    paths = (path for path in project.rglob("*") if path.is_file())
    names = {str(path.relative_to(project)): path for path in paths}
    return {
        name: path.read_text() for name, path in names.items() if not name.startswith("packages/")
    }


def test_declined_example_leaves_no_trace(bake) -> None:
    project = bake(example_app="false")
    files = owned(project)
    assert "templates/welcome.html" in files
    assert not (project / "notes").exists()
    trace = re.compile(r"\bnotes\b|# (no )?example\n", re.IGNORECASE)
    assert {name for name, text in files.items() if trace.search(text)} == set()


def test_example_leaves_no_trace_of_what_stands_in_for_it(bake) -> None:
    files = owned(bake())
    assert "notes/models.py" in files
    assert not [name for name, text in files.items() if "welcome" in name + text]
    assert "# example" not in files["config/settings.py"] + files["config/urls.py"]
    assert "# no example" not in files["config/urls.py"]


def test_a_person_owns_few_files_and_lines(bake) -> None:
    files = owned(bake())
    del files[".env"]  # git ignores it
    assert len(files) <= 90
    assert sum(text.count("\n") for text in files.values()) <= 3_500
    assert files["README.md"].count("\n") <= 60


def test_generated_project_has_no_file_of_a_tool(bake) -> None:
    project = bake()
    left = [path for path in project.rglob("*") if path.name in {"__pycache__", ".ruff_cache"}]
    assert left == []
    assert list(project.glob("packages/*/tests")) == []
    assert list(project.glob("packages/*/src/*/py.typed"))
