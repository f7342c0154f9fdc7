"""The app's configuration."""

from django.apps import AppConfig
from django.core import checks


class ProbesConfig(AppConfig):
    name = "probes"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Let workers report, and check the settings."""
        from probes import conf, nodes

        nodes.connect()
        checks.register(conf.check_queues)
