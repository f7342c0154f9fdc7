"""All tables, as models.py explains them."""

from django.db import migrations, models
from django.db.models.functions import Now

from queue_probes.models import no_durations, no_latencies


def key() -> models.Field:
    return models.BigAutoField(
        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
    )


def word(length: int) -> models.Field:
    return models.CharField(max_length=length, default="", blank=True)


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            "Queue",
            [
                ("name", models.CharField(max_length=100, primary_key=True, serialize=False)),
                ("seen_at", models.DateTimeField(null=True)),
                ("depth", models.IntegerField(null=True)),
                ("probe", models.UUIDField(null=True)),
                ("outstanding_since", models.DateTimeField(null=True)),
                ("sent_at", models.DateTimeField(null=True)),
                ("sends", models.SmallIntegerField(default=0)),
                ("failing_since", models.DateTimeField(null=True)),
                ("failure", word(100)),
                ("answered_at", models.DateTimeField(null=True)),
                ("latency", models.FloatField(null=True)),
                ("worker", word(200)),
                ("release", word(100)),
                ("answers", models.BigIntegerField(default=0)),
                ("seconds", models.FloatField(default=0)),
                ("buckets", models.JSONField(default=no_latencies)),
                ("moved_at", models.DateTimeField(null=True)),
                ("alarm", word(20)),
                ("alarmed_at", models.DateTimeField(null=True)),
                ("alarm_before", word(20)),
                ("told", models.BooleanField(default=True)),
            ],
            {"ordering": ("name",)},
        ),
        migrations.CreateModel(
            "Node",
            [
                ("name", models.CharField(max_length=200, primary_key=True, serialize=False)),
                ("queues", models.JSONField(default=list)),
                ("pid", models.IntegerField()),
                ("release", word(100)),
                ("slots", models.IntegerField(default=0)),
                ("active", models.IntegerField(default=0)),
                ("stopped", models.IntegerField(default=0, db_default=0)),
                ("oldest_at", models.DateTimeField(null=True)),
                ("backend", models.IntegerField(null=True)),
                ("started_at", models.DateTimeField(db_default=Now())),
                ("seen_at", models.DateTimeField(db_default=Now())),
            ],
            {"ordering": ("name",)},
        ),
        migrations.CreateModel(
            "Sample",
            [
                ("id", key()),
                ("queue", models.CharField(max_length=100)),
                ("at", models.DateTimeField(db_default=Now())),
                ("latency", models.FloatField()),
            ],
            {"indexes": [models.Index(models.F("at"), name="queue_probes_sample_at")]},
        ),
        migrations.CreateModel(
            "Finished",
            [
                ("id", key()),
                ("task", models.CharField(max_length=200)),
                ("queue", models.CharField(max_length=100)),
                ("state", models.CharField(max_length=10)),
                ("count", models.BigIntegerField(default=0)),
                ("attempts", models.BigIntegerField(default=0)),
                ("seconds", models.FloatField(default=0)),
                ("buckets", models.JSONField(default=no_durations)),
            ],
            {
                "constraints": [
                    models.UniqueConstraint(
                        fields=("task", "queue", "state"), name="queue_probes_finished_once"
                    )
                ]
            },
        ),
        migrations.CreateModel(
            "Watermark", [("id", key()), ("until", models.DateTimeField(db_default=Now()))]
        ),
        migrations.CreateModel(
            "JobSample",
            [
                ("at", models.DateTimeField(primary_key=True, serialize=False)),
                ("counts", models.JSONField()),
            ],
        ),
    ]
