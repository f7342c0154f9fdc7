"""Answers health checks before anything looks at the host they were sent to.

A load balancer and a kubelet ask by address, which no ALLOWED_HOSTS names: with a 400 they would
restart a web process that is well.
"""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

from queue_probes import metrics, views

VIEWS = {
    "/healthz/live": views.live,
    "/healthz/ready": views.ready,
    "/healthz/queues": views.queues,
    "/metrics": metrics.metrics,
}


class HealthMiddleware:
    """To be the first in MIDDLEWARE; the URLs work without it, for allowed hosts."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return VIEWS.get(request.path, self.get_response)(request)
