"""READMEs of the packages and of a bake name tests and files that exist; docs/ has test_readme."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

TEMPLATE = Path(__file__).resolve().parent.parent
PROJECT = TEMPLATE / "{{cookiecutter.project_slug}}"
DOCUMENTS = [
    TEMPLATE / "CONTRIBUTING.md",
    TEMPLATE / "benchmarks/README.md",
    *sorted(TEMPLATE.glob("packages/*/README.md")),
    PROJECT / "README.md",
    *sorted(path for path in PROJECT.glob("*/**/README.md") if "packages" not in path.parts),
]
documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(TEMPLATE))
)


@cache
def named_below(folder: Path) -> dict[str, set[str]]:
    """Return for each file of tests below a folder the names of its tests."""
    files = [*folder.rglob("test_*.py"), *folder.rglob("tests.py")]
    return {path.name: set(re.findall(r"def (test_\w+)\(", path.read_text())) for path in files}


@documents
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    own = document.parent if document.parent.parent.name == "packages" else None
    found = named_below(own) if own else named_below(TEMPLATE / "tests") | named_below(PROJECT)
    everything = set().union(*found.values())
    text = document.read_text()
    files = re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", text)
    missing = [
        f"{file}::{test}"
        for file, test in files
        if file not in found or (test and test not in found[file])
    ]
    missing += set(re.findall(r"`(test_\w+)`", text)) - everything
    assert missing == []


@documents
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    links = map(unquote, re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()))
    assert [link for link in links if not (document.parent / link).exists()] == []
