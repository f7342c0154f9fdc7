"""The app's configuration."""

from django.apps import AppConfig
from django.core import checks


class QueueProbesConfig(AppConfig):
    name = "queue_probes"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Let beat send and workers report: both modules listen to Celery. Check the settings."""
        from queue_probes import conf, nodes, probe  # noqa: F401

        checks.register(conf.check_queues)
        conf.refuse_token()
