"""Broker and result backend: they keep tasks, block nobody, and are who they say they are."""

import ssl

from celery import Celery

from hardened_celery.checks.options import RABBITMQ, REDIS, Messages, fault, spelled, transport


def blocking(app: Celery) -> Messages:
    """Sending a task ends soon, whatever the broker does."""
    options, scheme = app.conf.broker_transport_options, transport(app)
    wanted = {"socket_timeout", "socket_connect_timeout"} if scheme in REDIS else set()
    if scheme in RABBITMQ and options.get("confirm_publish"):
        wanted = {"read_timeout"}
    if missing := sorted(name for name in wanted if not options.get(name)):
        text = f"{spelled(app, 'broker_transport_options')} has no {' and no '.join(missing)}:"
        hint = "Set it: to 2 seconds, say, where a person waits, and to 10 in workers."
        yield fault("W007", f"{text} a broker that freezes blocks `.delay()` forever.", hint)
    policy = app.conf.task_publish_retry_policy
    if app.conf.task_publish_retry and policy.get("max_retries") is None:
        text = f"{spelled(app, 'task_publish_retry_policy')} has max_retries=None: a broker"
        yield fault("E017", f"{text} that freezes blocks `.delay()` forever.", "Write 1, say.")


def results(app: Celery) -> Messages:
    """Sending a task does not wait long for the result backend."""
    policy = app.conf.result_backend_transport_options.get("retry_policy") or {}
    on_redis = str(app.conf.result_backend).partition(":")[0] in REDIS
    if on_redis and policy.get("max_retries") is None:
        text = f"{spelled(app, 'result_backend_transport_options')} has no retry_policy with"
        text += " max_retries: `.delay()` takes 19 s, then fails, when the result backend is down."
        hint = 'Add "retry_policy": {"max_retries": 3, "interval_step": 0.1, "interval_max": 0.5}.'
        yield fault("W008", text, hint)


def broker(app: Celery) -> Messages:
    """The broker keeps tasks, and is who it says it is."""
    connection = app.connection_for_write()
    scheme = str(connection.transport_cls)
    if scheme in {"filesystem", "sqla", "sqlalchemy", "memory"}:
        text = f"A broker of the kind {scheme}:// loses what a worker runs when it is killed."
        yield fault("E011", text, "Use redis:// or amqp://, and memory:// in tests only.")
    options = connection.ssl if isinstance(connection.ssl, dict) else {}
    reqs = options.get("ssl_cert_reqs", options.get("cert_reqs", ssl.CERT_REQUIRED))
    # kombu ignores anything but a dict for Redis, and connects without TLS
    if reqs in (None, "none", ssl.CERT_NONE) or (scheme == "rediss" and not options):
        text = f"The certificate of the broker ({scheme}://) is not verified."
        hint = 'to {"ssl_cert_reqs": ssl.CERT_REQUIRED}, and nothing about it in the URL.'
        yield fault("E012", text, f"Set {spelled(app, 'broker_use_ssl')} {hint}")
