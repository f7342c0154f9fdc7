"""No command of ours asks an index for one of the five names: a stranger may own them there."""

import re
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rollout import on_systemd
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

    monkeypatch.setattr(on_systemd, "run", record)
    monkeypatch.setattr(on_systemd, "uv", lambda *_: uv)
    monkeypatch.setattr(on_systemd.Systemd, "_collect_static", lambda *_: None)
    platform = object.__new__(on_systemd.Systemd)
    platform.home = project
    platform.install(project, "one")
    run(uv, "lock", "--quiet", cwd=project, **index.environment)
    installs = [command for command in given if command[0] == uv]
    assert any("sync" in command for command in installs)
    for command in installs:
        run(*command, cwd=project, **settings, **index.environment)
    unharmed(index)


def image_commands(dockerfile: str) -> list[str]:
    """Return the commands of RUN that install, as a shell would take them."""
    joined = re.sub(r"\\\n(?:\s*#.*\n)*", " ", dockerfile)
    runs = re.findall(r"^RUN ((?:--\S+ +)*)(.*)", joined, re.MULTILINE)
    return [command for _, command in runs if re.search(r"\b(uv|pip) ", command)]


@pytest.mark.parametrize("locked", [True, False])
def test_image_is_built_without_asking(
    index: Index, project: Path, venv: Path, uv: str, tmp_path: Path, locked: bool
) -> None:
    commands = image_commands((project / "Dockerfile").read_text())
    assert any("uv sync" in command for command in commands)
    if locked:
        run(uv, "lock", "--quiet", cwd=project)
    place = {
        "UV_PROJECT_ENVIRONMENT": str(tmp_path / "opt"),
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_CACHE_DIR": str(tmp_path / "empty cache"),
        "PATH": f"{venv}:/usr/bin:/bin",
    }
    for command in commands:
        run("sh", "-ec", command, cwd=project, **place, **index.environment)
    unharmed(index)
    run(str(tmp_path / "opt/bin/python"), "-c", "import durable_jobs", cwd=tmp_path)


def test_pip_installs_a_bake_and_its_packages_without_asking(
    index: Index, project: Path, venv: Path
) -> None:
    """`pip install .` brings what others wrote; with `./packages/*` the project runs."""
    shell = ("sh", "-ec")
    run(*shell, f"{venv}/pip install -q .", cwd=project, **index.environment)
    unharmed(index)
    assert "durable-jobs" not in run(str(venv / "pip"), "list", cwd=project)
    run(*shell, f"{venv}/pip install -q . ./packages/*", cwd=project, **index.environment)
    unharmed(index)
    run(str(venv / "python"), "-c", "import durable_jobs, queue_probes, devstack", cwd=venv)


def test_each_package_is_installed_without_asking(index: Index, project: Path, venv: Path) -> None:
    install = (str(venv / "pip"), "install", "-q", "--dry-run")

    def one(package: str) -> None:
        run(*install, f"./packages/{package}", cwd=project, **index.environment)

    with ThreadPoolExecutor() as together:
        list(together.map(one, PACKAGES))
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


def test_what_the_documents_install_is_ours(index: Index, project: Path, venv: Path) -> None:
    """Each command that installs a package of ours, as it is written."""
    commands = {
        command.partition(" #")[0].partition("`")[0]
        for found in documented().values()
        for command in found
        if "packages/" in command and "pip install" in command
    }
    assert commands

    def one(command: str) -> None:
        words = shlex.split(command)
        rest = words[words.index("install") + 1 :]
        run(
            str(venv / "pip"), "install", "-q", "--dry-run", *rest, cwd=project, **index.environment
        )

    with ThreadPoolExecutor(3) as together:
        list(together.map(one, sorted(commands)))
    unharmed(index)
