from django.db import models
from django.db.models.functions import Now


class Wanted(models.Model):
    """A job that a request asked for: how long it takes, and how much later it is due."""

    seconds = models.FloatField()
    countdown = models.FloatField()
    at = models.DateTimeField(db_default=Now())


class Effect(models.Model):
    """That a job took effect; a second row of the same one is a second effect."""

    wanted = models.IntegerField()
    started = models.DateTimeField()
    release = models.CharField(max_length=100)
    at = models.DateTimeField(db_default=Now())
