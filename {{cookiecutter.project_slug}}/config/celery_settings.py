"""Celery settings that do not lose tasks: `from config.celery_settings import *` in settings.py.

For Celery 5.7 with Redis, Valkey or RabbitMQ, whichever CELERY_BROKER_URL of the environment names.
Self-contained: copy it into any project whose app reads its settings with `namespace="CELERY"`.
Above each setting stands the failure it prevents.

What no setting prevents: tasks run twice now and then (make them idempotent), a broker without
persistence forgets, and a worker on Redis that is killed right after it took a message loses that
one (4 of 4042 in 12 kills at 200 messages per second). A row in the database survives all of it.
"""

import os
import re
import ssl
import sys
from typing import Any

from kombu import Exchange, Queue

_REDIS, _RABBITMQ = ("redis", "rediss", "sentinel"), ("amqp", "amqps", "pyamqp")
_scheme, _found, _rest = os.environ.get("CELERY_BROKER_URL", "").partition("://")
if not _found or _scheme not in _REDIS + _RABBITMQ:
    _valid = ", ".join(f"{scheme}://" for scheme in _REDIS + _RABBITMQ)
    _given = f"begins with {_scheme}://" if _found else "is not set, or no URL"
    raise ValueError(f"CELERY_BROKER_URL {_given}. It must begin with one of: {_valid}")
# A password with a `/` ends a URL before its host, and what complains of that shows a part of it.
_host = r"(\[[^]]*]|[^/?#@:,\s]*)(:\d*)?"
_url = rf"([\w+.-]+://|(?!.*://))([^/?#\s]*@)?{_host}(,{_host})*([/?#][^@\s]*)?"
for _name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
    if not all(re.fullmatch(_url, text) for text in os.environ.get(_name, "").split(";")):
        _how = "in a password write `/` as %2F, `?` as %3F, `#` as %23"
        raise ValueError(f"{_name} is no URL; {_how}")
_on_redis = _scheme in _REDIS

# Nobody waits for a worker or for beat, so these sit out a broker that is slow; a request cannot.
# Celery has no setting for that: each process builds its options from the command that started it.
_patient = not {"worker", "beat"}.isdisjoint(sys.argv[1:])
_socket_timeout, _connect_timeout, _publish_retries = (10, 3, 3) if _patient else (2, 1, 1)

# --- Tasks ----------------------------------------------------------------------------------------

# A task whose worker is killed, or stopped before the task ends, is gone.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-acks-late
CELERY_TASK_ACKS_LATE = True

# A task whose pool process is killed (out of memory) is gone, acknowledged late or not.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-reject-on-worker-lost
CELERY_TASK_REJECT_ON_WORKER_LOST = True

# A task that kills its pool process each time does so forever; this ends it after `max_retries`.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-retry-on-worker-lost
CELERY_TASK_RETRY_ON_WORKER_LOST = True


class _RetrySoon:
    """Annotation that changes Celery's default delay of a retry and no task's own."""

    def annotate(self, task: Any) -> dict[str, int]:
        return {"default_retry_delay": 30} if task.default_retry_delay == 180 else {}


# A task whose pool process was killed runs again only after three minutes.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-annotations
CELERY_TASK_ANNOTATIONS = (_RetrySoon(),)

# A task that hangs takes one pool process out of service, and the next one another.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-time-limit
CELERY_TASK_TIME_LIMIT = 300

# The limit above kills without a chance to clean up; this one raises SoftTimeLimitExceeded before.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-soft-time-limit
CELERY_TASK_SOFT_TIME_LIMIT = 270

# A message with pickled content would run code of whoever can write to the broker.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#accept-content
CELERY_ACCEPT_CONTENT = ["json"]

# In eager mode nothing reaches a worker; only this variable switches it on, and a check says so.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-always-eager
_eager = os.environ.get("CELERY_TASK_ALWAYS_EAGER", "").strip().lower()
if _eager not in {"1", "true", "yes", "on", "0", "false", "no", "off", ""}:
    raise ValueError("CELERY_TASK_ALWAYS_EAGER says neither yes nor no: write 1 or 0")
CELERY_TASK_ALWAYS_EAGER = _eager in {"1", "true", "yes", "on"}

# An eager task that fails would fail silently.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-eager-propagates
CELERY_TASK_EAGER_PROPAGATES = True

# --- Queues ---------------------------------------------------------------------------------------

# A task without a queue of its own goes to a queue named "celery", which no worker serves.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-default-queue
CELERY_TASK_DEFAULT_QUEUE = "default"

# Queues without an exchange and a key of their own share those of the default queue. They are not
# declared as quorum queues: from such, Celery 5.7 sends every retry to the default queue. To have
# them replicated, make quorum the default queue type of the virtual host on RabbitMQ (and give it a
# dead-letter exchange by policy: what it delivered 20 times it drops).
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-queues
CELERY_TASK_QUEUES = tuple(
    Queue(name, Exchange(name), routing_key=name) for name in ("default", "high", "low", "control")
)

# A queue name with a typing error makes a new queue, which no worker serves.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-create-missing-queues
CELERY_TASK_CREATE_MISSING_QUEUES = False

# --- Broker ---------------------------------------------------------------------------------------

# Two projects on one Redis need different database numbers in it, on RabbitMQ virtual hosts: they
# would take each other's tasks. No `global_keyprefix`, as whoever looks at a queue has to know it.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-url
CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]

# Anybody on the way can read and change tasks: kombu verifies nothing on Redis, and not the host's
# name on RabbitMQ (where None stands for the name in the URL).
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-use-ssl
if _scheme == "rediss":
    CELERY_BROKER_USE_SSL: dict[str, Any] = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
elif _scheme == "amqps":
    CELERY_BROKER_USE_SSL = {"server_hostname": None}

# A broker that is frozen or out of reach blocks `.delay()` forever, and whoever called it: longest
# 7 s here, 51 s in a worker. It then raises OperationalError, and the task may have been sent.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-publish-retry-policy
CELERY_TASK_PUBLISH_RETRY_POLICY = {
    "max_retries": _publish_retries,
    "interval_start": 0,
    "interval_step": 0.2,
    "interval_max": 0.5,
}

# As above: threads wait forever for one of the connections that others wait on.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-pool-acquire-timeout
CELERY_BROKER_POOL_ACQUIRE_TIMEOUT = 2

# As above: the time in which a connection is made, retries included.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-connection-timeout
CELERY_BROKER_CONNECTION_TIMEOUT = 4 if _patient else 2

# A worker that starts before the broker, or outlives an hour without it, is gone.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-connection-retry-on-startup
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-connection-max-retries
CELERY_BROKER_CONNECTION_MAX_RETRIES = None

if _on_redis:
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-transport-options
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        # Redis hands out a message again that is not acknowledged by then, while its task still
        # runs or waits for its time. So it is more than every time limit, and every countdown must
        # be less: 600 s at most. The same in all processes, the smallest would apply to all.
        "visibility_timeout": 2 * CELERY_TASK_TIME_LIMIT + 300,
        # What a killed worker held waits up to 100 s longer than that.
        "unacked_restore_interval": 30,
        "unacked_restore_throttle": 1,
        # Bound publishing, see above; and notice that the other end is gone.
        "socket_timeout": _socket_timeout,
        "socket_connect_timeout": _connect_timeout,
        "socket_keepalive": True,
        # Connecting retries by itself, for 6 s where `retry=False` asked for none.
        **CELERY_TASK_PUBLISH_RETRY_POLICY,
    }
else:
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        # Publishing returns before RabbitMQ has the message, or has refused it.
        "confirm_publish": True,
        # Bound publishing, see above.
        "read_timeout": _socket_timeout,
        "write_timeout": _socket_timeout,
    }
    # A worker waits for minutes on a connection whose other end is gone.
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-heartbeat
    CELERY_BROKER_HEARTBEAT = 30
    # A channel that RabbitMQ closes ends the worker.
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-channel-error-retry
    CELERY_BROKER_CHANNEL_ERROR_RETRY = True

# --- Workers --------------------------------------------------------------------------------------

# Short tasks wait behind the long one of a process that reserved them, though others are idle.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-prefetch-multiplier
CELERY_WORKER_PREFETCH_MULTIPLIER = 1

# Memory that tasks leak adds up until the kernel kills something.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-max-tasks-per-child
CELERY_WORKER_MAX_TASKS_PER_CHILD = 500

# In a container with 2 of 64 processors Celery starts 64 processes; "auto" knows the limit.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-concurrency
CELERY_WORKER_CONCURRENCY = "auto"

# On a slow machine a new pool process is taken for dead after 4 s and killed, again and again.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-proc-alive-timeout
CELERY_WORKER_PROC_ALIVE_TIMEOUT = 30

# RabbitMQ delivers again what runs when a connection breaks, so it would run twice at once. On
# Redis it is not delivered again before the visibility timeout, so it is better left to end.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-cancel-long-running-tasks-on-connection-loss
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = not _on_redis

# Celery replaces the handlers of Django's LOGGING, and turns what tasks print into warnings.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-hijack-root-logger
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-redirect-stdouts
CELERY_WORKER_REDIRECT_STDOUTS = False

# --- Results: none unless CELERY_RESULT_BACKEND is set --------------------------------------------

# Publishing then needs two servers, and fails when either does; a task that wants its result kept
# says `ignore_result=False`.
# https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-ignore-result
CELERY_TASK_IGNORE_RESULT = True

if _results := os.environ.get("CELERY_RESULT_BACKEND"):
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend
    CELERY_RESULT_BACKEND = _results

    # A task that was lost looks like one that was not started yet.
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-track-started
    CELERY_TASK_TRACK_STARTED = True

    # A task that was delivered again runs again, though its success is stored.
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-deduplicate-successful-tasks
    CELERY_WORKER_DEDUPLICATE_SUCCESSFUL_TASKS = True

    # With results in a Redis that is down, publishing fails after 19 s, not 0.2 s.
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend-transport-options
    CELERY_RESULT_BACKEND_TRANSPORT_OPTIONS = {
        "retry_policy": {
            "max_retries": 3,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.5,
        }
    }
    # Its certificate: as for the broker.
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-backend-use-ssl
    if _results.startswith("rediss:"):
        CELERY_REDIS_BACKEND_USE_SSL = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-socket-timeout
    CELERY_REDIS_SOCKET_TIMEOUT = _socket_timeout
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-socket-connect-timeout
    CELERY_REDIS_SOCKET_CONNECT_TIMEOUT = _connect_timeout
    # https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-socket-keepalive
    CELERY_REDIS_SOCKET_KEEPALIVE = True

__all__ = [name for name in dir() if name.startswith("CELERY_")]
