"""The protocol under every order of events that Hypothesis can think of; and mutants it must find.

PROTOCOL_EXAMPLES=5000 looks longer. A failure prints its steps, and `@reproduce_failure`.
"""

import os
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from durable_jobs import postgresql
from durable_jobs.heartbeat import heartbeat
from durable_jobs.publisher import publisher
from tests.protocol import Protocol, disconnect

pytestmark = pytest.mark.usefixtures("jobs_db")
EXAMPLES = int(os.environ.get("PROTOCOL_EXAMPLES", "150"))
COMMON = settings(
    database=None,
    deadline=None,
    derandomize=True,
    print_blob=True,
    stateful_step_count=50,
    suppress_health_check=list(HealthCheck),
)

TOKEN = "AND token = (%(tokens)s::int[])[array_position(%(ids)s, id)]"
SKIP = "FOR UPDATE SKIP LOCKED"
MUTANTS = {
    "a run that lost its job ends it": ("FINISH", TOKEN, ""),
    "a run that lost its job ends it, with others": ("FINISH_FREE", TOKEN, ""),
    "a run that lost its job fails it": ("FAIL", TOKEN, ""),
    "a run that lost its job hands it back": ("RELEASE", TOKEN, ""),
    "a run that lost its job renews it": ("RENEW", "AND job.token = pair.token", ""),
    "a run ends a job that was cancelled": ("FINISH_FREE", "AND state = 'running'", ""),
    "a run fails a job that has ended": ("FAIL", "AND state = 'running'", ""),
    "a claim does not change the token": ("CLAIM", "token = token + 1", "token = token"),
    "a claim is no attempt": ("CLAIM", "attempts = LEAST(attempts, 32765) + 1,", ""),
    "a claim takes what runs": ("CLAIM", "state = 'queued' OR", "state <> 'dead' OR"),
    "a claim leaves the mark of a call": ("CLAIM", "dirty = false,", ""),
    "a claim waits for a lock": ("CLAIM", SKIP, "FOR UPDATE"),
    "a claim along takes what failed": ("CLAIM_ALONG", "state = 'queued' OR", "true OR"),
    "an end forgets a call made meanwhile": ("FINISH_FREE", "WHEN dirty", "WHEN false"),
    "a failure forgets a call made meanwhile": ("FAIL", "WHEN dirty", "WHEN false"),
    "a failure keeps the timer of a dead job": ("FAIL", "WHEN NOT (", "WHEN true OR NOT ("),
    "a call does not mark a running job": ("UPSERT", "OR job.state = 'running'", ""),
    "a call while it waits keeps old arguments": ("UPSERT", "args = excluded.args,", ""),
    "a call keeps an older one's end": ("UPSERT", "expires_at = excluded.expires_at,", ""),
    "the loop rescues for ever": ("FIRE", "attempts >= max_attempts", "attempts > max_attempts"),
    "the loop buries a call made meanwhile": ("FIRE", "AND NOT dirty", ""),
    "the loop waits for a lock": ("FIRE", SKIP, "FOR UPDATE"),
    "the loop rescues nobody": ("FIRE", "due_at <=", "token = 0 AND due_at <="),
    "a lost child costs no attempt limit": ("LOSE", "attempts >=", "attempts > 9 +"),
    "handing back is an attempt": ("RELEASE", "attempts = attempts - 1", "attempts = attempts + 1"),
    "a stop takes others' jobs": ("RELEASE_BOOT", "state LIKE 'running%%'", "state <> 'x'"),
}  # fmt: skip

# The model or the table's own constraint stops these before a wrong row is committed, or what is
# wrong stands in no row: who waited, what the arguments were, that nothing happened.
UNSEEN = {
    "a run ends a job that was cancelled",
    "a run fails a job that has ended",
    "the loop waits for a lock",
    "a run that lost its job fails it",
    "a run that lost its job hands it back",
    "a run that lost its job renews it",
    "a claim takes what runs",
    "a claim leaves the mark of a call",
    "a claim waits for a lock",
    "an end forgets a call made meanwhile",
    "a failure forgets a call made meanwhile",
    "a failure keeps the timer of a dead job",
    "a call does not mark a running job",
    "a call while it waits keeps old arguments",
    "a call keeps an older one's end",
    "the loop rescues nobody",
}

# What a search by chance comes to late: the same machine, in this order.
CALL, TAKE, AGAIN, LATER = ("enqueue", "a", True, 0, None), ("deliver", 0, 0), (
    "call_again_what_runs", True), [("wait", 100), ("loop",), ("wait", 5)]  # fmt: skip
STORIES = [
    [CALL, TAKE, AGAIN, ("fail", 0, True)],
    [CALL, TAKE, AGAIN, ("succeed_together", 0)],
    [("enqueue", "a", True, 0, 50), CALL, *LATER],
    [CALL, *[TAKE, ("fail", 0, False), *LATER] * 3],
    [CALL, *[TAKE, ("crash", 0), *LATER] * 3],
    [CALL, TAKE, ("crash", 0), *LATER, TAKE, AGAIN, ("crash", 0), *LATER],
    [CALL, *[TAKE, ("lose_a_child_and_notice", 0), *LATER] * 3],
    [CALL, *[TAKE, ("hand_back", 0), *LATER] * 4],
    [CALL, TAKE, ("fail", 0, False), ("stop_cold", 0), ("stop_cold", 0)],
    *[
        [CALL, TAKE, ("take_over",), ("write_late", 1, how)]
        for how in ("succeed", "finish", "fail", "renew", "release")
    ],
]


def tell(story):
    machine = Protocol()
    machine.begin()
    for name, *arguments in story:
        getattr(machine, name)(*arguments)
        machine.every_row_is_sound()
        machine.nothing_takes_effect_twice()
    machine.teardown()


def search(how):
    for story in STORIES:
        tell(story)
    run_state_machine_as_test(Protocol, settings=how)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(publisher, "send", list)
    monkeypatch.setattr(publisher, "later", lambda hints, seconds: None)
    with heartbeat.by_hand():
        yield
    heartbeat.runs.clear()
    disconnect()


@pytest.mark.parametrize("number", range(len(STORIES)))
def test_a_story_ends_well(number):
    tell(STORIES[number])


def test_no_order_of_events_loses_a_job_or_takes_effect_twice():
    run_state_machine_as_test(Protocol, settings=settings(COMMON, max_examples=EXAMPLES))


@pytest.mark.faults
@pytest.mark.unsound
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_the_protocol_is_found(mutant, monkeypatch, history):
    name, text, instead = MUTANTS[mutant]
    statement = getattr(postgresql, name)
    assert text in statement
    monkeypatch.setattr(postgresql, name, statement.replace(text, instead))
    bounded = settings(COMMON, max_examples=1000, phases=[Phase.generate])
    with pytest.raises(Exception) as found:  # noqa: PT011 - an invariant, or the database's own
        search(bounded)
    for story in STORIES:  # the model stops at the first fault, and a history goes on
        with suppress(Exception):
            tell(story)
    checks = {fault.check for fault in history()}
    told = ", ".join(sorted(checks)) or "nothing in a history"
    print(f"{mutant}: {told}; model: {str(found.value)[:80]!r}")
    assert checks or mutant in UNSEEN
