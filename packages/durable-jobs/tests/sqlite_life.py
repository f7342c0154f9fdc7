"""The life of jobs on SQLite: test_sqlite.py runs it in a process of its own, beside a worker."""

import io
from datetime import timedelta

from django.contrib.auth.models import Group, User
from django.core.checks import run_checks
from django.core.management import call_command
from django.db import connection, transaction
from django.test import Client
from django.urls import reverse
from django.utils.timezone import now

from durable_jobs import Job
from durable_jobs.publisher import publisher
from tests import celery_tasks, tasks
from tests.conftest import effects, wait_until
from tests.sqlite_app import EFFECTS

State = Job.State
FAR = timedelta(days=100)


def migrate():
    call_command("migrate", verbosity=0)
    with connection.cursor() as cursor:
        cursor.execute(EFFECTS)
        cursor.execute("PRAGMA journal_mode = WAL")
    return {"checks": [message.id for message in run_checks(tags=["durable_jobs"])]}


def live():
    return {name: step() for name, step in STEPS.items()}


def done(*results):
    """Wait for the ends; return states and attempts."""
    ids = [getattr(result, "id", result) for result in results]
    wait_until(lambda: Job.objects.filter(pk__in=ids, due_at=None).count() == len(ids), 60)
    rows = [Job.objects.get(pk=each) for each in ids]
    return [[row.state, row.attempts] for row in rows]


def ends():
    """A result, a delay, a backoff, an attempt too many and a failure for good."""
    added, delayed = tasks.add.delay(1, 2), tasks.noop.apply_async(countdown=0.3)
    failed = tasks.fail.apply_async(max_attempts=2)
    states = done(added, delayed, failed, tasks.fail_for_good.delay(), tasks.autoretry.delay())
    started = Job.objects.get(pk=delayed.id)
    return [
        added.get(timeout=5),
        states,
        started.started_at - started.created_at > timedelta(0.3 / 86400),
    ]


def keys():
    """One live job per key; enqueued again while it runs, it runs again."""
    job = tasks.write.apply_async(["k1", 0.5], key="k")
    publisher.flush(5)
    wait_until(lambda: effects("start k1"))
    again = tasks.write.apply_async(["k2"], key="k")
    later = tasks.write.apply_async(["k3"], key="k")
    done(job)
    return [len({job.id, again.id, later.id}), effects("end k")]


def transactions():
    """A rollback leaves no job, an atomic body no effect without its end."""
    try:
        with transaction.atomic():
            tasks.noop.delay()
            raise ValueError
    except ValueError:
        pass
    before = Job.objects.filter(due_at__isnull=False).count()
    return [before, done(tasks.write_atomic.delay("x")), effects("atomic")]


def many():
    """Bulk, progress and the reconciler."""
    ids = tasks.noop.enqueue_many([[number] for number in range(300)])
    walk = tasks.checkpoints.delay(2)
    Group.objects.create(name="raw")
    wait_until(lambda: Group.objects.filter(name__startswith="done").exists(), 60)
    states = done(*ids, walk)
    return [len(ids), len({tuple(state) for state in states}), Job.objects.get(pk=walk.id).progress]


def cancelled():
    """Cancel of a running and of a waiting job, and expiry."""
    runs = celery_tasks.slowly.delay("c", 2)
    publisher.flush(5)
    wait_until(lambda: effects("start c"))
    waits, late = tasks.noop.apply_async(countdown=60), tasks.noop.apply_async(expires=-1)
    Job.objects.filter(pk__in=[runs.id, waits.id]).cancel()
    Job.objects.filter(pk=late.id).update(due_at=now())
    return [done(runs, waits, late), late.job.error]


def retried():
    """Dead jobs get a new budget, spread over time, and the timers stay readable."""
    ids = [tasks.fail_for_good.delay().id for _ in range(10)]
    done(*ids)
    count = Job.objects.filter(pk__in=ids).retry(spread=1000)
    dues = list(Job.objects.filter(pk__in=ids).values_list("due_at", flat=True))
    moment = now()
    spread = [0 <= (due - moment).total_seconds() + 1 <= 1001 for due in dues]
    Job.objects.filter(pk__in=ids).cancel()
    once = tasks.fail_for_good.delay()
    done(once)
    again = Job.objects.filter(pk=once.id).retry()
    wait_until(lambda: Job.objects.get(pk=once.id).token == 2)
    return [count, all(spread), len(set(dues)) > 5, again, done(once)]


def seen():
    """What operators look at: the commands and the admin."""
    output = io.StringIO()
    for words in (["list"], ["stats"], ["show", str(Job.objects.first().pk)]):
        call_command("jobs", *words, stdout=output)
    client = Client()
    client.force_login(User.objects.create_superuser("operator"))
    pages = [reverse("admin:durable_jobs_job_changelist")]
    pages.append(reverse("admin:durable_jobs_job_change", args=[Job.objects.first().pk]))
    return [client.get(page, headers={"host": "localhost"}).status_code for page in pages]


def pruned():
    """Finished jobs past their retention go, dead ones later."""
    Job.objects.filter(due_at=None).update(finished_at=now() - timedelta(days=30))
    left = Job.objects.filter(state=State.DEAD).count()
    Job.objects.all().prune()
    kept = Job.objects.filter(due_at=None).count() == left
    Job.objects.filter(due_at=None).update(finished_at=now() - FAR)
    Job.objects.all().prune()
    return [left > 0, kept, Job.objects.filter(due_at=None).count()]


STEPS = {step.__name__: step for step in
         (ends, keys, transactions, many, cancelled, retried, seen, pruned)}  # fmt: skip
