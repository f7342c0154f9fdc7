"""URLs of the app, as load balancers, Prometheus and people know them."""

from django.urls import path

from probes import metrics, views

app_name = "probes"
urlpatterns = [
    path("healthz/live", views.live),
    path("healthz/ready", views.ready),
    path("healthz/queues", views.queues),
    path("metrics", metrics.metrics),
]
