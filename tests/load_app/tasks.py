import os
import time

from celery import shared_task
from django.db import connection
from load_app.models import Effect


@shared_task
def work(wanted: int, seconds: float) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        (started,) = cursor.fetchone()
    time.sleep(seconds)
    Effect.objects.create(wanted=wanted, started=started, release=os.environ["RELEASE"])
