"""What is the project's and not ours: its folder, and `[tool.devstack]` of its `pyproject.toml`.

Nothing is needed there: the defaults run what `django-admin startproject` makes, with Celery.
"""

import os
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from devstack.state import StackError

BROKERS = ("valkey", "rabbitmq")
SAID_BY_MANAGE = re.compile(r"""DJANGO_SETTINGS_MODULE["'],\s*["']([\w.]+)["']""")
# Names of processes are names of files as well; these are taken.
RESERVED = {"web", "beat", "flower", "postgres", "valkey", "rabbitmq", "epmd", "prepare", "check"}
T = TypeVar("T")
KINDS: dict[type, str] = {
    str: "text in quotes",
    bool: "true or false",
    int: "a number",
    dict: "a table",
}


@dataclass(frozen=True)
class Worker:
    """A worker: its queues as for `celery worker -Q`, and how many tasks it runs at once."""

    queues: str = ""  # those that the settings name
    concurrency: int = 2


@dataclass(frozen=True)
class Project:
    """What is run, and where. The fields from `settings` on are the keys of `[tool.devstack]`."""

    root: Path
    settings: str
    celery: str = ""  # as for `celery -A`; the package of the settings
    broker: str = "valkey"
    web: str = "python manage.py runserver --noreload 127.0.0.1:{port}"
    ready: str = ""  # a page that answers as soon as the web works
    web_port: int = 8000  # where it is free, as the next
    flower_port: int = 5555
    flower: bool = True  # where it is installed
    beat: bool = True
    workers: dict[str, Worker] = field(default_factory=lambda: {"worker": Worker()})
    programs: dict[str, str] = field(default_factory=dict)  # more commands, by name
    links: dict[str, str] = field(default_factory=lambda: {"Admin": "admin/"})
    task: str = ""  # a line of Python that runs a first task

    @property
    def folder(self) -> Path:
        """Where the stack keeps its files."""
        return self.root / ".dev"


def find(start: Path) -> Project:
    """Return the project of a folder; raise StackError in one line when it cannot be run."""
    upward = [start, *start.parents]
    tables = {folder: _table(folder / "pyproject.toml") for folder in upward}
    named = os.environ.get("DJANGO_SETTINGS_MODULE", "")
    here = (folder for folder in upward if tables[folder] or (folder / "manage.py").exists())
    root = next(here, start if named else None)
    if not root:
        raise StackError(
            f"no project in {start} or above: neither manage.py nor a pyproject.toml with"
            " [tool.devstack]"
        )
    # one pyproject.toml may stand above the folder with manage.py
    table = next((tables[folder] for folder in [root, *root.parents] if tables[folder]), {})
    return _project(root, dict(table), named)


def _table(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text()).get("tool", {}).get("devstack", {})
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise StackError(f"{file}: {error}") from None
    return _of_kind({}, table, "it")


def _project(root: Path, values: dict[str, Any], named: str) -> Project:
    _typed(values, Project(root, settings=""), "")
    for name in ("programs", "links"):
        for key, value in values.get(name, {}).items():
            _of_kind("", value, f"{name}.{key}")
    if "workers" in values:
        tables = values["workers"].items()
        values["workers"] = {name: _worker(one, f"workers.{name}") for name, one in tables}
    values["settings"] = named or values.get("settings") or _settings(root / "manage.py")
    values["celery"] = values.get("celery") or re.split(r"\.settings\b", values["settings"])[0]
    project = Project(root, **values)
    _check(project)
    return project


def _worker(table: object, name: str) -> Worker:
    return Worker(**_typed(_of_kind({}, table, name), Worker(), f"{name}."))


def _check(project: Project) -> None:
    if project.broker not in BROKERS:
        raise _wrong("broker", " or ".join(BROKERS), project.broker)
    if "{port}" not in project.web:
        raise _wrong("web", "a command with {port} in it", project.web)
    for name in ("web_port", "flower_port"):
        if not 0 < getattr(project, name) < 65536:
            raise _wrong(name, "between 1 and 65535", getattr(project, name))
    for name, worker in project.workers.items():
        if worker.concurrency < 1:
            raise _wrong(f"workers.{name}.concurrency", "1 or more", worker.concurrency)
    names = [*project.workers, *project.programs]
    for name in names:
        if name in RESERVED or names.count(name) > 1 or not re.fullmatch(r"[\w-]+", name):
            raise _wrong("a name in workers and programs", "a word that is not taken", name)


def _settings(manage: Path) -> str:
    said = SAID_BY_MANAGE.search(manage.read_text()) if manage.is_file() else None
    if not said:
        raise StackError(
            f"{manage} does not say which settings to use: give `settings` in [tool.devstack] of"
            " pyproject.toml"
        )
    return said[1]


def _typed(values: dict[str, Any], default: Project | Worker, where: str) -> dict[str, Any]:
    """Return the values when all are fields of the default, and of their kinds."""
    known = {one.name: getattr(default, one.name) for one in fields(default) if one.name != "root"}
    for name, value in values.items():
        if name not in known:
            raise _wrong("a key", f"one of {', '.join(sorted(known))}", f"{where}{name}")
        _of_kind(known[name], value, f"{where}{name}")
    return values


def _of_kind(default: T, value: object, name: str) -> T:
    # not isinstance: true is no number
    if type(value) is type(default):
        return value
    raise _wrong(name, KINDS[type(default)], value)


def _wrong(name: str, rule: str, value: object) -> StackError:
    return StackError(f"pyproject.toml: [tool.devstack] {name} must be {rule}, not {value!r}")
