"""The app's configuration."""

from django.apps import AppConfig


class ProbesConfig(AppConfig):
    name = "probes"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Let workers report."""
        from probes import nodes

        nodes.connect()
