"""URLs of the project."""

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

from config import project

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("queue_probes.urls")),
    path("jobs/", include("durable_jobs.urls")),
    path(
        "",
        include("notes.urls") if project.EXAMPLE_APP else RedirectView.as_view(url="/admin/"),
    ),
]
