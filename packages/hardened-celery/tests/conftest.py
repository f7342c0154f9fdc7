"""What all tests share. Database and broker come from `devstack.pytest_plugin`."""

import os
import socket
from importlib.util import find_spec

import pytest
from django.db import connection

# This package needs neither; that Sentry deals with both is tested where they are installed.
if not (find_spec("durable_jobs") and find_spec("queue_probes")):
    collect_ignore = ["test_sentry_jobs.py"]


@pytest.fixture
def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def project_environment(transactional_db: None) -> dict[str, str]:
    """Return an environment in which programs of the project use the test's own database."""
    server, _, _ = os.environ["DATABASE_URL"].rpartition("/")
    return {**os.environ, "DATABASE_URL": f"{server}/{connection.settings_dict['NAME']}"}
