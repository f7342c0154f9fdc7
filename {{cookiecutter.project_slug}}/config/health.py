"""Health of the web process: is it alive, and can it reach the database and the broker?

Neither says that work moves: a queue without a worker looks ready from here.
"""

from collections.abc import Callable

from celery import current_app
from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_safe


@require_safe
def live(request: HttpRequest) -> JsonResponse:
    """Answer 200 while this process serves requests; it touches nothing else."""
    return JsonResponse({"status": "ok"})


@require_safe
def ready(request: HttpRequest) -> JsonResponse:
    """Answer 200 when database and broker answer, else 503 and which of them does not."""
    checks = {"database": _failure(_database), "broker": _failure(_broker)}
    status = {name: error or "ok" for name, error in checks.items()}
    return JsonResponse(status, status=503 if any(checks.values()) else 200)


def _failure(check: Callable[[], None]) -> str:
    try:
        check()
    except Exception as error:
        # the class only: messages of drivers carry hosts and user names
        return type(error).__name__
    return ""


def _database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def _broker() -> None:
    with current_app.connection_for_write() as broker:
        broker.ensure_connection(max_retries=1, interval_start=0, timeout=2)
