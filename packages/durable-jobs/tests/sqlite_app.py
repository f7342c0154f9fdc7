"""The tests' Celery application on SQLite: `celery -A tests.sqlite_app`."""

import os

from django.conf import settings

settings.DATABASES["default"] = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": os.environ["TEST_DATABASE"],
    # A transaction that reads first and then writes is refused by SQLite, not made to wait.
    "OPTIONS": {"timeout": 20, "transaction_mode": "IMMEDIATE"},
}

from tests.worker_app import app  # noqa: E402

app.set_default()
EFFECTS = (
    "CREATE TABLE durable_jobs_test_effect (id integer PRIMARY KEY, job text, note text, pid int,"
    " at text DEFAULT CURRENT_TIMESTAMP)"
)
