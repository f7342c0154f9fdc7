"""Notes in the admin."""

from django.contrib import admin

from notes.models import Copy, Note


@admin.register(Note)
class NoteAdmin(admin.ModelAdmin):
    list_display = ("__str__", "copies_wanted", "created_at")
    search_fields = ("text",)


@admin.register(Copy)
class CopyAdmin(admin.ModelAdmin):
    list_display = ("__str__", "made_at")
    raw_id_fields = ("note",)
