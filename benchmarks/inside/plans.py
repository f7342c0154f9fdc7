"""How the database answers each statement of the protocol beside many rows.

A tenth of the rows is unfinished, some of that runs under the names of many workers. Each statement
is explained with its times and rolled back; then the verb that it belongs to goes on.
"""

from celery import current_app
from django.db import connection, transaction

from durable_jobs import Job, attempt, transitions
from durable_jobs.enqueue import Call
from durable_jobs.ids import uuid7

TASK = "bench.noop"
FILL = """
INSERT INTO durable_jobs_job (id, task, args, kwargs, queue, options, state, due_at, max_attempts,
                              finished_at, queued_at, worker, token, attempts, key)
SELECT gen_random_uuid(), %s, '[]', '{}', 'default', '{}',
       CASE WHEN n > %s THEN 'succeeded' WHEN n %% 100 = 0 THEN 'running' ELSE 'queued' END,
       CASE WHEN n <= %s THEN now() + (n %% 900 - 1) * interval '1s' END, 8,
       CASE WHEN n > %s THEN now() - n %% 500000 * interval '1s' END, now(),
       CASE WHEN n > %s THEN 'host/gone/' || n %% 1000
            WHEN n %% 100 = 0 THEN 'host' || n %% 1000 || '/boot/' || n %% 7 ELSE '' END,
       1, 1, CASE WHEN n %% 3 = 0 THEN 'key ' || n END
  FROM generate_series(1, %s) n"""


def fill(rows: int, unfinished: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE durable_jobs_job")
        cursor.execute(FILL, [TASK, *4 * [unfinished], rows])
        cursor.execute("VACUUM ANALYZE durable_jobs_job")


def verbs(task):
    """Return what is looked at, by name; each works on jobs that are there."""
    running = Job.objects.filter(state="running", due_at__isnull=False)
    waiting = Job.objects.filter(state="queued", due_at__isnull=False)
    ids = list(waiting.values_list("pk", flat=True)[:50])
    some = [
        attempt.Attempt(task, pk, token, 1) for pk, token in running.values_list("pk", "token")[:50]
    ]
    worker = running.values_list("worker", flat=True)[0]
    one = Job.objects.filter(pk=ids[0])
    key = waiting.exclude(key=None).values_list("key", flat=True)[0]

    def call(**how):
        return Call(TASK, 8, uuid7(), queue="default", **how).row()

    def release_boot():
        usual, attempt.boot = attempt.boot, lambda: worker.rpartition("/")[0]
        try:
            transitions.release_boot()
        finally:
            attempt.boot = usual

    return {
        "enqueue": lambda: transitions.enqueue(call()),
        "enqueue by key": lambda: transitions.enqueue(call(key=key), "UPSERT"),
        "enqueue once by key": lambda: transitions.enqueue(call(key=key), "UPSERT_ONCE"),
        "claim one": lambda: transitions.claim(task, ids[:1], alone=True),
        "claim 50": lambda: transitions.claim(task, ids),
        "claim 1 and 50 along": lambda: transitions.claim(task, ids[:1], along=50),
        "renew 50": lambda: transitions.renew(some),
        "still mine, 50": lambda: transitions.still_mine(some),
        "finish 50": lambda: transitions.finish(some),
        "finish 50, and wait": lambda: transitions.finish(some, wait=True),
        "fail": lambda: transitions.fail(some[0], "e", 1, final=False),
        "release 50": lambda: transitions.release(some),
        "lose a child's": lambda: transitions.lose(worker, "e"),
        "release a boot's": release_boot,
        "fire 100": lambda: transitions.fire(100),
        "cancel one": one.cancel,
        "retry one": lambda: one.retry(0),
        "prune": Job.objects.prune,  # nothing is old enough
    }


def look(rows: int, unfinished: int) -> list[dict]:
    """Fill the table and return one line for each statement."""
    fill(rows, unfinished)
    task = current_app.tasks.get(TASK) or type("Task", (), {"name": TASK})()
    return [
        {"verb": name, **plan} for name, verb in verbs(task).items() for plan in _explained(verb)
    ]


def _explained(verb):
    found = []

    def explain(execute, sql, params, many, context):
        if "durable_jobs_job" in sql and not sql.startswith("EXPLAIN"):
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", params)
                found.append(_summary(cursor.fetchone()[0][0]))
                transaction.set_rollback(True)
        return execute(sql, params, many, context)

    with transaction.atomic():
        with connection.execute_wrapper(explain):
            verb()
        transaction.set_rollback(True)
    return found


def _summary(plan):
    nodes = list(_nodes(plan["Plan"]))
    return {
        "ms": plan["Execution Time"],
        "indexes": sorted({node["Index Name"] for node in nodes if "Index Name" in node}),
        "whole": any(
            node["Node Type"] == "Seq Scan" and node.get("Relation Name") == "durable_jobs_job"
            for node in nodes
        ),
        "pages": plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"],
        "rows": max(node["Actual Rows"] for node in nodes),
    }


def _nodes(plan):
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)
