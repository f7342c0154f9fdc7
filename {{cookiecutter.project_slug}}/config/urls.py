"""URLs of the project."""

from django.conf import settings
from django.conf.urls.static import static
from django.contrib import admin
from django.urls import include, path
from django.views.generic import TemplateView  # no example

urlpatterns = [
    path("", include("notes.urls")),  # example
    path("", TemplateView.as_view(template_name="welcome.html")),  # no example
    path("admin/", admin.site.urls),
    path("", include("queue_probes.urls")),
    # What was uploaded, while developing; in production the proxy serves that folder.
    *static(settings.MEDIA_URL, document_root=settings.MEDIA_ROOT),
]
