"""The Celery application of the tests' workers: the project's settings, with what a test changes.

`celery -A tests.worker_app` reads TEST_DATABASE (a name) and TEST_DURABLE_JOBS (JSON).
"""

import json
import logging
import os

import django
from celery import Celery, signals
from django.conf import settings

settings.DATABASES["default"]["NAME"] = os.environ["TEST_DATABASE"]
settings.DURABLE_JOBS = json.loads(os.environ.get("TEST_DURABLE_JOBS", "{}"))
django.setup()

app = Celery("durable_jobs_tests", task_cls="durable_jobs:JobTask")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.include = ["tests.tasks", "durable_jobs.tasks"]
from durable_jobs.conf import conf  # noqa: E402

app.conf.beat_schedule = {
    "reconcile": {
        "task": "durable_jobs.reconcile",
        "schedule": conf.TICK,
        "options": {"queue": "control", "expires": 5, "expire_seconds": 5},
    }
}
app.conf.include.append("tests.release")


@signals.task_prerun.connect(weak=False)
def tell(task, task_id, **_):
    """Let a test see in the log that this worker works."""
    logging.getLogger("tests").info("task_started %s[%s]", task.name, task_id)


@signals.task_revoked.connect(weak=False)
def tell_of_the_end(request, **_):
    logging.getLogger("tests").info("task_revoked %s", request.id)


if "TEST_PERIODIC" in os.environ:
    app.conf.beat_schedule["nightly"] = {
        "task": "tests.tasks.nightly",
        "schedule": 0.3,
    }
if seconds := os.environ.get("TEST_TICKS"):
    for name in ("write", "plain_write"):
        entry = {
            "task": f"tests.tasks.{name}",
            "schedule": float(seconds),
            "args": [f"tick {name}"],
        }
        app.conf.beat_schedule[f"tick {name}"] = entry
if seconds := os.environ.get("TEST_VISIBILITY_TIMEOUT"):
    app.conf.broker_transport_options = {
        **app.conf.broker_transport_options,
        "visibility_timeout": float(seconds),
        "unacked_restore_interval": 1,
    }
import tests.history.bodies  # noqa: E402, F401 - its receiver watches the bodies of this worker
