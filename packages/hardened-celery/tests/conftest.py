"""What all tests share. Database and broker come from `devstack.pytest_plugin`."""

import os
import socket

import pytest
from django.db import connection


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
