from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("probes", "0003_job_samples"),
    ]

    operations = [
        migrations.AddField(
            model_name="node",
            name="stopped",
            field=models.IntegerField(db_default=0, default=0),
        ),
    ]
