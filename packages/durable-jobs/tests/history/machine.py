"""The state machine of a job in data, as the checker reads it."""

from dataclasses import dataclass

UNFINISHED = ("scheduled", "queued", "running")
FINISHED = ("succeeded", "dead", "cancelled")
SAME, COUNTED, RETURNED, ANEW = "same", "+1", "-1", "0"


@dataclass(frozen=True)
class Arrow:
    """A change of a row: who makes it, between which states, and what becomes of the attempts.

    `late`: only after the row's timer has fired. `dirty`: only where the key was called again
    meanwhile, or only where it was not.
    """

    verb: str
    source: str
    target: str
    attempts: str = SAME
    late: bool = False
    dirty: bool | None = None


ARROWS = (
    Arrow("enqueue", "", "queued", ANEW),
    Arrow("enqueue", "", "scheduled", ANEW),
    Arrow("claim", "queued", "running", COUNTED),
    Arrow("claim", "scheduled", "running", COUNTED, late=True),
    Arrow("renew", "running", "running"),
    Arrow("call again", "running", "running", dirty=True),
    Arrow("call again", "queued", "queued"),
    Arrow("call again", "scheduled", "scheduled"),
    Arrow("call again", "scheduled", "queued", ANEW),
    Arrow("call again", "queued", "queued", ANEW),
    Arrow("call again", "queued", "scheduled", ANEW),
    Arrow("call again", "scheduled", "scheduled", ANEW),
    Arrow("finish", "running", "succeeded", dirty=False),
    Arrow("finish", "running", "queued", ANEW, dirty=True),
    Arrow("fail", "running", "scheduled"),
    Arrow("fail", "running", "dead", dirty=False),
    Arrow("fail", "running", "queued", ANEW, dirty=True),
    Arrow("release", "running", "scheduled", RETURNED),
    Arrow("tick", "scheduled", "queued", late=True),
    Arrow("tick", "queued", "queued", late=True),
    Arrow("lose", "running", "queued", late=True),
    Arrow("lose", "running", "queued", ANEW, late=True, dirty=True),
    Arrow("lose", "running", "dead", late=True, dirty=False),
    Arrow("lose child", "running", "scheduled"),
    Arrow("lose child", "running", "dead", dirty=False),
    Arrow("lose child", "running", "queued", ANEW, dirty=True),
    Arrow("expire", "scheduled", "cancelled", late=True),
    Arrow("expire", "queued", "cancelled", late=True),
    Arrow("cancel", "scheduled", "cancelled"),
    Arrow("cancel", "queued", "cancelled"),
    Arrow("cancel", "running", "cancelled"),
    Arrow("retry", "dead", "scheduled", ANEW),
    Arrow("retry", "cancelled", "scheduled", ANEW),
    Arrow("retry", "scheduled", "scheduled"),
    # A finished row may be written to, by an operator or a test that moves time; it moves nowhere.
    *(Arrow("keep", state, state) for state in FINISHED),
)
