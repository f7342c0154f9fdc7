"""The Celery application: `celery -A config`."""

import os

from celery import Celery
from hardened_celery import liveness, logging

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

# A plain @shared_task is durable: its call is a row; @shared_task(base=celery.Task) opts out.
app = Celery("config", task_cls="durable_jobs:JobTask")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
liveness.connect(app)
logging.connect()
