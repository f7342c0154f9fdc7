"""No pages: `tests.observed.urls` has some."""

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
