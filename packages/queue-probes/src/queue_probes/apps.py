"""The app's configuration."""

from django.apps import AppConfig
from django.core import checks


class ProbesConfig(AppConfig):
    name = "queue_probes"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Let workers report, and check the settings."""
        from queue_probes import conf, nodes

        nodes.connect()
        checks.register(conf.check_queues)
