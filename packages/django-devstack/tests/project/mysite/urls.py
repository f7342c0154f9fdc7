"""The admin, and a page that says whether database and broker are reached."""

from django.contrib import admin
from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.urls import path

from mysite.celery import app


def health(request: HttpRequest) -> HttpResponse:
    connection.ensure_connection()
    with app.connection_for_write() as broker:
        broker.ensure_connection(max_retries=1)
    return HttpResponse("well")


urlpatterns = [path("admin/", admin.site.urls), path("health", health)]
