"""Views that fail, and that send a task."""

import warnings
from typing import NoReturn

from django.core.exceptions import SuspiciousOperation
from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt

from tests.observed.tasks import speak_twice


@csrf_exempt
def fail(request: HttpRequest) -> NoReturn:
    raise ValueError("a view fails")


def suspect(request: HttpRequest) -> NoReturn:
    raise SuspiciousOperation("a view suspects")


def send(request: HttpRequest) -> JsonResponse:
    """Send a task after the commit, as views should; and warn."""
    warnings.warn("a view warns", stacklevel=1)
    with transaction.atomic():
        speak_twice.delay_on_commit("from a view", request.GET.get("q"))
    return JsonResponse({})


def live(request: HttpRequest) -> JsonResponse:
    """Answer as a health check does."""
    return JsonResponse({})


urlpatterns = [
    path("healthz/live", live),
    path("fail", fail),
    path("suspect", suspect),
    path("send", send),
]
