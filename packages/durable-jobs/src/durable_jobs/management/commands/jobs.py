"""`manage.py jobs list|show|retry|cancel|stats`: the operator's view without the admin."""

import re
from argparse import ArgumentParser
from typing import Any
from uuid import UUID

from celery import current_app
from django.core.management.base import BaseCommand, CommandError
from django.db.models import Count, Min
from django.db.models.functions import Now
from django.utils import timezone

from durable_jobs.models import Job, JobQuerySet
from durable_jobs.reconcile import unknown_tasks

# A whole id, or the begin of one: less than eight digits name a minute, not a job.
BEGIN = re.compile("[0-9a-f]{8,32}")


def positive(text: str) -> int:
    """Return the number, for argparse, which names the option when this fails."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def counted(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


class Command(BaseCommand):
    help = "List, show, retry and cancel jobs."

    def add_arguments(self, parser: ArgumentParser) -> None:
        commands = parser.add_subparsers(dest="verb", required=True)
        for verb in ("list", "retry", "cancel"):
            command = commands.add_parser(verb)
            command.add_argument("ids", nargs="*", metavar="id")
            command.add_argument("--task")
            command.add_argument("--state", choices=Job.State.values)
            command.add_argument("--queue")
            command.add_argument("--key")
            command.add_argument("--error", help="text the error must contain")
            command.add_argument("--limit", type=positive, default=50 if verb == "list" else None)
            if verb == "retry":
                spread = "seconds over which they start; by default ten jobs a second if many"
                command.add_argument("--spread", type=float, help=spread)
        commands.add_parser("show").add_argument("id")
        commands.add_parser("stats")

    def handle(self, *args: Any, verb: str, **options: Any) -> None:
        getattr(self, verb)(options)

    def selected(self, options: dict[str, Any]) -> JobQuerySet:
        """Return the jobs the options name; verbs that change jobs want at least one option."""
        filters = {
            "pk__in": [self.job(text).pk for text in options["ids"]] or None,
            "task": options["task"],
            "state": options["state"],
            "queue": options["queue"],
            "key": options["key"],
            "error__contains": options["error"],
        }
        given = {name: value for name, value in filters.items() if value is not None}
        if not given and options["limit"] is None:
            raise CommandError("Name jobs by id, or by --task, --state, --queue, --key or --error.")
        jobs: JobQuerySet = Job.objects.filter(**given)
        if options["limit"] is not None:
            newest = jobs.order_by("-pk").values("pk")[: options["limit"]]
            jobs = Job.objects.filter(pk__in=list(newest.values_list("pk", flat=True)))
        return jobs.order_by("-pk")

    def job(self, text: str) -> Job:
        """Return the job whose id is that, or begins so; say if there is none, or more than one."""
        digits = text.replace("-", "").lower()
        found = given = list(Job.objects.with_id(text).order_by("-created_at")[:9])
        if not given and BEGIN.fullmatch(digits):
            first, last = (UUID(digits.ljust(32, end)) for end in "0f")
            found = list(Job.objects.filter(pk__range=(first, last))[:2])
        match found:
            case [job]:
                return job
            case []:
                raise CommandError(f"There is no job {text}.")
        if given:
            keys = ", ".join(str(job.pk) for job in given)
            raise CommandError(f"Several jobs have the id {text}; take a key: {keys}.")
        raise CommandError(f"The ids of several jobs begin with {text}: give more of it.")

    def list(self, options: dict[str, Any]) -> None:
        now = timezone.now()
        line = "{!s:36}  {:9}  {:>9}  {:>8}  {}  {}  {}".format
        self.stdout.write(line("ID", "STATE", "AGE", "ATTEMPTS", "TASK", "KEY", "ERROR"))
        for job in self.selected(options):
            age = f"{int((now - job.created_at).total_seconds())} s"
            attempts = f"{job.attempts}/{job.max_attempts}"
            error = job.error.strip().rpartition("\n")[2][:60]
            shown = line(job.pk, job.state, age, attempts, job.task, job.key or "-", error)
            self.stdout.write(shown.rstrip())

    def show(self, options: dict[str, Any]) -> None:
        job = self.job(options["id"])
        for field in job._meta.concrete_fields:
            self.stdout.write(f"{field.name:12} {getattr(job, field.attname)}")

    def retry(self, options: dict[str, Any]) -> None:
        count = self.selected(options).retry(spread=options["spread"])
        self.stdout.write(f"{counted(count)} will run again.")
        if not count:
            self.stdout.write("Only dead and cancelled jobs, and those that back off, can.")

    def cancel(self, options: dict[str, Any]) -> None:
        self.stdout.write(f"{counted(self.selected(options).cancel())} cancelled.")

    def stats(self, options: dict[str, Any]) -> None:
        live = Job.objects.unfinished()
        self.stdout.write(f"{'QUEUE':12} {'STATE':10} JOBS")
        for row in live.values("queue", "state").annotate(n=Count("pk")).order_by("queue", "state"):
            self.stdout.write(f"{row['queue']:12} {row['state']:10} {row['n']}")
        dead = Job.objects.filter(finished_at__isnull=False, state=Job.State.DEAD)
        for found in dead.values("task").annotate(n=Count("pk")).order_by("-n")[:20]:
            self.stdout.write(f"dead         {found['task']:40} {found['n']}")
        late = live.aggregate(late=Now() - Min("due_at"))["late"]
        seconds = max(0.0, late.total_seconds()) if late else 0.0
        self.stdout.write(f"most overdue timer: {seconds:.1f} s")
        age = Job.objects.loop_age()
        told = "never" if age is None else f"{age:.1f} s ago"
        self.stdout.write(f"last pass of the loop: {told}")
        # Only workers import all tasks by themselves.
        current_app.loader.import_default_modules()
        for name, count in unknown_tasks().items():
            self.stdout.write(f"unknown task {name}: {count} jobs wait for it")
