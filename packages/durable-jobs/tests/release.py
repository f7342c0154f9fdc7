"""A module of tasks in two releases: what a rolling deployment puts side by side.

`TEST_RELEASE=1` is the old one: `greet` takes one argument less, `farewell` is not there yet.
"""

import os

from celery import Task, shared_task

from durable_jobs import JobTask
from tests.tasks import effect

if os.environ.get("TEST_RELEASE") == "1":

    @shared_task(base=JobTask, bind=True)
    def greet(self, name):
        effect(self.request.id, f"hello {name}")

else:

    @shared_task(base=JobTask, bind=True)
    def greet(self, name, title):
        effect(self.request.id, f"hello {title} {name}")

    @shared_task(base=JobTask, bind=True)
    def farewell(self, name):
        effect(self.request.id, f"bye {name}")

    @shared_task(base=Task, bind=True)
    def plain_farewell(self, name):
        effect(self.request.id, f"plain bye {name}")
