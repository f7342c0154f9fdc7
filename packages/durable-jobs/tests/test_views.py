import json
import uuid
from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission, User
from django.template.loader import render_to_string
from django.test import override_settings
from django.urls import include, path, reverse
from django.utils import timezone

from durable_jobs.models import Job

urlpatterns = [path("jobs/", include("durable_jobs.urls"))]
pytestmark = [pytest.mark.django_db, pytest.mark.urls(__name__)]
NAMES = {"state", "progress", "message", "attempts", "max_attempts", "due_at"}


def own_jobs_only(request, job):
    return request.user.is_authenticated and job.owner_id == str(request.user.pk)


@pytest.fixture
def job():
    return Job.objects.create(
        task="t", queue="q", state="running", due_at=timezone.now() + timedelta(seconds=30),
        progress=40, message="Copying", attempts=1, args=["secret"], error="secret", owner_id="1",
    )  # fmt: skip


def url(job):
    return reverse("durable_jobs:progress", args=[job.pk])


def staff(client, *permissions):
    user = User.objects.create_user("op", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(user)
    return user


def test_staff_that_may_view_jobs_gets_the_progress_and_nothing_secret(client, job):
    staff(client, "view_job")
    response = client.get(url(job))
    body = response.json()
    assert body.keys() == NAMES
    assert (body["state"], body["progress"], body["message"]) == (
        "running",
        40,
        "Copying",
    )
    assert b"secret" not in response.content
    assert "no-store" in response["Cache-Control"]


def test_everybody_else_gets_the_404_of_a_job_that_does_not_exist(client, job):
    assert client.get(url(job)).status_code == 404
    staff(client)
    assert client.get(url(job)).status_code == 404
    assert client.get(url(Job(pk=uuid.uuid4()))).status_code == 404


def test_the_project_says_who_may_see_a_job(client, job):
    user = staff(client, "view_job")
    with override_settings(DURABLE_JOBS={"MAY_SEE": f"{__name__}.own_jobs_only"}):
        assert client.get(url(job)).status_code == 404
        Job.objects.update(owner_id=str(user.pk))
        assert client.get(url(job)).status_code == 200


def test_the_longest_message_stays_below_one_kilobyte(client, job):
    staff(client, "view_job")
    Job.objects.update(message="\N{GRINNING FACE}" * 200)
    response = client.get(url(job))
    assert len(response.content) < 1000
    assert len(json.loads(response.content)["message"]) == 200


def test_progress_is_only_read(client, job):
    staff(client, "view_job")
    assert client.post(url(job)).status_code == 405


def test_the_fragment_shows_where_the_job_is_and_what_to_poll(job):
    job.message = "<b>half</b>"
    html = render_to_string("durable_jobs/progress.html", {"job": job})
    assert f'data-url="{url(job)}"' in html
    assert "Running 40 %: &lt;b&gt;half&lt;/b&gt;" in html
    assert "progress.js" in html


def test_the_fragment_of_a_finished_job_polls_nothing(job):
    Job.objects.cancel()
    job.refresh_from_db()
    html = render_to_string("durable_jobs/progress.html", {"job": job})
    assert "Cancelled" in html
    assert "data-url" not in html
    assert "<script" not in html


@override_settings(ROOT_URLCONF=())
def test_the_fragment_works_without_the_urls(job):
    html = render_to_string("durable_jobs/progress.html", {"job": job})
    assert "Running 40 %" in html
    assert "<script" not in html
