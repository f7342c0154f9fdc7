"""Forms of the notes."""

from django import forms

from notes.models import Note


class NoteForm(forms.ModelForm):
    class Meta:
        model = Note
        fields = ("text", "copies_wanted", "seconds_per_copy")
        widgets = {"text": forms.Textarea({"rows": 3, "placeholder": "Worth keeping"})}
        labels = {"text": "Note", "copies_wanted": "Copies", "seconds_per_copy": "Seconds per copy"}
