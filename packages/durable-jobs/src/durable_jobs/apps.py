"""The app's configuration."""

from django.apps import AppConfig


class DurableJobsConfig(AppConfig):
    name = "durable_jobs"
    verbose_name = "durable jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks."""
        from durable_jobs import checks  # noqa: F401
