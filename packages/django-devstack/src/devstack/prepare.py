"""Makes the database ready, in a process of its own: migrations, and an admin for development."""

import os
import sys
from pathlib import Path

import django
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command

from devstack.state import secret

LOGIN = {"USERNAME": "admin", "EMAIL": "admin@example.com"}


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


if __name__ == "__main__":
    django.setup()
    call_command("migrate", interactive=False, verbosity=1)
    make_admin(Path(sys.argv[1]))
