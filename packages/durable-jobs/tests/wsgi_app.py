"""A WSGI application that enqueues: once when it is loaded, and once for each request."""

import os
import sys

from durable_jobs.publisher import publisher
from tests.worker_app import app

app.set_default()
from tests import tasks  # noqa: E402

if "gunicorn" in sys.modules:
    # What a preloading server does before it forks: its publisher has a thread and a connection.
    tasks.write.delay("loaded")
    publisher.flush(5)


def application(environ, start_response):
    job = tasks.write.delay(environ["PATH_INFO"].strip("/"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{job.id} {os.getpid()}".encode()]
