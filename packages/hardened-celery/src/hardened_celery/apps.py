"""The app's configuration."""

from django.apps import AppConfig
from django.core import checks


class HardenedCeleryConfig(AppConfig):
    """The entry of INSTALLED_APPS that registers the doctor of settings."""

    name = "hardened_celery"
    verbose_name = "hardened Celery"

    def ready(self) -> None:
        from hardened_celery.checks import check_celery, check_debug

        checks.register(check_celery, "celery")
        checks.register(check_debug, "celery", deploy=True)
