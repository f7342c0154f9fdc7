"""`python -m hardened_celery.child -A APP worker` is `celery -A APP worker` with a heartbeat.

The launcher runs it: so the worker of any project has one, and the project changes nothing.
"""

import sys

from celery import maybe_patch_concurrency


def main() -> None:
    # First, as Celery does: gevent has to patch modules before anything imports them.
    maybe_patch_concurrency()

    from celery.bin.celery import main as celery
    from celery.signals import worker_init

    from hardened_celery.liveness import add_steps

    worker_init.connect(add_steps)
    sys.exit(celery())


if __name__ == "__main__":
    main()
