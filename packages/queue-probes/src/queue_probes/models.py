"""What is known of queues and workers, each fact written by the process that knows it.

All times are the database's: ages are right though clocks differ.
"""

import math

from django.db import models
from django.db.models.functions import Now

# Upper bounds of the latency histogram, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, math.inf)


def no_latencies() -> list[int]:
    return [0] * len(BOUNDS)


class Queue(models.Model):
    """A queue, the probe that is on its way through it, and the last one that arrived."""

    name = models.CharField(primary_key=True, max_length=100)
    # Written by beat.
    seen_at = models.DateTimeField(null=True)
    depth = models.IntegerField(null=True)
    probe = models.UUIDField(null=True)
    outstanding_since = models.DateTimeField(null=True)
    sent_at = models.DateTimeField(null=True)
    sends = models.SmallIntegerField(default=0)
    failing_since = models.DateTimeField(null=True)
    failure = models.CharField(max_length=100, default="", blank=True)
    # Written by the worker that the probe reached.
    answered_at = models.DateTimeField(null=True)
    latency = models.FloatField(null=True)
    worker = models.CharField(max_length=200, default="", blank=True)
    release = models.CharField(max_length=100, default="", blank=True)
    answers = models.BigIntegerField(default=0)
    seconds = models.FloatField(default=0)
    buckets = models.JSONField(default=no_latencies)
    # Written by each worker of the queue when it has started tasks.
    moved_at = models.DateTimeField(null=True)
    # The incident people were told of: the state it began with.
    alarm = models.CharField(max_length=20, default="", blank=True)
    alarmed_at = models.DateTimeField(null=True)
    alarm_before = models.CharField(max_length=20, default="", blank=True)
    # Not while somebody is just telling people, or has died at it.
    told = models.BooleanField(default=True)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Node(models.Model):
    """A worker, as its main process describes itself every few seconds."""

    name = models.CharField(primary_key=True, max_length=200)
    queues = models.JSONField(default=list)
    pid = models.IntegerField()
    release = models.CharField(max_length=100, default="", blank=True)
    slots = models.IntegerField(default=0)
    active = models.IntegerField(default=0)
    # Processes of its pool that a signal has stopped: they start nothing, and end nothing.
    stopped = models.IntegerField(default=0, db_default=0)
    oldest_at = models.DateTimeField(null=True)
    # Its session at PostgreSQL, which ends with the process, but not when that is stopped.
    backend = models.IntegerField(null=True)
    started_at = models.DateTimeField(db_default=Now())
    seen_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Sample(models.Model):
    """The latency of one probe."""

    queue = models.CharField(max_length=100)
    at = models.DateTimeField(db_default=Now())
    latency = models.FloatField()

    class Meta:
        indexes = (models.Index("at", name="queue_probes_sample_at"),)

    def __str__(self) -> str:
        return f"{self.queue} {self.latency:.3f} s"


# Upper bounds of the histogram of durations, in seconds. The rows below count in this order: a
# migration that changes it deletes them.
DURATIONS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, math.inf)


def no_durations() -> list[int]:
    return [0] * len(DURATIONS)


class Finished(models.Model):
    """How many durable jobs of a task and a queue ended so; it outlives the jobs' own rows."""

    task = models.CharField(max_length=200)
    queue = models.CharField(max_length=100)
    state = models.CharField(max_length=10)
    count = models.BigIntegerField(default=0)
    attempts = models.BigIntegerField(default=0)
    # Of the last attempt, where the job ended by itself.
    seconds = models.FloatField(default=0)
    buckets = models.JSONField(default=no_durations)

    class Meta:
        constraints = (
            models.UniqueConstraint(
                fields=("task", "queue", "state"), name="queue_probes_finished_once"
            ),
        )

    def __str__(self) -> str:
        return f"{self.task} {self.queue} {self.state}: {self.count}"


class Watermark(models.Model):
    """One row: jobs that ended up to this instant are counted in `Finished`."""

    until = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return str(self.until)


class JobSample(models.Model):
    """How many durable jobs were unfinished, by state, and dead at the start of a minute."""

    at = models.DateTimeField(primary_key=True)
    counts = models.JSONField()

    def __str__(self) -> str:
        return f"{self.at:%Y-%m-%d %H:%M} {self.counts}"
