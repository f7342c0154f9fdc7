"""Background work. A plain `@shared_task` is durable: its call is a row, and runs until it succeeds."""

from celery import shared_task
from django.core.management import call_command


@shared_task
def clear_sessions() -> None:
    """Delete the sessions that have expired; nobody else does. Beat asks for it each night."""
    call_command("clearsessions")
