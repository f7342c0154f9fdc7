"""The background work of the notes: one durable job per note, which makes what the note lacks."""

import time
from typing import Any

from celery import shared_task
from django.db import transaction
from durable_jobs import Permanent, enqueue_for, reconciler

from notes.models import Copy, Note

# A run ends with the first copy after this: long before the time limit, soon when a worker stops.
RUN_SECONDS = 30


# The queryset finds notes whose job was never asked for: changed by SQL, restored from a backup.
@reconciler(lambda: Note.objects.lacking_copies())
@shared_task(bind=True, name="notes.make_copies")
def make_copies(self: Any, note_id: int) -> None:
    """Make the copies that a note lacks, however often this runs and wherever it is interrupted.

    It is given an id and reads the rest when it runs: the text or the number may have changed, and
    a note that was deleted meanwhile leaves nothing to do.
    """
    until = time.monotonic() + RUN_SECONDS
    note = Note.objects.filter(pk=note_id).first()
    if note is None:
        return
    for number in note.missing():
        time.sleep(note.seconds_per_copy)
        if not make_copy(note_id, number):
            return
        # Raises LeaseLost when the job was cancelled, or given to another worker.
        self.job.checkpoint(number, note.copies_wanted)
        if time.monotonic() > until:
            # The key is this job's own, so this is not a second job: it runs once more.
            ask_for_copies(note)
            return


def make_copy(note_id: int, number: int) -> bool:
    """Make one copy unless it exists; return whether the note still does.

    The note is locked, so that nobody deletes it between this look and the insert.
    """
    with transaction.atomic():
        note = Note.objects.select_for_update(no_key=True).filter(pk=note_id).first()
        if note is None:
            return False
        if note.text.lower().startswith("do not copy"):
            raise Permanent("the note says that it must not be copied")
        Copy.objects.get_or_create(note=note, number=number, defaults={"text": note.text})
    return True


def ask_for_copies(note: Note) -> None:
    """Enqueue the job of a note, in the caller's transaction; one that waits already is enough."""
    enqueue_for(make_copies, note)
