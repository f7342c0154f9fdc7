"""No command of ours asks an index for one of the five names: a stranger may own them there."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout import systemd
from tests.conftest import PACKAGES, TEMPLATE, run
from tests.index import VERSION, Index, impostors

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md", "{{*/*.md", "{{*/[!p]*/**/*.md")
    for path in TEMPLATE.glob(pattern)
)
INSTALLS = re.compile(
    r"(?:(?:python3? -m |uv |\S*bin/)?pip install|pipx (?:install|run)|uv add|uvx) .*"
)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    folder = tmp_path / "index"
    folder.mkdir()
    with impostors(folder) as found:
        yield found


@pytest.fixture
def project(tmp_path: Path, plain_bake: Path) -> Path:
    return Path(shutil.copytree(plain_bake, tmp_path / "my_project", symlinks=True))


@pytest.fixture
def venv(tmp_path: Path, uv: str) -> Path:
    """An environment with pip alone; the path of its programs."""
    run(uv, "venv", "--quiet", "--seed", str(tmp_path / "venv"), cwd=tmp_path)
    return tmp_path / "venv/bin"


def unharmed(index: Index) -> None:
    """Assert that the index was asked, and for none of ours."""
    assert index.asked, "the index was not used at all"
    assert index.asked_for_ours() == []
    assert not index.marker.exists()


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_who_asks_for_a_name_of_ours_gets_the_impostor(
    index: Index, venv: Path, uv: str, tool: str
) -> None:
    """The control arm: the offer is good, and what is asked for is seen."""
    install = {
        "pip": (str(venv / "pip"), "install", "-q"),
        "uv": (uv, "pip", "install", "-q", "--python", str(venv / "python")),
    }[tool]
    run(*install, *PACKAGES, cwd=venv, **index.environment)
    assert len(index.asked_for_ours()) >= 2 * len(PACKAGES)
    run(str(venv / "python"), "-c", "import durable_jobs", cwd=venv)
    assert index.marker.read_text() == "durable_jobs"
    assert f"durable-jobs {VERSION}" in " ".join(run(str(venv / "pip"), "list", cwd=venv).split())


IN_A_BAKE = {
    "make .venv/.installed": "make .venv/.installed",
    "make lock": "make lock",
    "uv run": "uv run python -c 'import durable_jobs, queue_probes, hardened_celery, devstack'",
    "production": "uv lock -q && uv sync -q --no-dev --no-editable --frozen",
    "all packages": "uv sync -q --all-packages --all-groups",
}


@pytest.mark.parametrize("command", IN_A_BAKE)
def test_bake_is_installed_without_asking(index: Index, project: Path, command: str) -> None:
    run("sh", "-ec", IN_A_BAKE[command], cwd=project, **index.environment)
    run(".venv/bin/python", "-c", "import durable_jobs, queue_probes, rollout", cwd=project)
    unharmed(index)


def test_template_is_installed_without_asking(index: Index, tmp_path: Path, template: Path) -> None:
    clone = shutil.copytree(template, tmp_path / "clone", symlinks=True)
    run("make", ".venv/.installed", "dist", cwd=clone, **index.environment)
    unharmed(index)
    assert len(list((clone / "dist").glob("*.whl"))) == len(PACKAGES)


def test_release_is_built_without_asking(
    index: Index, project: Path, uv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are those that a deploy to systemd gives, in its own words."""
    given: list[tuple[str, ...]] = []
    settings: dict[str, str] = {}

    def record(*command: str, env: dict[str, str] | None = None, **_: object) -> str:
        given.append(command)
        settings.update({k: v for k, v in (env or {}).items() if k.startswith("UV_")})
        return ""

    monkeypatch.setattr(systemd, "run", record)
    monkeypatch.setattr(systemd, "uv", lambda *_: uv)
    monkeypatch.setattr(systemd.Systemd, "_collect_static", lambda *_: None)
    platform = object.__new__(systemd.Systemd)
    platform.home = project
    platform.install(project, "one")
    run(uv, "lock", "--quiet", cwd=project, **index.environment)
    installs = [command for command in given if command[0] == uv]
    assert any("sync" in command for command in installs)
    for command in installs:
        run(*command, cwd=project, **settings, **index.environment)
    unharmed(index)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return what a builder reads: COPY, RUN and their arguments, without options."""
    joined = re.sub(r"\\\n(?:\s*#.*\n)*", " ", dockerfile)
    return re.findall(r"^(COPY|RUN) (?:--\S+ +)*(.*)", joined, re.MULTILINE)


@pytest.mark.parametrize("locked", [True, False])
def test_image_is_built_without_asking(
    index: Index, project: Path, venv: Path, uv: str, tmp_path: Path, locked: bool
) -> None:
    """The commands that install, on the files that are copied before them, with an empty cache."""
    if locked:
        run(uv, "lock", "--quiet", cwd=project)
    build = tmp_path / "build"
    build.mkdir()
    place = {
        "UV_PROJECT_ENVIRONMENT": str(tmp_path / "opt"),
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_CACHE_DIR": str(tmp_path / "empty cache"),
        "PATH": f"{venv}:/usr/bin:/bin",
    }
    for word, rest in instructions((project / "Dockerfile").read_text()):
        if (word, rest) == ("COPY", ". ."):
            break
        if word == "COPY":
            *sources, target = rest.split()
            run("sh", "-c", f"cp -r {' '.join(sources)} {build}/{target}; true", cwd=project)
        else:
            run("sh", "-ec", rest, cwd=build, **place, **index.environment)
    unharmed(index)
    run(str(tmp_path / "opt/bin/python"), "-c", "import durable_jobs", cwd=tmp_path)
    assert (build / "uv.lock").exists()


def dry(uv: str, venv: Path) -> tuple[str, ...]:
    """Return the start of a command that says what would be installed."""
    return (uv, "pip", "install", "--dry-run", "--python", str(venv / "python"))


def test_pip_installs_a_bake_and_its_packages_without_asking(
    index: Index, project: Path, venv: Path, uv: str
) -> None:
    """`pip install .` brings what others wrote; with `./packages/*` the project runs."""
    told = run(*dry(uv, venv), ".", cwd=project, **index.environment)
    assert "celery==" in told
    assert not [package for package in PACKAGES if package in told]
    command = f"{venv}/pip install -q . ./packages/*"
    run("sh", "-ec", command, cwd=project, **index.environment)
    unharmed(index)
    run(str(venv / "python"), "-c", "import durable_jobs, queue_probes, devstack", cwd=venv)


def test_each_package_is_installed_without_asking(
    index: Index, project: Path, venv: Path, uv: str
) -> None:
    for package in PACKAGES:
        told = run(*dry(uv, venv), f"./packages/{package}", cwd=project, **index.environment)
        assert [name for name in PACKAGES if name in told] == [package]
    # pip itself, with the one that reads another where that is installed
    pip = (str(venv / "pip"), "install", "-q", "--dry-run")
    run(*pip, "./packages/queue-probes", cwd=project, **index.environment)
    unharmed(index)


def documented() -> dict[str, list[str]]:
    """Return for each document the commands in it that install something."""
    found = {}
    for document in DOCUMENTS:
        commands = [match.strip("`") for match in INSTALLS.findall(document.read_text())]
        if commands:
            found[str(document.relative_to(TEMPLATE))] = commands
    return found


def test_no_document_asks_an_index_for_ours() -> None:
    names = "|".join((*PACKAGES, *PACKAGES.values()))
    asks = re.compile(rf"""(?<![\w/.-])({names})(?![\w/.-])""")
    wrong = [
        f"{document}: {command}"
        for document, commands in documented().items()
        for command in commands
        if asks.search(command.partition(" #")[0].partition("`")[0])
    ]
    assert wrong == []


def test_what_the_documents_install_is_ours(
    index: Index, project: Path, venv: Path, uv: str
) -> None:
    """Each command that installs a package of ours, as it is written."""
    commands = {
        command.partition(" #")[0].partition("`")[0]
        for found in documented().values()
        for command in found
        if "packages/" in command and "pip install" in command
    }
    assert commands
    for command in sorted(commands):
        words = shlex.split(command)
        rest = words[words.index("install") + 1 :]
        run("sh", "-ec", '"$@"', "sh", *dry(uv, venv), *rest, cwd=project, **index.environment)
    unharmed(index)
