"""The project with Celery's own defaults: the control arm of the fault tests."""

from tests.settings import *  # noqa: F403

for _name in [name for name in globals() if name.startswith("CELERY_")]:
    if _name not in {"CELERY_BROKER_URL", "CELERY_TASK_DEFAULT_QUEUE", "CELERY_TASK_QUEUES"}:
        del globals()[_name]
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True  # Celery warns when it is left out
