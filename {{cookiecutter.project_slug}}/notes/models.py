"""Notes, and the copies that people ask for.

What should be true is a fact in the database (`Note.copies_wanted`); the copies that exist are
another. The difference is the work left to do, whatever became of the jobs about it.
"""

from django.contrib.contenttypes.fields import GenericRelation
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Count, F, Q
from durable_jobs import Job


class NoteQuerySet(models.QuerySet["Note"]):
    def lacking_copies(self) -> "NoteQuerySet":
        """Return the notes that are not as they should be."""
        # Each tick asks this: a table of millions wants a column for it, with a partial index.
        wanted = Q(copies__number__lte=F("copies_wanted"))
        made = self.annotate(made=Count("copies", filter=wanted))
        return made.filter(made__lt=F("copies_wanted"))


class Note(models.Model):
    """A text, and how many copies of it somebody asked for."""

    text = models.TextField(max_length=2_000)
    copies_wanted = models.PositiveIntegerField(
        default=10, validators=[MinValueValidator(1), MaxValueValidator(1_000)]
    )
    seconds_per_copy = models.FloatField(
        default=0.5,
        validators=[MinValueValidator(0), MaxValueValidator(60)],
        help_text="How long a worker takes for one copy: time to kill it in the middle.",
    )
    created_at = models.DateTimeField(auto_now_add=True)
    # Whoever deletes a note deletes its jobs in the same transaction; a running one is fenced off.
    jobs = GenericRelation(Job, "owner_id", "owner_type")

    objects = NoteQuerySet.as_manager()

    class Meta:
        ordering = ("-pk",)

    def __str__(self) -> str:
        return self.text[:50]

    def missing(self) -> list[int]:
        """Return the numbers, from 1, of the copies that were asked for and do not exist."""
        made = set(self.copies.values_list("number", flat=True))
        return [number for number in range(1, self.copies_wanted + 1) if number not in made]


class Copy(models.Model):
    """One copy of a note. The constraint is what makes a second run of its task harmless."""

    note = models.ForeignKey(Note, on_delete=models.CASCADE, related_name="copies")
    number = models.PositiveIntegerField()
    text = models.TextField()
    made_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("number",)
        verbose_name_plural = "copies"
        constraints = (
            models.UniqueConstraint(fields=("note", "number"), name="one_copy_per_number"),
        )

    def __str__(self) -> str:
        return f"copy {self.number} of note {self.note_id}"
