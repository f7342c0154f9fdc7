"""What the template's tests share: baking, and the Pythons of the machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devstack import services

collect_ignore = ["inside"]  # run in a bake by test_bake.py
sys.dont_write_bytecode = True  # what lies beside the template's sources is baked
TEMPLATE = Path(__file__).resolve().parent.parent
# Distributions and what each brings to import.
PACKAGES = {
    "celery-rollout": "rollout",
    "django-devstack": "devstack",
    "durable-jobs": "durable_jobs",
    "hardened-celery": "hardened_celery",
    "queue-probes": "queue_probes",
}
# A baked project decides for itself; what this shell or this test run is set up for stays outside.
NOT_INHERITED = (
    "DATABASE_URL",
    "CELERY_",
    "CI",
    "DJANGO_",
    "VIRTUAL_ENV",
    "MAKE",
    "PYTEST_",
    "UV_PROJECT",
)


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what would reach into a baked project."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    # A bake fetches uv where the machine has none: test_demo shows it, the others need not wait
    kept["PATH"] = f"{kept['PATH']}:{TEMPLATE / '.tools/bin'}"
    return kept | more


def run(*command: str, cwd: Path, timeout: float = 900, **more: str) -> str:
    """Run a command in a baked project; return its output, or fail the test with all of it."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
    output = done.stdout + done.stderr
    if done.returncode:
        pytest.fail(f"`{' '.join(command)}` exited with {done.returncode}:\n{output[-12_000:]}")
    return output


def export(target: Path) -> Path:
    """Copy what git would commit of the work tree to `target`: no caches, no build."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=TEMPLATE, capture_output=True, text=True, check=True)
    for name in filter(None, listing.stdout.split("\0")):
        if (TEMPLATE / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TEMPLATE / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a user gets it, from the work tree."""
    return export(tmp_path_factory.mktemp("template") / "template")


def cookiecutter(
    template: Path | str, output: Path, *options: str, **answers: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command a user runs; `output` is the folder the project appears in."""
    pairs = [f"{name}={value}" for name, value in answers.items()]
    command = [sys.executable, "-m", "cookiecutter", str(template), "--no-input", "-o", str(output)]
    return subprocess.run(
        [*command, *options, *pairs],
        env=environment(HOME=str(output)),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def bake(tmp_path: Path, template: Path) -> Callable[..., Path]:
    """Return a function that bakes with the given answers and returns the project's folder."""

    def baked(**answers: Any) -> Path:
        done = cookiecutter(template, tmp_path, **answers)
        assert done.returncode == 0, done.stdout + done.stderr
        (project,) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
        return project

    return baked


@pytest.fixture(scope="session")
def plain_bake(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    """A project with the default answers, for tests that only read it."""
    folder = tmp_path_factory.mktemp("plain")
    done = cookiecutter(template, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "my_project"


@pytest.fixture(scope="session")
def uv() -> str:
    """The uv of this machine, or the one `make` fetched for the template."""
    return shutil.which("uv") or str(TEMPLATE / ".tools/bin/uv")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The URLs of a PostgreSQL and a broker of this run."""
    with services.running(tmp_path_factory.mktemp("servers"), {}, durable=False) as running:
        yield running.environment


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory, uv: str) -> Path:
    """A folder with the sdist and the wheel of each package, as `make dist` builds them."""
    folder = tmp_path_factory.mktemp("built") / "dist"
    run(uv, "build", "--quiet", "--all-packages", "--out-dir", str(folder), cwd=TEMPLATE)
    return folder


def python_for(minimum: tuple[int, int]) -> str | None:
    """Return an interpreter of this machine of at least this version, or None."""
    if sys.version_info[:2] >= minimum:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(minimum[1], 20)]
    candidates = [found for name in names if (found := shutil.which(name))]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += map(str, sorted(pyenv.glob("versions/3.*/bin/python3")))
    check = f"import sys; sys.exit(sys.version_info[:2] < {minimum})"
    for candidate in candidates:
        # pyenv's shims are on PATH for versions that are not switched on, and fail
        if subprocess.run([candidate, "-c", check], capture_output=True).returncode == 0:
            return candidate
    return None
