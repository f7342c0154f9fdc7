"""URLs of the app, as load balancers, Prometheus and people know them."""

from django.urls import path

from queue_probes import metrics, status, views

app_name = "queue_probes"
urlpatterns = [
    path("healthz/live", views.live),
    path("healthz/ready", views.ready),
    path("healthz/queues", views.queues),
    path("metrics", metrics.metrics),
    path("status/", status.page, name="status"),
    path("status/data", status.data, name="status-data"),
    path("status/retry", status.retry, name="status-retry"),
]
