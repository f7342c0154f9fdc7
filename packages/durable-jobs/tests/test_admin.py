import re
from datetime import UTC, datetime, timedelta

import pytest
from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.auth.models import Group, Permission, User
from django.contrib.contenttypes.models import ContentType
from django.contrib.messages import get_messages
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import path, reverse
from django.utils import timezone

from durable_jobs.models import Job
from tests.tasks import noop

urlpatterns = [path("admin/", admin.site.urls)]
pytestmark = [pytest.mark.django_db, pytest.mark.urls(__name__)]
LIST = "/admin/durable_jobs/job/"
ROWS = 200_000


def make(state="dead", **values):
    now = timezone.now()
    unfinished = state in ("scheduled", "queued", "running")
    timer = {"due_at": now + timedelta(minutes=5)} if unfinished else {"finished_at": now}
    return Job.objects.create(
        **{"task": "shop.charge", "queue": "default", "state": state, **timer, **values}
    )


def staff(client, *permissions):
    user = User.objects.create_user("op", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client.force_login(user)
    return client


@pytest.fixture
def operator(client):
    return staff(client, "view_job", "change_job", "delete_job")


def shown(response):
    return {job.pk for job in response.context["cl"].result_list}


def change(job, page="change"):
    return reverse(f"admin:durable_jobs_job_{page}", args=[job.pk])


def act(client, action, *jobs, query="", **more):
    data = {"action": action, ACTION_CHECKBOX_NAME: [job.pk for job in jobs], **more}
    return [str(m) for m in get_messages(client.post(LIST + query, data).wsgi_request)]


def test_the_list_starts_with_the_dead_and_then_what_is_due_and_hides_what_ended_well(
    operator,
):
    later, soon = make("scheduled"), make("queued", due_at=timezone.now())
    for state in ("succeeded", "cancelled"):
        make(state)
    dead = make("dead")
    response = operator.get(LIST)
    assert [job.pk for job in response.context["cl"].result_list] == [
        dead.pk,
        soon.pk,
        later.pk,
    ]


@pytest.mark.parametrize("state", Job.State.values)
def test_the_state_filter_shows_exactly_that_state(operator, state):
    jobs = {s: make(s) for s in Job.State.values}
    assert shown(operator.get(LIST, {"state": state})) == {jobs[state].pk}


def test_the_task_and_queue_filters_offer_what_is_there_even_when_no_code_knows_it(
    operator,
):
    old = make(task="removed.task", queue="low")
    make()
    response = operator.get(LIST, {"task": "removed.task", "queue": "low"})
    assert shown(response) == {old.pk}
    offered = [spec.lookup_choices for spec in response.context["cl"].filter_specs[1:]]
    assert offered == [
        [("removed.task", "removed.task"), ("shop.charge", "shop.charge")],
        [("default", "default"), ("low", "low")],
    ]


def test_search_finds_by_exact_id_key_or_owner_and_by_nothing_else(operator):
    group = Group.objects.create(name="team")
    kind = ContentType.objects.get_for_model(Group)
    done, live, dead, owned = (
        make("succeeded"),
        make("queued", key="sync:1"),
        make("dead", key="sync:2"),
        make("succeeded", owner_type=kind, owner_id=str(group.pk)),
    )
    for term, expected in {
        str(done.pk): {done.pk},
        "sync:1": {live.pk},
        "sync:2": {dead.pk},
        f"auth.Group:{group.pk}": {owned.pk},
        "sync": set(),
        "shop.charge": set(),
    }.items():
        assert shown(operator.get(LIST, {"q": term})) == expected, term


def test_a_job_links_to_the_page_of_its_owner_without_loading_the_owner(operator):
    kind = ContentType.objects.get_for_model(Group)
    for pk in range(20):
        make(owner_type=kind, owner_id=str(pk))
    make(owner_type=ContentType.objects.get_for_model(Permission), owner_id="7")
    with CaptureQueriesContext(connection) as queries:
        page = operator.get(LIST).content.decode()
    assert '<a href="/admin/auth/group/3/change/">group 3</a>' in page
    assert "permission 7" in page
    assert len(queries) < 15


def test_the_list_shows_the_line_of_the_error_that_says_what_happened(operator):
    make(
        error="Traceback (most recent call last):\n"
        + "  File x\n" * 99
        + "KeyError: <b>id</b>"
        + "y" * 500
    )
    make(error="lost with its worker w1")
    page = operator.get(LIST).content.decode()
    assert "KeyError: &lt;b&gt;id&lt;/b&gt;" in page
    assert "lost with its worker w1" in page
    assert "Traceback" not in page


def test_the_detail_page_escapes_everything_a_task_may_have_written(operator):
    evil = "<script>alert(1)</script>"
    job = make("dead", args=[evil], kwargs={"a": evil}, error=evil, message=evil, key=evil)
    page = operator.get(change(job)).content.decode()
    assert evil not in page
    assert page.count("&lt;script&gt;alert(1)") >= 5


@pytest.mark.parametrize("use_tz", [True, False])
def test_the_timeline_is_local_time_with_and_without_zones(operator, settings, use_tz):
    at = datetime(2026, 11, 30, 20, 15, tzinfo=UTC)
    job = make(created_at=at)
    settings.TIME_ZONE, settings.USE_TZ = "America/New_York", use_tz
    assert "2026-11-30 15:15:00" in operator.get(change(job)).content.decode()


def test_the_timeline_names_the_instants_that_were_reached(operator):
    job = make("running", started_at=timezone.now())
    page = operator.get(change(job)).content.decode()
    assert re.findall(r'class="job-step">(\w+)', page) == [
        "created",
        "queued",
        "started",
    ]


@pytest.mark.parametrize(
    ("state", "late", "text"),
    [
        ("scheduled", False, "due 4"),
        ("queued", False, "for 0"),
        ("queued", True, "overdue for 2"),
        ("running", False, "for 1"),
        ("dead", False, "ended now"),
    ],
)
def test_the_list_says_how_long_a_job_waits_runs_or_is_overdue(operator, state, late, text):
    hour_ago = timezone.now() - timedelta(hours=1)
    late = {"due_at": timezone.now() - timedelta(hours=2, minutes=1)} if late else {}
    make(state, started_at=hour_ago, **late)
    assert text in re.sub(r"<[^>]+>", "", operator.get(LIST).content.decode())


def test_a_job_cannot_be_added_nor_changed_by_a_form(operator):
    job = make("running", token=3)
    assert operator.get(LIST + "add/").status_code == 403
    assert operator.post(change(job), {"state": "dead"}).status_code == 403
    assert 'name="_save"' not in operator.get(change(job)).content.decode()
    job.refresh_from_db()
    assert (job.state, job.token) == ("running", 3)


def test_only_a_finished_job_can_be_deleted(operator):
    ended, live = make("dead"), make("queued")
    assert operator.post(change(ended, "delete"), {"post": "yes"}).status_code == 302
    assert operator.post(change(live, "delete"), {"post": "yes"}).status_code == 403
    assert set(Job.objects.all()) == {live}
    assert "delete_selected" not in operator.get(LIST).content.decode()


def test_a_job_that_was_retried_while_its_delete_page_was_open_is_kept(operator, monkeypatch):
    job = make("dead")
    model_admin = admin.site.get_model_admin(Job)
    delete = type(model_admin).delete_model
    monkeypatch.setattr(
        type(model_admin), "delete_model", lambda *a: (Job.objects.retry(), delete(*a))
    )
    assert operator.post(change(job, "delete"), {"post": "yes"}).status_code == 403
    assert Job.objects.filter(pk=job.pk).exists()


def test_retry_gives_dead_and_cancelled_jobs_a_new_budget_and_says_why_others_stay(
    operator,
):
    dead, cancelled, live = (
        make("dead", attempts=8),
        make("cancelled"),
        make("queued", key="k"),
    )
    collides, done = make("dead", key="k"), make("succeeded")
    said = act(operator, "retry", dead, cancelled, live, collides, done)
    assert said == [
        "2 jobs will run again.",
        "2 jobs left as is: neither dead, cancelled nor backing off.",
        "1 job left as is: another job with the same key does it.",
    ]
    states = dict(Job.objects.values_list("pk", "state"))
    assert [states[job.pk] for job in (dead, cancelled, collides)] == [
        "scheduled",
        "scheduled",
        "dead",
    ]
    dead.refresh_from_db()
    assert (dead.attempts, dead.due_at <= timezone.now()) == (0, True)


def test_a_job_that_backs_off_is_retried_from_its_page_and_one_that_waits_for_its_time_is_not(
    operator,
):
    later = timezone.now() + timedelta(hours=1)
    backs_off = make("scheduled", attempts=2, due_at=later)
    waits = make("scheduled", attempts=0, due_at=later)
    pages = [operator.get(change(job)).content.decode() for job in (backs_off, waits)]
    assert ["../retry/" in page for page in pages] == [True, False]
    left = "1 job left as is: neither dead, cancelled nor backing off."
    assert act(operator, "retry", backs_off, waits) == ["1 job will run again.", left]
    backs_off.refresh_from_db()
    assert (backs_off.state, backs_off.due_at <= timezone.now()) == ("scheduled", True)


def test_a_bulk_retry_is_spread_over_time(operator):
    first = make()
    Job.objects.bulk_create(
        Job(task="t", queue="q", state="dead", finished_at=timezone.now()) for _ in range(499)
    )
    said = act(operator, "retry", first, query="?state=dead", select_across="1")
    assert said == ["500 jobs will run again over the next 50 seconds."]
    dues = Job.objects.values_list("due_at", flat=True)
    assert timedelta(seconds=40) < max(dues) - min(dues) < timedelta(seconds=50)


def test_cancel_ends_unfinished_jobs_and_says_how_many_had_ended_before(operator):
    running, queued, dead = make("running"), make("queued"), make("dead")
    said = act(operator, "cancel", running, queued, dead)
    assert said == ["2 jobs cancelled.", "1 job left as is: finished already."]
    assert Job.objects.filter(state="cancelled", error="cancelled by op").count() == 2


def test_a_ticked_job_that_left_the_filtered_list_meanwhile_is_reported(operator):
    job = make("succeeded")
    assert act(operator, "cancel", job) == ["1 job left as is: finished already."]


def test_the_buttons_of_the_detail_page_act_and_leave_a_line_in_its_history(operator):
    job = make("running")
    page = operator.get(change(job)).content.decode()
    assert 'action="../cancel/"' in page
    assert 'action="../retry/"' not in page
    operator.post(change(job, "cancel"))
    assert 'action="../retry/"' in operator.get(change(job)).content.decode()
    operator.post(change(job, "retry"))
    job.refresh_from_db()
    assert job.state == "scheduled"
    history = operator.get(change(job, "history")).content.decode()
    assert "cancel: now cancelled" in history
    assert "retry: now scheduled" in history


def test_a_verb_needs_a_post(operator):
    job = make("running")
    assert operator.get(change(job, "cancel")).status_code == 405
    assert Job.objects.get().state == "running"


def test_who_may_only_view_sees_no_verbs_and_cannot_use_them(client):
    job = make("running")
    viewer = staff(client, "view_job")
    assert "job-verb" not in viewer.get(change(job)).content.decode()
    assert viewer.post(change(job, "cancel")).status_code == 403
    assert act(viewer, "cancel", job) == []
    assert viewer.post(change(job, "delete"), {"post": "yes"}).status_code == 403
    assert Job.objects.get().state == "running"


def test_staff_without_a_permission_sees_no_job(client):
    job = make()
    stranger = staff(client)
    assert stranger.get(LIST).status_code == 403
    assert stranger.get(change(job)).status_code == 403


def fill(rows):
    """Mostly succeeded jobs; 1 % dead, 1 % unfinished."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO durable_jobs_job (id, task, args, kwargs, options, queue, state, key,
                                          owner_type_id, owner_id, due_at, finished_at)
            SELECT gen_random_uuid(), 'shop.task' || i %% 9, '[1]', '{}', '{}', 'default', state,
                   'key' || i, %s, i::text,
                   CASE WHEN state = 'queued' THEN now() + i * interval '1s' END,
                   CASE WHEN state <> 'queued' THEN now() - i * interval '1s' END
              FROM (SELECT i, CASE i %% 100 WHEN 1 THEN 'dead' WHEN 2 THEN 'queued'
                                            ELSE 'succeeded' END AS state
                      FROM generate_series(1, %s) AS i) AS numbered""",
            [ContentType.objects.get_for_model(Group).pk, rows],
        )
        cursor.execute("ANALYZE durable_jobs_job")


def plans(queries):
    """Explain again every query of the table; psycopg logs them with their values."""
    with connection.cursor() as cursor:
        for query in queries:
            if "durable_jobs_job" in query["sql"] and query["sql"].startswith("SELECT"):
                cursor.execute(f"EXPLAIN {query['sql']}")
                yield "\n".join(line for (line,) in cursor.fetchall())


@pytest.mark.skipif(connection.vendor != "postgresql", reason="reads PostgreSQL's plans")
def test_no_query_of_the_list_reads_the_whole_table(operator):
    fill(ROWS)
    job = Job.objects.filter(state="dead").first()
    pages = [
        "",
        "?p=2",
        "?o=2",
        "?o=-4",
        "?q=nothing",
        "?q=auth.group:5",
        f"?q={job.pk}",
    ]
    pages += [
        f"?q={job.key}",
        "?state=unfinished",
        "?state=dead&task=shop.task1",
        "?task=none",
    ]
    pages += [f"?state={state}" for state in Job.State.values]
    for page in pages:
        with CaptureQueriesContext(connection) as queries:
            response = operator.get(LIST + page)
        assert response.status_code == 200
        explained = list(plans(queries.captured_queries))
        assert len(explained) >= 3
        for plan in explained:
            assert "Seq Scan on durable_jobs_job" not in plan, f"{page}: {plan}"


def test_a_page_of_the_list_does_not_load_arguments_results_nor_whole_errors(operator):
    make(error="x" * 8000, args=["secret"])
    with CaptureQueriesContext(connection) as queries:
        page = operator.get(LIST).content.decode()
    assert "x" * 151 not in page
    rows = [q["sql"] for q in queries.captured_queries if "LIMIT 100" in q["sql"]]
    assert all('"args"' not in sql and '"result"' not in sql for sql in rows)


@pytest.mark.parametrize("count", [100, 101])
def test_retry_of_more_than_a_hundred_paces_itself(count):
    ids = noop.enqueue_many([[number] for number in range(count)])
    Job.objects.filter(pk__in=ids).cancel()
    assert Job.objects.filter(pk__in=ids).retry() == count
    dues = Job.objects.filter(pk__in=ids).values_list("due_at", flat=True)
    seconds = (max(dues) - min(dues)).total_seconds()
    assert (seconds == 0) == (count == 100)
    assert seconds <= Job.objects.pace(count)


def test_jobs_among_several_selections_are_found():
    ids = noop.enqueue_many([[number] for number in range(5)])
    first, last = Job.objects.order_by("pk")[:2], Job.objects.order_by("-pk")[:2]
    found = Job.objects.among(first, last).exclude(pk=ids[0])
    assert set(found.values_list("pk", flat=True)) == {ids[1], ids[3], ids[4]}
