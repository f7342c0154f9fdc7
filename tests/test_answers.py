"""Answers: the bad are refused before anything is written, the strange are data and never code."""

import ast
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import PACKAGES, TEMPLATE, cookiecutter

REFUSED = [
    ({"project_slug": "2fast"}, "no lower-case Python identifier"),
    ({"project_slug": "my-project"}, "no lower-case Python identifier"),
    ({"project_slug": "MyProject"}, "no lower-case Python identifier"),
    ({"project_slug": "größe"}, "no lower-case Python identifier"),
    ({"project_slug": "../elsewhere"}, "no lower-case Python identifier"),
    ({"project_slug": "x" * 51}, "at most 50 characters"),
    ({"project_slug": "_hidden"}, "begins or ends with _"),
    ({"project_slug": "class"}, "is a Python keyword"),
    ({"project_slug": "match"}, "is a Python keyword"),
    ({"project_slug": "json"}, "name of a module or package in use"),
    ({"project_slug": "django"}, "name of a module or package in use"),
    ({"project_slug": "celery"}, "name of a module or package in use"),
    ({"project_slug": "test"}, "name of a module or package in use"),
    ({"project_slug": "config"}, "name of a module or package in use"),
    ({"project_slug": "celery_rollout"}, "name of a module or package in use"),
    ({"project_slug": "celery__rollout"}, "name of a module or package in use"),
    ({"project_slug": "tornado"}, "name of a module or package in use"),
    ({"project_name": "x" * 201, "project_slug": "fine"}, "1 to 200 printable characters"),
    ({"project_name": "two\nlines"}, "1 to 200 printable characters"),
    ({"project_name": "2 fast"}, "no lower-case Python identifier"),
    ({"description": "x" * 1_001}, "at most 1000 characters"),
    ({"django_version": "6.1", "python_version": "3.11"}, "Django 6.1 needs Python 3.12 or later"),
    ({"__requires_python": "3.8"}, "it follows from django_version"),
]


@pytest.mark.parametrize(("answers", "reason"), REFUSED, ids=lambda value: str(value)[:60])
def test_bad_answer_is_refused_in_one_line_and_leaves_nothing(
    tmp_path: Path, template: Path, answers: dict[str, str], reason: str
) -> None:
    done = cookiecutter(template, tmp_path, **answers)
    said = [line for line in (done.stdout + done.stderr).splitlines() if reason in line]
    assert done.returncode != 0
    assert len(said) == 1
    assert said[0].startswith("Nothing was generated. ")
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in found}


@pytest.mark.parametrize("complete", [True, False])
def test_a_folder_that_is_not_empty_is_left_as_it_is(
    tmp_path: Path, template: Path, complete: bool
) -> None:
    """With -f cookiecutter replaces whole folders, and the hooks remove what was declined."""
    if not complete:
        template = without_links(template, tmp_path / "template")
    output = tmp_path / "output"
    for name in ("config/mine.py", "templates/mine.html", "mine.txt"):
        (output / "my_project" / name).parent.mkdir(parents=True, exist_ok=True)
        (output / "my_project" / name).write_text("mine")
    before = files(output / "my_project")
    done = cookiecutter(template, output, "-f")
    said = re.findall(r"^Nothing was generated\. .*", done.stdout + done.stderr, re.M)
    assert done.returncode != 0
    assert len(said) == 1
    assert "is not empty" in said[0]
    assert "cruft update" in said[0]
    assert files(output / "my_project") == before


def test_an_empty_folder_is_taken_and_left_empty_by_a_bake_that_fails(
    tmp_path: Path, template: Path
) -> None:
    project = tmp_path / "output/my_project"
    project.mkdir(parents=True)
    incomplete = without_links(template, tmp_path / "template")
    assert cookiecutter(incomplete, project.parent, "-f").returncode != 0
    assert files(project) == {}
    assert cookiecutter(template, project.parent, "-f").returncode == 0
    assert (project / "packages/celery-rollout").is_dir()


def without_links(template: Path, target: Path) -> Path:
    """Copy the template as an archive brings it: its link is a text file."""
    shutil.copytree(template, target, symlinks=True)
    link = target / "{{cookiecutter.project_slug}}" / "packages"
    link.unlink()
    link.write_text("../packages")
    return target


def required(pyproject: str) -> set[str]:
    """Return the names of all that a pyproject.toml asks an installer for."""
    asked = re.sub(r"(?m)^\{%.*\n", "", pyproject)  # django-tasks, for one Django only
    data = tomllib.loads(asked.replace("{{ cookiecutter.__requires_python }}", "3.11"))
    lists = [data["project"].get("dependencies", []), *data.get("dependency-groups", {}).values()]
    lists += [*data["project"].get("optional-dependencies", {}).values()]
    lists += [data.get("build-system", {}).get("requires", [])]
    return {re.split(r"[^\w-]", line)[0] for one in lists for line in one}


def test_no_slug_is_the_name_of_anything_that_is_installed_with_a_project() -> None:
    own = (TEMPLATE / "{{cookiecutter.project_slug}}" / "pyproject.toml").read_text()
    own = own.partition("[tool.uv]")[0]
    wanted = required(own)
    for package in PACKAGES:
        wanted |= {
            package,
            *required((TEMPLATE / "packages" / package / "pyproject.toml").read_text()),
        }
    locked = tomllib.loads((TEMPLATE / "uv.lock").read_text())["package"]
    needs = {
        package["name"]: [
            needed["name"]
            for needed in sum(
                package.get("optional-dependencies", {}).values(), package.get("dependencies", [])
            )
        ]
        for package in locked
    }
    installed: set[str] = set()
    while wanted:
        name = wanted.pop()
        installed.add(name)
        wanted |= set(needs.get(name, ())) - installed
    assert {"pytest", "django-stubs", "django-tasks", "tornado", "sentry-sdk"} <= installed
    hook = ast.parse((TEMPLATE / "hooks/pre_gen_project.py").read_text())
    taken = {node.value for node in ast.walk(hook) if isinstance(node, ast.Constant)}
    assert {name.replace("-", "_") for name in installed} - taken == set()


@pytest.mark.parametrize(
    "answers",
    [
        {"python_version": "3.10"},
        {"django_version": "4.2"},
        {"broker": "kafka"},
        {"example_app": "perhaps"},
    ],
    ids=str,
)
def test_answer_that_is_no_choice_is_refused_in_one_line(
    tmp_path: Path, template: Path, answers: dict[str, str]
) -> None:
    """By cookiecutter itself, below a traceback of its own: no hook of ours runs before."""
    done = cookiecutter(template, tmp_path, **answers)
    ((name, value),) = answers.items()
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith(f"ValueError: {value} provided for ")
    assert name in last
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


@pytest.mark.parametrize(("said", "there"), [("no", False), ("0", False), ("y", True)])
def test_example_is_a_yes_or_no(bake, said: str, there: bool) -> None:
    assert (bake(example_app=said) / "notes").exists() == there


STRANGE = [
    'He said "hi"',
    "It's mine",
    "back\\slash\\",
    '"""',
    "'''",
    "# {comment} -- //",
    "$(touch pwned) `touch pwned` ; touch pwned | cat > pwned && touch pwned",
    "Grüße, 世界 🎉",
    "<script>alert(1)</script> &amp;",
    "%s %(name)s {0} ${HOME}",
    ": - [yaml] {braces} @at *star",
    "x" * 200,
]


@pytest.mark.parametrize("answer", STRANGE, ids=lambda value: value[:20])
def test_strange_answer_arrives_as_it_was_given(bake, answer: str) -> None:
    project = bake(project_name=answer, project_slug="fine", description=answer)
    assert_parses_and_means(project, answer, answer)


def test_name_without_letters_gets_the_default_folder(bake) -> None:
    assert bake(project_name="🎉").name == "my_project"


def test_description_may_have_several_lines(bake) -> None:
    text = 'first\nsecond "quoted"\n\\third'
    assert_parses_and_means(bake(description=text), "My Project", text)


def assert_parses_and_means(project: Path, name: str, description: str) -> None:
    tomllib.loads((project / "pyproject.toml").read_text())
    for path in ("compose.yaml", ".github/workflows/ci.yml"):
        assert yaml.safe_load((project / path).read_text())
    assert not list(project.rglob("pwned"))
    readme = (project / "README.md").read_text()
    assert readme.startswith(f"# {name}\n\n{description}\n")


def test_there_are_seven_prompts_and_each_has_a_label() -> None:
    context = json.loads((TEMPLATE / "cookiecutter.json").read_text())
    prompts = [name for name in context if not name.startswith("_")]
    assert len(prompts) == 7
    assert set(context["__prompts__"]) == set(prompts)
    assert isinstance(context["example_app"], bool)


def test_each_project_gets_its_own_secrets_in_a_private_file(bake) -> None:
    project = bake()
    secrets = dict(
        line.split("=", 1)
        for line in (project / ".env").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert (project / ".env").stat().st_mode & 0o777 == 0o600
    assert len(secrets["DJANGO_SECRET_KEY"]) >= 50
    assert secrets["FLOWER_BASIC_AUTH"].startswith("dev:")
    assert secrets["DJANGO_SECRET_KEY"] not in (project / ".env.example").read_text()
