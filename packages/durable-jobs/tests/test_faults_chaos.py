"""All faults at once, at random; `CHAOS_SEED` and `CHAOS_SECONDS` choose another storm."""

import os
import secrets

import pytest

from durable_jobs.models import Job
from tests import chaos

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.faults]
FAULTS = (
    "broker flushed",
    "child killed",
    "connections cut",
    "loop killed",
    "worker frozen",
    "worker killed",
)


def test_a_storm_of_all_faults_loses_no_job_and_doubles_no_atomic_effect(jobs_db, broker, tmp_path):
    seed = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(100_000))
    print(f"CHAOS_SEED={seed}")
    records = chaos.run(tmp_path, seed, float(os.environ.get("CHAOS_SECONDS") or 20))
    for record in records:
        print(record)
    atomic, at_least_once, plain = records
    assert all(f"{fault} x" in atomic["fault"] for fault in FAULTS)
    assert atomic["wanted"] == at_least_once["wanted"] == plain["wanted"] == 150
    assert (atomic["lost"], atomic["twice"]) == (0, 0)
    assert at_least_once["lost"] == 0
    assert set(Job.objects.values_list("state", flat=True)) == {Job.State.SUCCEEDED}
    # The faults met jobs, not only idle processes.
    assert Job.objects.filter(token__gt=1).count() >= 5
