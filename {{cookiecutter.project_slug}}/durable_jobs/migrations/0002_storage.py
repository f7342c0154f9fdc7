"""PostgreSQL: leave room for updates in place, and vacuum a queue's table as often as it needs."""

from django.db import migrations

STORAGE = """ALTER TABLE durable_jobs_job SET (fillfactor = 85, autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0)"""
RESET = """ALTER TABLE durable_jobs_job RESET (fillfactor, autovacuum_vacuum_scale_factor,
    autovacuum_vacuum_threshold, autovacuum_vacuum_cost_delay)"""


def tune(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute(STORAGE)


def untune(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute(RESET)


class Migration(migrations.Migration):
    dependencies = [("durable_jobs", "0001_initial")]
    operations = [migrations.RunPython(tune, untune)]
