"""URLs of the notes."""

from django.urls import path

from notes import views

app_name = "notes"
urlpatterns = [
    path("", views.index, name="index"),
    path("state/", views.state, name="state"),
    path("<int:pk>/resume/", views.resume, name="resume"),
    path("<int:pk>/delete/", views.delete, name="delete"),
]
