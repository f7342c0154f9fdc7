"""MySQL is refused in words: it cannot return the rows that an UPDATE changed."""

import pytest
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import NotSupportedError, connection

from tests.tasks import noop

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("command", ["check", "migrate"])
def test_mysql_is_refused_by_check_and_by_migrate_with_what_to_use_instead(command, monkeypatch):
    monkeypatch.setattr(connection, "vendor", "mysql")
    options = {"skip_checks": False} if command == "migrate" else {}
    with pytest.raises(SystemCheckError) as refusal:
        call_command(command, **options)
    text = str(refusal.value)
    assert "(durable_jobs.E004) Durable jobs do not work on mysql" in text
    assert "Use PostgreSQL 14 or later." in text


def test_mysql_is_refused_by_the_first_call(monkeypatch):
    monkeypatch.setattr(connection, "vendor", "mysql")
    with pytest.raises(NotSupportedError, match="do not work on mysql: use PostgreSQL"):
        noop.delay()
