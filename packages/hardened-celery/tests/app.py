"""The Celery application of the tests' project: `celery -A tests.app`."""

import os
from importlib.util import find_spec

from celery import Celery

from hardened_celery import liveness, logging

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

# as a new project has it
durable = "durable_jobs:JobTask" if find_spec("durable_jobs") else None
app = Celery("tests", task_cls=durable)
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
liveness.connect(app)
logging.connect()
if "SLOW_END" in os.environ:
    from tests import slow_end  # noqa: F401
