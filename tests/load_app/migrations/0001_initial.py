import django.db.models.functions
from django.db import migrations, models

now = django.db.models.functions.Now()
ID = models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")


class Migration(migrations.Migration):
    initial = True
    dependencies = []
    operations = [
        migrations.CreateModel(
            name="Wanted",
            fields=[
                ("id", ID),
                ("seconds", models.FloatField()),
                ("countdown", models.FloatField()),
                ("at", models.DateTimeField(db_default=now)),
            ],
        ),
        migrations.CreateModel(
            name="Effect",
            fields=[
                ("id", ID),
                ("wanted", models.IntegerField()),
                ("started", models.DateTimeField()),
                ("release", models.CharField(max_length=100)),
                ("at", models.DateTimeField(db_default=now)),
            ],
        ),
    ]
