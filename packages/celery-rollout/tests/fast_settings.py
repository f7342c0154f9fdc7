"""The tests' settings, with probes that take seconds instead of half a minute."""

from tests.settings import *  # noqa: F403

QUEUE_PROBES = {
    "INTERVAL": 0.5,
    "THRESHOLD": 3,
    "FULL_FACTOR": 4,
    "RESEND": 3,
    "NODE": 0.5,
    "NODE_TTL": 2,
    "THRESHOLDS": {"low": 4},
}
CELERY_BEAT_SCHEDULE = {"queue_probes.probe": {"task": "queue_probes.probe", "schedule": 0.5}}
