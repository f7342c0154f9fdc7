"""What the tests of the notes share."""

import pytest

from durable_jobs.publisher import publisher
from notes.models import Note

FORM = {"text": "Keep me", "copies_wanted": 3, "seconds_per_copy": 0}


@pytest.fixture(autouse=True)
def developing(settings) -> None:
    settings.DEBUG = True


@pytest.fixture(autouse=True)
def own_publisher() -> None:
    """A publisher that remembers no other test's broker."""
    publisher.reset()


@pytest.fixture
def note() -> Note:
    return Note.objects.create(**FORM)
