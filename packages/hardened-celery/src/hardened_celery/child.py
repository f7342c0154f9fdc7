"""`python -m hardened_celery.child -A APP worker` is `celery -A APP worker` with a heartbeat.

The launcher runs it: so the worker of any project has one, and the project changes nothing.
"""

import atexit
import signal
import sys

from celery import maybe_patch_concurrency

WISHES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def ignore_wishes() -> None:
    """Let no signal end us: Python takes Celery's handlers away while it is on its way out."""
    for name in WISHES:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def main() -> None:
    # The first to be registered is the last to be called: until then all signals do what they do.
    atexit.register(ignore_wishes)
    # First, as Celery does: gevent has to patch modules before anything imports them.
    maybe_patch_concurrency()

    from celery.bin.celery import main as celery
    from celery.signals import worker_init

    from hardened_celery.liveness import add_steps

    worker_init.connect(add_steps)
    sys.exit(celery())


if __name__ == "__main__":
    main()
