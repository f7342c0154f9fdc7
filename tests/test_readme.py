"""README, docs/ and CHANGELOG: short; each link, file, command, test and setting in them exists."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# The folders of tests that stand before a test's name: the suites of `make test`, and a project.
SUITES = {
    **{folder.name: [folder / "tests"] for folder in (ROOT / "packages").iterdir()},
    "template": [ROOT / "tests"],
    "project": [PROJECT / "tests", PROJECT / "notes", PROJECT / "accounts"],
}
# Made when a project runs, and the reader's own.
ELSEWHERE = {".dev", ".env", ".venv", "mysite", "shop"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> list[str]:
    """Return the lines of a page that are neither code nor a table."""
    lines, fenced = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("    ", "|")):
            lines.append(line)
    return lines


def anchors(page: Path) -> set[str]:
    """Return the names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@cache
def names_of(suite: str) -> set[str]:
    files = [file for folder in SUITES[suite] for file in folder.rglob("test*.py")]
    return {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}


@pages
def test_page_is_short(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert len(lines) <= (80 if page.name == "README.md" and page.parent == ROOT else 200)
    assert [line for line in prose(page) if len(line) > 200] == []


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pages
def test_every_make_target_exists(page: Path) -> None:
    makefiles = (ROOT / "Makefile").read_text() + (PROJECT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefiles, re.MULTILINE))
    named = set(
        re.findall(r"(?:^    |`)(?:\w+=\S+ )?make ([a-z-]+)", page.read_text(), re.MULTILINE)
    )
    assert named <= targets


@pages
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`([\w.][\w.-]*/[\w./-]*)", page.read_text())
    missing = [
        path
        for path in named
        if path.split("/")[0] not in ELSEWHERE
        and not (ROOT / path).exists()
        and not (PROJECT / path).exists()
    ]
    assert missing == []


@pages
def test_every_proof_is_a_test_of_its_suite(page: Path) -> None:
    """A proof is written as the suite's name and the test's: durable-jobs `test_x`."""
    proofs = re.findall(r"(?:([a-z-]+) )?`(test_\w+)`", page.read_text())
    if page.name.startswith("jobs-"):  # these are about one package
        proofs = [("durable-jobs", test) for _, test in proofs]
    unknown = [
        (suite, test)
        for suite, test in proofs
        if suite not in SUITES or test not in names_of(suite)
    ]
    assert unknown == []


@pytest.mark.parametrize("name", ["lost-work", "wrong-work", "unseen-failures"])
def test_every_failure_has_a_proof(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    sections = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) > 6
    assert [part.splitlines()[0] for part in sections if "`test_" not in part] == []
    # and the short list leads to it
    overview = (ROOT / "docs" / "reliability.md").read_text()
    linked = set(re.findall(rf"\({name}\.md#([\w-]+)\)", overview))
    assert len(linked) > 5
    assert linked <= anchors(page)


def test_every_page_stands_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_monitoring_page_has_every_alert_and_every_state_of_a_late_queue() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    rules = (PROJECT / "deploy" / "monitoring" / "alerts.yml").read_text()
    assert listed >= set(re.findall(r"- alert: (\w+)", rules))
    code = (ROOT / "packages/queue-probes/src/queue_probes/diagnosis.py").read_text()
    words = code.partition("WORDS = {")[2].partition("}\n")[0]
    states = set(re.findall(r"^    \"(\w+)\":", words, re.MULTILINE)) - {"ok", "busy"}
    # no verdict on any queue can be had then
    assert {name for name in listed if name.islower()} == states | {"database_down"}
