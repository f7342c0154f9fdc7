"""What needs the project's code, in a process of its own: `python -m devstack.inside ROOT APP`.

It loads everything that web, workers and beat load. Code that cannot be loaded shows a short
traceback, its own lines only. With the name of a file it also migrates the database, and makes an
admin for development whose password it keeps in the file.
"""

import logging
import os
import sys
import traceback
from pathlib import Path

import django
from celery.app.utils import find_app
from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.urls import get_resolver

from devstack.state import secret

LOGIN = {"USERNAME": "admin", "EMAIL": "admin@example.com"}
FRAMES = 3


def load(celery: str) -> None:
    """Import settings, apps, tasks, URLs and views."""
    find_app(celery).loader.import_default_modules()
    django.setup()
    if getattr(settings, "ROOT_URLCONF", None):
        get_resolver().url_patterns  # noqa: B018


def short(error: Exception, root: Path) -> str:
    """Return a traceback with the last lines of the project's own code."""
    shown = traceback.TracebackException.from_exception(error, compact=True)
    own = [frame for frame in shown.stack if _is_own(Path(frame.filename), root)]
    if isinstance(error, SyntaxError):
        own = []  # it names its place itself
    shown.stack = traceback.StackSummary.from_list(own[-FRAMES:])
    return "".join(shown.format(chain=False)).replace(f"{root}{os.sep}", "")


def _is_own(path: Path, root: Path) -> bool:
    return path.is_relative_to(root) and not {"site-packages", "packages"} & {*path.parts}


def make_admin(password_file: Path) -> None:
    """Create an admin with the password of the file, unless there is an admin already."""
    if get_user_model()._default_manager.filter(is_superuser=True).exists():
        return
    os.environ["DJANGO_SUPERUSER_PASSWORD"] = secret(password_file)
    for name, value in LOGIN.items():
        os.environ.setdefault(f"DJANGO_SUPERUSER_{name}", value)
    try:
        call_command("createsuperuser", interactive=False, verbosity=0)
    except CommandError as error:
        # a user model of yours that wants more; everything else works without an admin
        print(f"no admin made: {error}")
        password_file.unlink()


def main(root: Path, celery: str, password_file: Path | None = None) -> None:
    """Do what the command line says; exit with 1 when the code cannot be loaded."""
    # Celery logs what we show, with fifty lines.
    logging.disable()
    try:
        load(celery)
    except Exception as error:
        sys.exit(short(error, root))
    logging.disable(logging.NOTSET)
    if password_file:
        call_command("migrate", interactive=False, verbosity=1)
        if apps.is_installed("django.contrib.auth"):
            make_admin(password_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
