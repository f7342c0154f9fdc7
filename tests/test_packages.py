"""The packages as they stand: layers, sizes, what they tell an index; none asks for another."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email.message import Message
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from trove_classifiers import classifiers

from tests.conftest import PACKAGES, TEMPLATE, cookiecutter, environment, run

# Lines of Python in src, at most: what there is, and a little. All are above what was
# planned (3 300, 1 200, 1 400, 1 000, 1 700); who adds a line here takes another one out.
LINES = {
    "durable-jobs": 5_450,
    "django-devstack": 1_900,
    "celery-rollout": 1_950,
    "hardened-celery": 1_750,
    "queue-probes": 1_750,
}
LINES_PER_FILE, README_LINES = 300, 200
# What a person gets beside packages/, at most.
FILES_OF_A_BAKE, LINES_OF_A_BAKE = 90, 3_500
INSTALLABLE = {"LICENSE", "README.md", "pyproject.toml", "src"}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def sources(package: str) -> dict[str, int]:
    """Return the lines of each Python file that a package installs."""
    root = TEMPLATE / "packages" / package / "src"
    return {str(path.relative_to(root)): lines(path) for path in root.rglob("*.py")}


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def project(package: str) -> dict:
    return tomllib.loads((TEMPLATE / "packages" / package / "pyproject.toml").read_text())[
        "project"
    ]


def owned(bake: Path) -> list[Path]:
    """Return what of a fresh bake is the person's; `.env` has the secrets of this one."""
    files = (path for path in bake.rglob("*") if path.is_file() and path != bake / ".env")
    return [path for path in files if path.relative_to(bake).parts[0] != "packages"]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_small(package: str) -> None:
    found = sources(package)
    assert {name: size for name, size in found.items() if size > LINES_PER_FILE} == {}
    assert sum(found.values()) <= LINES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_what_a_reader_expects(package: str) -> None:
    root = TEMPLATE / "packages" / package
    assert lines(root / "README.md") <= README_LINES
    assert (root / "LICENSE").read_text() == (TEMPLATE / "LICENSE").read_text()
    assert (root / "src" / PACKAGES[package] / "py.typed").exists()
    assert list((root / "tests").glob("test_*.py"))


def test_a_person_owns_little(plain_bake: Path) -> None:
    files = owned(plain_bake)
    assert len(files) <= FILES_OF_A_BAKE
    assert sum(map(lines, files)) <= LINES_OF_A_BAKE
    assert lines(plain_bake / "README.md") <= 60
    assert lines(TEMPLATE / "README.md") <= 80


def test_packages_arrive_in_a_bake_without_their_tests(plain_bake: Path) -> None:
    packages = plain_bake / "packages"
    assert not packages.is_symlink()
    assert sorted(path.name for path in packages.iterdir()) == sorted(PACKAGES)
    assert {path.name for folder in packages.iterdir() for path in folder.iterdir()} == INSTALLABLE
    for package in PACKAGES:
        source = TEMPLATE / "packages" / package / "src"
        for path in filter(Path.is_file, source.rglob("*")):
            if "__pycache__" not in path.parts:
                assert (packages / package / "src" / path.relative_to(source)).read_bytes() == (
                    path.read_bytes()
                )


def test_what_work_on_a_package_leaves_stays_in_the_template(
    tmp_path: Path, template: Path
) -> None:
    used = Path(shutil.copytree(template, tmp_path / "used", symlinks=True))
    package = used / "packages/durable-jobs"
    for name in (
        ".dev/test/a/log",
        ".mypy_cache/b",
        "build/c",
        "dist/d",
        "src/durable_jobs/__pycache__/e",
    ):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text("left")
    (package / ".coverage").write_text("left")
    done = cookiecutter(used, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    baked = tmp_path / "my_project/packages/durable-jobs"
    assert {path.name for path in baked.iterdir()} == INSTALLABLE
    assert list(baked.rglob("__pycache__")) == []


def metadata(file: Path) -> Message:
    """Return what a wheel, or an sdist, says of itself."""
    if file.suffix == ".whl":
        with ZipFile(file) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            return Parser().parsestr(wheel.read(name).decode())
    with tarfile.open(file) as archive:
        (name,) = (n for n in archive.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", n))
        found = archive.extractfile(name)
        assert found
        return Parser().parsestr(found.read().decode())


def test_no_distribution_asks_for_another_of_ours(dist: Path) -> None:
    """Until the names are ours an index could answer with anybody's code."""
    built = [*dist.glob("*.whl"), *dist.glob("*.tar.gz")]
    assert len(built) == 2 * len(PACKAGES)
    for file in built:
        required = metadata(file).get_all("Requires-Dist", [])
        names = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in required}
        assert names & {*PACKAGES, *PACKAGES.values()} == set(), file.name
        assert required


@pytest.mark.parametrize("package", PACKAGES)
def test_index_would_take_what_is_built(dist: Path, package: str) -> None:
    (wheel,) = dist.glob(f"{package.replace('-', '_')}-*.whl")
    (sdist,) = dist.glob(f"{package.replace('-', '_')}-*.tar.gz")
    told = metadata(wheel)
    assert set(told.get_all("Classifier")) - classifiers == set()
    assert told["Summary"] == project(package)["description"]
    assert told["License-Expression"] == "MIT"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told["Requires-Python"] == f">={PYTHONS[0]}"
    said = [line.rpartition(":: ")[2] for line in told.get_all("Classifier") if ":: 3." in line]
    assert said == list(PYTHONS)
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    source = TEMPLATE / "packages" / package / "src"
    shipped = {
        str(path.relative_to(source))
        for path in filter(Path.is_file, source.rglob("*"))
        if "__pycache__" not in path.parts
    }
    assert {name for name in packed if ".dist-info/" not in name} == shipped
    assert any(name.endswith("/licenses/LICENSE") for name in packed)
    # From the sdist alone the same wheel can be built: it has all of src, and the licence.
    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in shipped} | {"LICENSE", "README.md"} <= carried


def test_numbers_and_bounds_agree() -> None:
    """Five packages, one release: they are tested together, and bound alike."""
    found = [project(package) for package in PACKAGES]
    assert len({each["version"] for each in found}) == 1
    bounds: dict[str, set[str]] = {}
    for each in found:
        optional = each.get("optional-dependencies", {}).values()
        for line in [*each["dependencies"], *(line for extra in optional for line in extra)]:
            name = re.split(r"[\[<>=~; ]", line)[0]
            bounds.setdefault(name, set()).add(line.partition("]")[2] or line[len(name) :])
            assert re.search(r"<\d", line), f"{each['name']}: {line} has no upper bound"
    assert {name: said for name, said in bounds.items() if len(said) > 1} == {}


ARROWS = {
    "durable_jobs/ids.py": "import queue_probes",
    "hardened_celery/liveness.py": "import durable_jobs",
    "queue_probes/conf.py": "import devstack",
    "rollout/source.py": "import hardened_celery",
    "devstack/state.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from devstack.services import Services"
    ),
}


def test_tool_sees_each_arrow_that_points_up(tmp_path: Path) -> None:
    shutil.copy(TEMPLATE / "pyproject.toml", tmp_path)
    for package, name in PACKAGES.items():
        shutil.copytree(TEMPLATE / "packages" / package / "src" / name, tmp_path / name)
    judge = (str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo")
    command = {"cwd": tmp_path, "env": environment(PYTHONPATH=str(tmp_path))}
    run(*judge, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    for file, line in ARROWS.items():
        whole = (tmp_path / file).read_text()
        (tmp_path / file).write_text(f"{whole}\n{line}\n")
        done = subprocess.run(judge, **command, capture_output=True, text=True)
        assert done.returncode == 1, f"{file}: {line} was not noticed"
        assert "BROKEN" in done.stdout
        (tmp_path / file).write_text(whole)


def test_tree_names_no_registry_and_no_machine() -> None:
    """What is cloned works elsewhere: no host of an index, no path of whoever wrote it."""
    listed = run("git", "ls-files", "-z", cwd=TEMPLATE).split("\0")
    forbidden = re.compile(
        rb"py"
        rb"pi\.org|python"
        rb"hosted\.org|registry\.npm"
        rb"js|deb\.debian"
        rb"\.org"
        rb"|/(?:home|Users)/(?!user\b|me\b)\w+/|/work"
        rb"/|/root"
        rb"/|/tmp"
        rb"/wt"
    )
    found = [
        f"{name}: {match[0].decode()}"
        for name in filter(None, listed)
        if (TEMPLATE / name).is_file()
        and (match := forbidden.search((TEMPLATE / name).read_bytes()))
    ]
    assert found == []


WORKFLOWS = [
    *sorted((TEMPLATE / ".github/workflows").glob("*.yml")),
    *sorted(TEMPLATE.glob("{{*/.github/workflows/*.yml")),
]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: str(path.relative_to(TEMPLATE)))
def test_workflows_run_what_was_looked_at_and_may_do_little(workflow: Path) -> None:
    parsed = yaml.safe_load(workflow.read_text())
    assert parsed["permissions"] == {"contents": "read"}
    for job in parsed["jobs"].values():
        assert set(job.get("permissions", {})) <= {"id-token"}
        assert 0 < job.get("timeout-minutes", 10) <= 90
        for step in job["steps"]:
            action = step.get("uses", "")
            assert not action or re.search(r"@([0-9a-f]{40}|v\d+)$", action)
            if workflow.is_relative_to(TEMPLATE / ".github"):  # a tag may be moved
                assert not action or re.search(r"@[0-9a-f]{40}$", action)


def test_release_publishes_only_what_was_tested_and_approved() -> None:
    release = yaml.safe_load((TEMPLATE / ".github/workflows/release.yml").read_text())
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    runs = [step["run"] for step in build["steps"] if "run" in step]
    assert runs.index("bash .ci/run") < runs.index("make dist")
    assert publish["needs"] == "build"
    assert publish["environment"] == "release"
    assert publish["permissions"] == {"id-token": "write"}
    assert not [step for step in publish["steps"] if "run" in step]  # no code beside the token
    assert "permissions" not in build


def test_check_of_the_tag_counts_the_wheels(dist: Path) -> None:
    release = yaml.safe_load((TEMPLATE / ".github/workflows/release.yml").read_text())
    (check,) = (s["run"] for s in release["jobs"]["build"]["steps"] if "tag" in s.get("name", ""))
    version = project("durable-jobs")["version"]
    for tag, code in ((f"v{version}", 0), ("v9.9", 1)):
        command = ["bash", "-c", check]
        env = environment(GITHUB_REF_NAME=tag)
        done = subprocess.run(command, cwd=dist.parent, env=env, capture_output=True)
        assert done.returncode == code


def test_updates_never_ask_for_ours() -> None:
    for file in (".github/dependabot.yml", "{{cookiecutter.project_slug}}/.github/dependabot.yml"):
        parsed = yaml.safe_load((TEMPLATE / file).read_text())
        (python,) = (each for each in parsed["updates"] if each["package-ecosystem"] == "uv")
        assert {each["dependency-name"] for each in python["ignore"]} >= set(PACKAGES)
