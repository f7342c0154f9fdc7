"""Each statement of the protocol finds its rows through an index, however many there are.

A small table, on which PostgreSQL may not scan: what has no index to use scans it nevertheless.
`make bench ARGS="plans --rows 10000000"` looks at so many rows, and lets the planner choose.
"""

import pytest
from django.db import connection, connections, transaction

from durable_jobs import Job, postgresql, transitions
from durable_jobs.attempt import Attempt
from durable_jobs.enqueue import Call
from durable_jobs.ids import uuid7
from durable_jobs.publisher import publisher
from durable_jobs.reconcilers import _registered
from tests import tasks

pytestmark = [
    pytest.mark.usefixtures("jobs_db"),
    pytest.mark.skipif(connection.vendor != "postgresql", reason="reads PostgreSQL's plans"),
]
KEY, DUE, WORKER = "durable_jobs_job_pkey", "durable_job_due", "durable_job_worker"
FINISHED = "durable_job_finished"


def call(**how):
    return Call("t", 8, uuid7(), queue="default", **how)


def mine():
    return [Attempt(tasks.noop, uuid7(), number, 1) for number in (1, 2)]


def one():
    return Job.objects.filter(pk=uuid7())


# Verb of transitions.py, and the indexes that it may use; a few rows of its own are none's matter.
VERBS = {
    "enqueue": (lambda: transitions.enqueue(call().row()), set()),
    "enqueue by key": (lambda: transitions.enqueue(call(key="k").row(), "UPSERT"), set()),
    "enqueue once": (lambda: transitions.enqueue(call(key="k").row(), "UPSERT_ONCE"), set()),
    "known": (lambda: transitions.known(uuid7()), {KEY}),
    "adopt": (lambda: transitions.adopt(call().row()), set()),
    "claim": (lambda: transitions.claim(tasks.noop, [uuid7()]), {KEY}),
    "claim along": (lambda: transitions.claim(tasks.noop, [uuid7()], along=50), {KEY}),
    "renew": (lambda: transitions.renew(mine()), {KEY}),
    "still mine": (lambda: transitions.still_mine(mine()), {KEY}),
    "finish": (lambda: transitions.finish(mine()), {KEY}),
    "finish, and wait": (lambda: transitions.finish(mine(), wait=True), {KEY}),
    "fail": (lambda: transitions.fail(mine()[0], "e", 1, final=False), {KEY}),
    "release": (lambda: transitions.release(mine()), {KEY}),
    "lose": (lambda: transitions.lose("host/boot/1", "e"), {WORKER}),
    "release_boot": (transitions.release_boot, {WORKER}),
    "fire": (lambda: transitions.fire(1000), {KEY, DUE}),
    "cancel": (lambda: one().cancel(), {KEY}),
    "retry": (lambda: one().retry(0), {KEY, "durable_job_key"}),
    "hasten": (lambda: transitions.hasten(one()), {KEY}),
    "prune": (lambda: Job.objects.prune(), {FINISHED, "durable_job_dead"}),
    "reconcile": (
        lambda: list(_registered[tasks.rename.name].pending()[:1]),
        {"durable_job_key", "durable_job_owner"},
    ),
}


# Of a few rows the planner reads all live keys at once: `make bench ARGS=plans` sees it with many.
WHOLE = {"retry": {("durable_job_key", False)}, "reconcile": {("durable_job_key", False)}}


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def explained(verb):
    """Run the verb; return the nodes of the plans of all its statements."""
    found = []

    def explain(execute, sql, params, many, context):
        if "durable_jobs_job" in sql and "EXPLAIN" not in sql:
            with connections["default"].cursor() as cursor:
                cursor.execute(f"EXPLAIN (FORMAT JSON) {sql}", params)
                found.extend(nodes(cursor.fetchone()[0][0]["Plan"]))
        return execute(sql, params, many, context)

    with connection.execute_wrapper(explain):
        verb()
    return found


def plans_of(name, monkeypatch):
    monkeypatch.setattr(publisher, "send", list)
    tasks.noop.enqueue_many([[number] for number in range(200)])
    Job.objects.filter(pk__in=Job.objects.values("pk")[:100]).cancel()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
        cursor.execute("SET enable_seqscan = off")
    try:
        return explained(VERBS[name][0])
    finally:
        with connection.cursor() as cursor:
            cursor.execute("SET enable_seqscan = on")


def scans_of(plans):
    """Return index and condition of each look into the table; none of each reads it whole."""
    of_table = [n for n in plans if n.get("Relation Name") == "durable_jobs_job"]
    looks = [n for n in plans if "durable_job" in n.get("Index Name", "")]
    whole = [n for n in of_table if n["Node Type"] == "Seq Scan"]
    return {(n.get("Index Name"), "Index Cond" in n) for n in [*whole, *looks]}


@pytest.mark.parametrize("name", VERBS)
def test_each_statement_uses_its_index(name, monkeypatch):
    plans = plans_of(name, monkeypatch)
    assert plans
    allowed = {(index, True) for index in (*VERBS[name][1], KEY)} | WHOLE.get(name, set())
    found = scans_of(plans)
    assert found <= allowed
    assert WORKER not in VERBS[name][1] or (WORKER, True) in found


@pytest.mark.parametrize("name", ["lose", "release_boot", "fire"])
def test_a_statement_without_its_index_is_noticed(name, monkeypatch):
    (index,) = {WORKER, DUE} & VERBS[name][1]
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(f"DROP INDEX {index}")
        found = scans_of(plans_of(name, monkeypatch))
        transaction.set_rollback(True)
    assert not found <= {(index, True), (KEY, True)}


def test_every_statement_is_one_of_a_verb_that_was_looked_at(monkeypatch):
    texts = {name for name in vars(postgresql) if name.isupper() and not name.startswith("_")}
    used = set()
    for name in texts:
        monkeypatch.setattr(postgresql, name, f"/* {name} */ {getattr(postgresql, name)}")
    monkeypatch.setattr(publisher, "send", list)

    def note(execute, sql, params, many, context):
        used.update(name for name in texts if f"/* {name} */" in sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        for verb, _ in VERBS.values():
            verb()
    # No statements on rows: parts of some, and what copies, waits or tells the time.
    rest = {"NOW", "HINT", "SPREAD", "LOCK_TIMEOUT", "MANY", "IN_DELAY"}
    assert texts - used == rest
