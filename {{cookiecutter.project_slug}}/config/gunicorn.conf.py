"""gunicorn: `gunicorn config.wsgi -c config/gunicorn.conf.py`."""

import os

from hardened_celery import env, logging, sentry

bind = os.environ.get("GUNICORN_BIND", "127.0.0.1:8000")
worker_class = "gthread"
workers = int(env.number("WEB_CONCURRENCY", 2, 1, whole=True))
threads = int(env.number("GUNICORN_THREADS", 4, 1, whole=True))

# A process whose main thread is silent for so long is replaced. A request is not cut off, however
# long it takes; a long one belongs into a task.
timeout = 30
# Less than any platform's grace, so that running requests end before the platform kills.
graceful_timeout = 25
# Longer than the idle timeout of common load balancers, else they send into closing connections.
keepalive = 75
# Leaks are bounded; the jitter keeps workers from restarting together.
max_requests = 10_000
max_requests_jitter = 1_000
# The heartbeat file on a disk can stall behind other writes.
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108
# Loading in each worker lets HUP bring new code in.
preload_app = False
# It writes into $HOME, which containers do not have or must not write.
control_socket_disable = True
forwarded_allow_ips = os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1")

logconfig_dict = logging.logging_config(
    json_lines=not env.flag("DJANGO_DEBUG"),
    level=os.environ.get("DJANGO_LOG_LEVEL", "INFO"),
)


def post_fork(server: object, worker: object) -> None:
    """Give the forked worker a Sentry client that sends at once."""
    sentry.after_fork()
