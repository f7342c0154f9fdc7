"""URLs of the project."""

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from config import health, project

urlpatterns = [
    path("admin/", admin.site.urls),
    path("healthz/live", health.live),
    path("healthz/ready", health.ready),
    path("jobs/", include("durable_jobs.urls")),
    path(
        "",
        include("notes.urls") if project.EXAMPLE_APP else RedirectView.as_view(url="/admin/"),
    ),
]
