"""What the rows say becomes a verdict; test_faults.py causes the same with real processes."""

from datetime import timedelta

import pytest
from django.core.checks import run_checks
from django.db.models.functions import Now
from django.test import Client

from queue_probes import probe
from queue_probes.models import Node, Queue
from tests.conftest import states

pytestmark = pytest.mark.django_db(transaction=True)
HANGS = {"active": 1}
IDLE = {"active": 0}
STOPPED = {"active": 1, "stopped": 1}


def ago(seconds):
    return Now() - timedelta(seconds=seconds)


def state(settings, idle, *workers):
    """Return the state of a queue whose workers started nothing for so many seconds."""
    settings.QUEUE_PROBES = {"QUEUES": ["mail"]}
    Queue.objects.create(name="mail")
    Queue.objects.update(seen_at=Now(), outstanding_since=ago(max(idle, 31)), moved_at=ago(idle))
    for number, worker in enumerate(workers):
        name = f"w{number}"
        Node.objects.create(name=name, queues=["mail"], pid=1, slots=1, seen_at=Now(), **worker)
    Node.objects.filter(active=1).update(oldest_at=ago(idle))
    return states()["mail"]


@pytest.mark.parametrize(
    ("idle", "workers", "expected"),
    [
        (5, [HANGS], "busy"),
        (85, [HANGS], "busy"),
        (95, [HANGS], "full"),
        (95, [HANGS, HANGS], "full"),
        (95, [HANGS, IDLE], "wedged"),  # the probe may wait in the first, not the one sent again
        (85, [HANGS, IDLE], "busy"),
        (35, [STOPPED], "wedged"),
        (35, [IDLE], "wedged"),
        (25, [STOPPED], "busy"),
        (330, [HANGS], "wedged"),  # beyond the time limit, which should have ended it
    ],
)
def test_a_queue_whose_workers_start_nothing(settings, idle, workers, expected):
    assert state(settings, idle, *workers) == expected


def test_full_says_for_how_long_and_is_a_fault(settings):
    assert state(settings, 95, HANGS) == "full"
    answer = Client().get("/healthz/queues")
    assert answer.status_code == 503
    queue = answer.json()["queues"]["mail"]
    assert queue["oldest"] >= 95
    assert f"the oldest for {queue['oldest']:.0f} s; none starts" in queue["words"]


def test_a_queue_with_a_wrong_name_is_named_and_harms_no_other(settings):
    settings.QUEUE_PROBES = {"QUEUES": ["default", "extra"]}
    [error] = [found for found in run_checks() if found.id == "queue_probes.E001"]
    assert "'extra'" in error.msg
    for _ in range(2):
        probe.visit()
        assert states() == {"default": "ok", "extra": "unknown"}
    assert Queue.objects.get(name="default").outstanding_since
