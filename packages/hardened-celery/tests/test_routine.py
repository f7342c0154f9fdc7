"""What monitoring asks for all the time is neither logged nor traced, unless it fails."""

import pytest
import structlog

from hardened_celery import logging, sentry


def test_a_scrape_is_neither_logged_nor_traced() -> None:
    assert sentry.sample({"wsgi_environ": {"PATH_INFO": "/metrics"}}, 1.0) == 0
    with pytest.raises(structlog.DropEvent):
        logging.drop_routine(None, "info", {"code": 200, "request": "GET /metrics"})
    failed = {"code": 503, "request": "GET /metrics"}
    assert logging.drop_routine(None, "info", failed) == failed
