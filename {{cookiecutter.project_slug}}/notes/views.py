"""The page of the notes: write one, ask for copies, watch them appear."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.admin.views.decorators import staff_member_required
from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST, require_safe
from kombu.exceptions import OperationalError

from notes.forms import NoteForm
from notes.models import Note
from notes.tasks import enqueue_missing

SHOWN = 10
View = Callable[..., HttpResponse]


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
        with transaction.atomic():
            note = form.save()
            # after the commit: a worker could look for the note before it is there
            transaction.on_commit(lambda: _ask_for_copies(request, note))
        return redirect("notes:index")
    return render(request, "notes/index.html", {"form": form, "notes": Note.objects.all()[:SHOWN]})


@staff_in_production
@require_safe
def state(request: HttpRequest) -> JsonResponse:
    """Return `{note id: {"wanted": int, "made": [numbers]}}` for the newest notes."""
    notes = Note.objects.prefetch_related("copies")[:SHOWN]
    return JsonResponse(
        {
            str(note.pk): {
                "wanted": note.copies_wanted,
                "made": [copy.number for copy in note.copies.all()],
            }
            for note in notes
        }
    )


@staff_in_production
@require_POST
def resume(request: HttpRequest, pk: int) -> HttpResponse:
    """Ask again for the copies that a note still lacks."""
    _ask_for_copies(request, get_object_or_404(Note, pk=pk))
    return redirect("notes:index")


@staff_in_production
@require_POST
def delete(request: HttpRequest, pk: int) -> HttpResponse:
    """Delete a note and its copies; tasks that are still queued for it will find nothing to do."""
    get_object_or_404(Note, pk=pk).delete()
    return redirect("notes:index")


def _ask_for_copies(request: HttpRequest, note: Note) -> None:
    try:
        number = enqueue_missing(note)
    except OperationalError:
        messages.error(
            request,
            "Saved, but the broker cannot be reached: press “Make missing copies” later.",
        )
    else:
        messages.success(request, f"{number} copies asked for.")
