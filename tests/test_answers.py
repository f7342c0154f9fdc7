"""Answers: the bad are refused before anything is written, the strange are data and never code."""

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import TEMPLATE, cookiecutter

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
    ({"project_slug": "json"}, "name of a module in use"),
    ({"project_slug": "django"}, "name of a module in use"),
    ({"project_slug": "celery"}, "name of a module in use"),
    ({"project_slug": "test"}, "name of a module in use"),
    ({"project_slug": "config"}, "name of a module in use"),
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
