"""Celery settings that do not lose tasks: `from config.celery_settings import *` in settings.py.

For Celery 5.7 with Redis/Valkey or RabbitMQ; the broker URL's scheme decides which. Copy this file
into any project whose Celery app reads its settings with `namespace="CELERY"`. It needs the environment
variable CELERY_BROKER_URL. Over each setting stands the failure it prevents.

Not covered: what a broker without persistence forgets, and a Redis worker that is killed between
taking a message and noting that it did (some in 100 000 messages). A row in the database survives both.
"""

import os
import ssl
import sys

from kombu import Exchange, Queue

_DOCS = "https://docs.celeryq.dev/en/stable/userguide/configuration.html"
_REDIS = {"redis", "rediss", "sentinel"}
_RABBITMQ = {"amqp", "amqps", "pyamqp"}

# Without it Celery would look for a RabbitMQ on localhost, with the user guest.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-url
CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]

_scheme = CELERY_BROKER_URL.partition("://")[0]
if _scheme not in _REDIS | _RABBITMQ:
    raise ValueError(
        f"CELERY_BROKER_URL starts with {_scheme!r}; these brokers keep tasks:"
        f" {', '.join(f'{scheme}://' for scheme in sorted(_REDIS | _RABBITMQ))}"
    )
_rabbitmq = _scheme in _RABBITMQ
# Nobody waits for a worker or for beat, so they sit out a slow broker; a request cannot.
_patient = bool({"worker", "beat"}.intersection(sys.argv[1:]))
_socket_timeout, _connect_timeout = (10, 3) if _patient else (2, 1)

# --- Tasks -----------------------------------------------------------------------------------

CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_TASK_RETRY_ON_WORKER_LOST = True
CELERY_TASK_TIME_LIMIT = 300
CELERY_TASK_SOFT_TIME_LIMIT = 270
CELERY_TASK_IGNORE_RESULT = True

CELERY_TASK_DEFAULT_QUEUE = "default"
CELERY_TASK_QUEUES = tuple(
    Queue(name, Exchange(name, "direct"), routing_key=name)
    for name in ("default", "high", "low", "control")
)
CELERY_TASK_CREATE_MISSING_QUEUES = False

CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_POOL_ACQUIRE_TIMEOUT = 2
CELERY_TASK_PUBLISH_RETRY_POLICY = {
    "max_retries": 3 if _patient else 1,
    "interval_start": 0,
    "interval_step": 0.2,
    "interval_max": 0.5,
}
CELERY_BROKER_TRANSPORT_OPTIONS = (
    {"confirm_publish": True, "read_timeout": _socket_timeout, "write_timeout": _socket_timeout}
    if _rabbitmq
    else {
        "visibility_timeout": 2 * CELERY_TASK_TIME_LIMIT + 300,
        "unacked_restore_interval": 30,
        "unacked_restore_throttle": 1,
        "socket_timeout": _socket_timeout,
        "socket_connect_timeout": _connect_timeout,
        "socket_keepalive": True,
        **CELERY_TASK_PUBLISH_RETRY_POLICY,
    }
)
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_MAX_TASKS_PER_CHILD = 500
CELERY_WORKER_PROC_ALIVE_TIMEOUT = 30
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = _rabbitmq
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_REDIRECT_STDOUTS = False
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_ALWAYS_EAGER = os.environ.get("CELERY_TASK_ALWAYS_EAGER", "").lower() in {"1", "true", "yes", "on"}
CELERY_TASK_EAGER_PROPAGATES = True
if _scheme in {"rediss", "amqps"}:
    CELERY_BROKER_USE_SSL = {"ssl_cert_reqs" if _scheme == "rediss" else "cert_reqs": ssl.CERT_REQUIRED}

__all__ = [name for name in dir() if name.startswith("CELERY_")]  # noqa: PLE0605
