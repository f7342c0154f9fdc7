"""What the status page is told, who may ask, and what asking costs."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from queue_probes.jobs import sample
from queue_probes.models import JobSample, Node, Queue, Sample
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)
DATA = "/status/data"


def ago(**span):
    return timezone.now() - timedelta(**span)


def staff(*permissions):
    user = User.objects.create_user("op", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def operator():
    return staff("view_job", "change_job")


@pytest.fixture
def mail(settings):
    settings.QUEUE_PROBES = {"QUEUES": ["mail"]}
    return Queue.objects.create(name="mail", seen_at=ago(seconds=3), latency=0.02, release="r1")


@pytest.fixture
def make():
    """Return a function that makes a job in a state; skip where there are no durable jobs."""
    job = pytest.importorskip("durable_jobs.models").Job

    def make(state="dead", **values):
        timer = {"due_at": timezone.now() + timedelta(seconds=30)}
        end = {"finished_at": timezone.now()}
        running = {"started_at": ago(seconds=5)} if state == "running" else {}
        kind = timer if state in ("running", "queued", "scheduled") else end
        given = {"task": "shop.charge", "queue": "default", "state": state, **kind, **running}
        return job.objects.create(**{**given, **values})

    return make


def jobs(client):
    return client.get(DATA).json()["jobs"]


# ---- Who may ask


def test_strangers_are_sent_to_the_login_and_their_scripts_get_403_as_json():
    page, data = Client().get("/status/"), Client().get(DATA)
    assert (page.status_code, page.url) == (302, "/admin/login/?next=/status/")
    assert (data.status_code, data.json()) == (403, {"error": "for staff only"})
    assert Client().post("/status/retry").status_code == 403


def test_users_who_are_not_staff_see_nothing(client):
    client.force_login(User.objects.create_user("reader"))
    assert [client.get(url).status_code for url in ("/status/", DATA)] == [403, 403]
    assert client.post("/status/retry", {"task": "shop.charge"}).status_code == 403


def test_the_page_has_no_inline_script_or_style_and_nothing_from_elsewhere(operator):
    page = operator.get("/status/").content.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page) == ["", ""]


def test_staff_without_permissions_sees_numbers_and_no_job(make):
    make("running")
    make("dead")
    client = staff()
    make("scheduled", attempts=1, error="ValueError: no card")
    told = jobs(client)
    assert {row["state"]: row["count"] for row in told["states"]}["dead"] == 1
    assert [told[name] for name in ("failing", "running", "dead", "retry")] == [None] * 3 + [False]
    assert client.post("/status/retry", {"task": "shop.charge"}).status_code == 403


# ---- What it is told


def test_each_queue_has_its_verdict_and_the_longest_latency_of_each_minute(operator, mail):
    for latency, minutes in ((0.5, 2), (0.1, 2), (0.2, 60), (9, 60 * 24)):
        moment = timezone.now().replace(second=30) - timedelta(minutes=minutes)
        Sample.objects.create(queue="mail", latency=latency, at=moment)
    [queue] = operator.get(DATA).json()["queues"]
    assert (queue["state"], queue["words"], queue["fine"]) == ("ok", "probes arrive", True)
    assert len(queue["curve"]) == 180
    assert [value for value in queue["curve"] if value is not None] == [0.2, 0.5]


def test_beat_is_dead_when_it_has_not_looked_for_long_and_when_it_never_has(operator, mail):
    assert operator.get(DATA).json()["beat"]["fine"]
    Queue.objects.update(seen_at=ago(seconds=100), failing_since=ago(seconds=90), failure="Gone")
    told = operator.get(DATA).json()["beat"]
    assert (told["fine"], told["failure"]) == (False, "Gone")
    assert 100 <= told["age"] < 110
    Queue.objects.all().delete()
    assert operator.get(DATA).json()["beat"] == {"age": None, "fine": False, "failure": ""}


def test_the_loop_is_dead_when_it_has_not_passed_for_long_and_when_it_never_has(operator):
    passes = pytest.importorskip("durable_jobs.models").LoopPass
    assert operator.get(DATA).json()["loop"] == {"age": None, "fine": False}
    passes.objects.create(at=ago(seconds=3))
    assert operator.get(DATA).json()["loop"]["fine"]
    passes.objects.update(at=ago(seconds=100))
    told = operator.get(DATA).json()["loop"]
    assert (told["fine"], 100 <= told["age"] < 110) == (False, True)


def test_a_worker_that_is_silent_is_told_from_one_that_works(operator):
    node = {"pid": 1, "slots": 4, "active": 2, "queues": ["mail"], "release": "r1"}
    Node.objects.create(name="a@x", oldest_at=ago(seconds=70), **node)
    Node.objects.create(name="b@x", seen_at=ago(seconds=60), **node)
    live, silent = operator.get(DATA).json()["workers"]
    assert (live["fine"], live["active"], live["slots"], live["release"]) == (True, 2, 4, "r1")
    assert 70 <= live["oldest"] < 75
    assert (silent["fine"], silent["oldest"]) == (False, None)


def test_what_runs_is_listed_newest_first_with_a_link_to_the_admin(operator, make):
    make("running", started_at=ago(seconds=100))
    newest = make("running", worker="w@x", progress=40, message="half")
    make("queued")
    told = jobs(operator)["running"]
    assert len(told) == 2
    assert told[0]["url"] == f"/admin/durable_jobs/job/{newest.pk}/change/"
    assert (told[0]["worker"], told[0]["progress"], told[0]["message"]) == ("w@x", 40, "half")
    assert [5 <= told[0]["seconds"] < 9, 100 <= told[1]["seconds"] < 109] == [True, True]


def test_what_keeps_failing_is_listed_with_its_last_error_and_its_next_attempt(operator, make):
    make("scheduled")
    make("scheduled", attempts=1)  # handed back by a worker that was stopped: it has not failed
    make("running", attempts=2, error="ValueError: it is being tried again")
    make(attempts=8, error="ValueError: it is dead")
    lost = make("queued", attempts=1, error="lost with its worker w@x", due_at=ago(seconds=9))
    error = "Traceback\n  secret line\nConnectionError: refused\n"
    often = make("scheduled", attempts=3, error=error)
    first, second = jobs(operator)["failing"]
    assert (first["error"], first["attempts"], first["state"]) == (
        "ConnectionError: refused",
        3,
        "scheduled",
    )
    assert first["url"] == f"/admin/durable_jobs/job/{often.pk}/change/"
    assert 20 < first["seconds"] <= 30
    assert (second["id"], second["state"], second["seconds"]) == (str(lost.pk), "queued", 0)


def test_the_dead_are_grouped_by_task_with_the_last_line_of_their_errors(operator, make):
    for minutes in range(25):
        make(task="a.old", finished_at=ago(minutes=10 + minutes))
    make(task="b.new", error="Traceback\n  secret line\nValueError: no card\n")
    new, old = jobs(operator)["dead"]["groups"]
    assert (new["task"], new["count"], new["jobs"][0]["error"]) == (
        "b.new",
        1,
        "ValueError: no card",
    )
    assert (old["task"], old["count"], len(old["jobs"])) == ("a.old", 25, 19)


def test_without_durable_jobs_the_page_has_no_jobs(settings, mail):
    client = staff()
    settings.INSTALLED_APPS = [
        name for name in settings.INSTALLED_APPS if name.startswith(("django.", "queue_probes"))
    ]
    told = client.get(DATA).json()
    assert (told["jobs"], told["queues"][0]["queue"]) == (None, "mail")
    assert client.get("/status/").status_code == 200
    assert client.post("/status/retry", {"task": "a"}).status_code == 403
    sample()
    assert not JobSample.objects.exists()


# ---- Retry


def test_retry_runs_one_job_or_all_of_a_task_again(operator, make):
    one, *rest = [make() for _ in range(3)]
    other = make(task="other")
    said = operator.post("/status/retry", {"job": one.pk}).json()
    assert said == {"chosen": 1, "retried": 1, "seconds": 0}
    assert operator.post("/status/retry", {"task": "shop.charge"}).json()["retried"] == 2
    states = dict(type(one).objects.values_list("pk", "state"))
    assert {states[job.pk] for job in (one, *rest)} == {"scheduled"}
    assert states[other.pk] == "dead"


def test_retry_of_many_is_spread_and_nothing_else_is_retried(operator, make):
    first = make()
    model = type(first)
    end = {"state": "dead", "finished_at": timezone.now()}
    model.objects.bulk_create(model(task="shop.charge", queue="q", **end) for _ in range(199))
    make("cancelled")
    said = operator.post("/status/retry", {"task": "shop.charge"}).json()
    assert said == {"chosen": 200, "retried": 200, "seconds": 20}
    assert model.objects.filter(state="cancelled").count() == 1
    for nothing in ({}, {"job": "not-an-id"}, {"task": ""}):
        assert operator.post("/status/retry", nothing).json()["chosen"] == 0


def test_retry_needs_a_post_with_the_token(make):
    make()
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    assert client.get("/status/retry").status_code == 405
    assert client.post("/status/retry", {"task": "shop.charge"}).status_code == 403
    page = client.get("/status/").content.decode()
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)[1]
    said = client.post("/status/retry", {"task": "shop.charge"}, headers={"X-CSRFToken": token})
    assert said.json()["retried"] == 1


# ---- Samples


def test_a_minute_has_one_sample_though_several_beats_write_it(mail, make):
    for state in ("running", "queued", "queued", "dead", "succeeded"):
        make(state)

    def write(_):
        try:
            sample()
        finally:
            connection.close()

    while timezone.now().second > 55:  # the samples are to fall into one minute
        time.sleep(0.1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    [row] = JobSample.objects.all()
    assert (row.at.second, row.at.microsecond) == (0, 0)
    assert row.counts == {"running": 1, "queued": 2, "scheduled": 0, "dead": 1}


def test_samples_are_deleted_after_their_retention_and_drawn_before(operator, mail, make):
    make("queued")
    minute = timezone.now().replace(second=0, microsecond=0)
    for back, queued in ((1, 7), (60 * 25, 9)):
        JobSample.objects.create(at=minute - timedelta(minutes=back), counts={"queued": queued})
    sample()
    assert JobSample.objects.count() == 2
    curve = {row["state"]: row["curve"] for row in jobs(operator)["states"]}["queued"]
    assert [value for value in curve if value is not None] == [7, 1]


def test_the_curve_ends_with_the_number_beside_it(operator, mail, make):
    make()
    sample()
    make()
    [dead] = [row for row in jobs(operator)["states"] if row["state"] == "dead"]
    assert (dead["count"], max(filter(None, dead["curve"]))) == (2, 2)


def test_beat_writes_the_samples(crew, make):
    make("queued")
    crew.beat()
    row = wait_until(JobSample.objects.first, 60, str(crew.folder))
    assert row.counts["queued"] == 1


# ---- What it costs


def test_no_query_reads_the_whole_table(operator, mail, make):
    if connection.vendor != "postgresql":
        pytest.skip("the plans are PostgreSQL's")
    for state in ("running", "queued", "dead"):
        make(state)
    make("scheduled", attempts=1, error="ValueError: no card")
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO durable_jobs_job (id, task, args, kwargs, queue, options, created_at,"
            " finished_at, state) SELECT gen_random_uuid(), 'a.b', '[]', '{}', 'q', '{}', now(),"
            " now() - n * interval '1 s', CASE n % 2 WHEN 0 THEN 'dead' ELSE 'succeeded' END"
            " FROM generate_series(1, 50000) n"
        )
        cursor.execute("ANALYZE durable_jobs_job")
    with CaptureQueriesContext(connection) as queries:
        assert operator.get(DATA).status_code == 200
        assert operator.post("/status/retry", {"task": "shop.charge"}).json()["retried"] == 1
        sample()
    plans = []
    with connection.cursor() as cursor:
        for sql in (query["sql"] for query in queries if "durable_jobs_job" in query["sql"]):
            cursor.execute(f"EXPLAIN {sql}")
            plans.append("\n".join(line for (line,) in cursor.fetchall()))
    assert len(plans) >= 9
    for plan in plans:
        assert "Seq Scan on durable_jobs_job" not in plan, plan
