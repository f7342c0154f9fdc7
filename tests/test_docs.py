"""The documents name tests and files that exist: a proof that was renamed is no proof."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

TEMPLATE = Path(__file__).resolve().parent.parent
PROJECT = TEMPLATE / "{{cookiecutter.project_slug}}"
DOCUMENTS = [
    *PROJECT.glob("README.md"),
    *PROJECT.glob("*/README.md"),
]
TESTS = [*PROJECT.rglob("test_*.py"), *(TEMPLATE / "tests").glob("test_*.py")]
SOURCES = {path.name: path.read_text() for path in TESTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(TEMPLATE)))
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    named = re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", text)
    missing = [
        f"{file}::{test}"
        for file, test in named
        if file not in SOURCES or (test and f"def {test}(" not in SOURCES[file])
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(TEMPLATE)))
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    links = map(unquote, re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()))
    assert [link for link in links if not (document.parent / link).exists()] == []
