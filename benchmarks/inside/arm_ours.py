"""Durable jobs of the baked project, with the project's own settings."""

import json

import django

django.setup()

import plans  # noqa: E402
import stages  # noqa: E402
from body import tell  # noqa: E402
from celery import shared_task  # noqa: E402
from config.celery import app  # noqa: E402, F401 - for `celery -A`
from django.contrib.auth.models import Group  # noqa: E402
from django.db import connection, transaction  # noqa: E402

from durable_jobs import JobTask, database, postgresql  # noqa: E402
from durable_jobs.models import Job  # noqa: E402
from durable_jobs.publisher import publisher  # noqa: E402

TABLES = ["durable_jobs_job"]
stages.switch_on(durable=True)


@shared_task(base=JobTask)
def noop(number):
    return None


@shared_task(base=JobTask)
def start():
    tell("body")


@shared_task(base=JobTask, atomic=True)
def hold(name, seconds):
    """Have an effect, and take long before it is committed."""
    import time

    Group.objects.create(name=name)
    tell("body")
    time.sleep(seconds)


def send(number):
    noop.delay(number)


def send_start():
    start.delay()


def send_many(count):
    noop.enqueue_many([number] for number in range(count))


def alone():
    """From now on publish one message per job, as for jobs that come from separate requests."""

    def send_each(hints):
        for hint in hints:
            publisher.publish([hint])

    publisher.send = send_each


def settle():
    publisher.flush(60)


def left():
    return Job.objects.unfinished().count()


def send_hold(name, seconds):
    hold.delay(name, seconds)


def due_pass(rows, due, passes):
    """Return plans and times of the loop's statement over a table of that size."""
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE durable_jobs_job")
        # Finished rows of months, 5000 jobs in work, some of them due.
        cursor.execute(
            "INSERT INTO durable_jobs_job (id, task, args, kwargs, queue, options, state, due_at,"
            " max_attempts, finished_at, queued_at) SELECT gen_random_uuid(), 'bench.noop', '[]',"
            " '{}', 'default', '{}', CASE WHEN n > 5000 THEN 'succeeded' ELSE 'queued' END,"
            " CASE WHEN n <= %s THEN now() - interval '1s' WHEN n <= 5000 THEN now() + interval"
            " '1h' END, 8, CASE WHEN n > 5000 THEN now() - n * interval '1s' END, now()"
            " FROM generate_series(1, %s) n",
            [due, rows],
        )
        cursor.execute("VACUUM ANALYZE durable_jobs_job")
    return [_explain(due) for _ in range(passes)]


def _explain(due):
    real = postgresql.FIRE
    postgresql.FIRE = f"EXPLAIN (ANALYZE, FORMAT JSON) {real}"
    try:
        with transaction.atomic():
            ((plan,),) = database.run("FIRE", limit=1000)
            transaction.set_rollback(True)
    finally:
        postgresql.FIRE = real
    plan = json.loads(plan) if isinstance(plan, str) else plan
    nodes = list(_nodes(plan[0]["Plan"]))
    changed = next(node for node in nodes if node["Node Type"] == "ModifyTable")
    return {
        "ms": plan[0]["Execution Time"],
        "indexes": sorted({node["Index Name"] for node in nodes if "Index Name" in node}),
        "scanned_whole": any(
            node["Node Type"] == "Seq Scan" and node.get("Relation Name") == "durable_jobs_job"
            for node in nodes
        ),
        "found": changed["Actual Rows"] == due,
    }


def statement_plans(rows, unfinished):
    """Return how each statement of the protocol is carried out beside so many rows."""
    return plans.look(rows, unfinished)


def _nodes(plan):
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)
