"""For users: `path("jobs/", include("durable_jobs.urls"))`. The admin does not need it."""

from django.urls import path

from durable_jobs import views

app_name = "durable_jobs"
urlpatterns = [path("<uuid:pk>/progress", views.progress, name="progress")]
