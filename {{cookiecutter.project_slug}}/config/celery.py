"""The Celery application: `celery -A config`."""

import os

from celery import Celery
from celery.contrib.django.task import DjangoTask

from config import logging, project
from config.liveness import Heartbeat

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")


class Task(DjangoTask):
    """What tasks are unless they say otherwise; `delay_on_commit` comes from Celery."""

    # A task whose worker died runs again after this many seconds; Celery's default is 180.
    default_retry_delay = 5


app = Celery(project.SLUG, task_cls=Task)
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(Heartbeat)
logging.connect_celery(app)
