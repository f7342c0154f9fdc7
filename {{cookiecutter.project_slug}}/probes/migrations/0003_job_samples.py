from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("probes", "0002_finished")]

    operations = [
        migrations.CreateModel(
            name="JobSample",
            fields=[
                ("at", models.DateTimeField(primary_key=True, serialize=False)),
                ("counts", models.JSONField()),
            ],
        ),
    ]
