"""The page of the notes: write one, ask for copies, watch them appear, hear of errors."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from django import forms
from django.conf import settings
from django.contrib.admin.views.decorators import staff_member_required
from django.db import transaction
from django.db.models import Prefetch
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe
from durable_jobs import Job

from notes.models import Note
from notes.tasks import ask_for_copies, make_copies

SHOWN = 10
View = Callable[..., HttpResponse]


class NoteForm(forms.ModelForm):
    class Meta:
        model = Note
        fields = ("text", "copies_wanted", "seconds_per_copy")
        widgets = {"text": forms.Textarea({"rows": 3, "placeholder": "Worth keeping"})}
        labels = {"text": "Note", "copies_wanted": "Copies", "seconds_per_copy": "Seconds per copy"}


def staff_in_production(view: View) -> View:
    """Let everybody in while developing, and only staff in production: it is an example."""
    for_staff = staff_member_required(view)

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        return (view if settings.DEBUG else for_staff)(request, *args, **kwargs)

    return guarded


@staff_in_production
def index(request: HttpRequest) -> HttpResponse:
    """Show the newest notes and a form; a POST saves a note and asks for its copies."""
    form = NoteForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        # Both or neither; whether the broker is there does not matter.
        with transaction.atomic():
            ask_for_copies(form.save())
        return redirect("notes:index")
    return render(request, "notes/index.html", {"form": form, "notes": Note.objects.all()[:SHOWN]})


@staff_in_production
@require_safe
def state(request: HttpRequest) -> JsonResponse:
    """Return what the page shows of the newest notes, by note: one answer for all of them."""
    # Seven days of them at most; a note has one at a time.
    jobs = Prefetch("jobs", Job.objects.filter(task=make_copies.name).order_by("pk"))
    notes = Note.objects.prefetch_related("copies", jobs)[:SHOWN]
    return JsonResponse({str(note.pk): describe(note) for note in notes})


def describe(note: Note) -> dict[str, object]:
    """Return the state of a note and of its newest job, in words."""
    job = next(reversed(note.jobs.all()), None)
    return {
        "wanted": note.copies_wanted,
        "made": [copy.number for copy in note.copies.all()],
        "job": words(job) if job else "",
        "failed": job is not None and job.state in (Job.State.DEAD, Job.State.CANCELLED),
    }


def words(job: Job) -> str:
    """Tell whoever asked for the work how it goes, and why it does not."""
    # The last line of a traceback, without the name of the exception.
    name, _, text = job.error.strip().rpartition("\n")[2].partition(": ")
    reason = text or name
    match job.state:
        case Job.State.RUNNING:
            return f"running, {job.progress} %"
        case Job.State.SCHEDULED if job.attempts and job.due_at:
            seconds = max(0, round((job.due_at - timezone.now()).total_seconds()))
            attempt = f"attempt {job.attempts + 1} of {job.max_attempts}"
            return f"failed, {attempt} in {seconds} s: {reason}"
        case Job.State.SCHEDULED | Job.State.QUEUED:
            return "waiting for a worker"
        case Job.State.DEAD:
            return f"failed for good: {reason}"
        case Job.State.CANCELLED:
            return reason
    return ""


@staff_in_production
@require_POST
def retry(request: HttpRequest, pk: int) -> HttpResponse:
    """Give the job of a note that failed or was cancelled another chance."""
    get_object_or_404(Note, pk=pk).jobs.filter(task=make_copies.name).retry()
    return redirect("notes:index")


@staff_in_production
@require_POST
def delete(request: HttpRequest, pk: int) -> HttpResponse:
    """Delete a note, its copies and its jobs; one that runs ends without another copy."""
    get_object_or_404(Note, pk=pk).delete()
    return redirect("notes:index")
