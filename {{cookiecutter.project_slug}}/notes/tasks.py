"""The background work of the notes."""

import logging
import time

from celery import shared_task
from django.db import transaction

from notes.models import Copy, Note

logger = logging.getLogger(__name__)


@shared_task(name="notes.make_copy", default_retry_delay=5)
def make_copy(note_id: int, number: int) -> None:
    """Make copy `number` of a note, once, however often this runs.

    It is sent an id and reads the note itself: the text may have changed since, and a note that
    was deleted meanwhile leaves nothing to do.
    """
    note = Note.objects.filter(pk=note_id).first()
    if note is None:
        logger.info("note %s is gone, so is the need for its copy %s", note_id, number)
        return
    time.sleep(note.seconds_per_copy)
    with transaction.atomic():
        # locked, so that nobody deletes the note between this look and the insert
        if note := Note.objects.select_for_update(no_key=True).filter(pk=note_id).first():
            Copy.objects.get_or_create(note=note, number=number, defaults={"text": note.text})


def enqueue_missing(note: Note) -> int:
    """Send a task for each copy that is missing; return their number.

    Raises `kombu.exceptions.OperationalError` when the broker cannot be reached.
    """
    numbers = note.missing()
    for number in numbers:
        make_copy.delay(note.pk, number)
    return len(numbers)
