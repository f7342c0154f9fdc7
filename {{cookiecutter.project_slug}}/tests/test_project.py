"""The health of the stack: it answers, production has no warning, nothing is undocumented."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test import Client

ROOT = Path(__file__).resolve().parent.parent
PRODUCTION = {
    "DJANGO_DEBUG": "0",
    "DJANGO_SECRET_KEY": "k" * 20 + "".join(map(chr, range(33, 90))),
    "DJANGO_ALLOWED_HOSTS": "example.com",
}


@pytest.mark.django_db
def test_database_and_broker_answer(client: Client) -> None:
    answer = client.get("/healthz/ready")
    assert answer.status_code == 200, answer.content


@pytest.mark.django_db
def test_first_page_answers(client: Client) -> None:
    assert client.get("/", follow=True).status_code == 200


@pytest.mark.django_db
def test_every_change_of_a_model_has_its_migration() -> None:
    call_command("makemigrations", "--check", "--dry-run", verbosity=1)


@pytest.mark.parametrize("tag", [["--deploy"], ["--tag", "celery"]])
def test_production_settings_pass_every_check(tag: list[str]) -> None:
    command = [sys.executable, "manage.py", "check", *tag, "--fail-level", "WARNING"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | PRODUCTION, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_variable_of_the_settings_is_documented() -> None:
    source = "".join(path.read_text() for path in (ROOT / "config").glob("*.py"))
    read = set(re.findall(r"""(?:env\.\w+|environ\.get)\(\s*"([A-Z_]+)""", source))
    read |= set(re.findall(r'environ\["([A-Z_]+)', source))
    assert "DATABASE_URL" in read
    for document in (".env.example", "config/README.md"):
        named = set(re.findall(r"[A-Z_]{4,}", (ROOT / document).read_text()))
        assert read - named == set(), f"{document} leaves these out"
