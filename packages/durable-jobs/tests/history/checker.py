"""Holds recorded histories against the state machine; each check has a name."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from tests.history.machine import ANEW, ARROWS, COUNTED, FINISHED, RETURNED, SAME, UNFINISHED, Arrow
from tests.history.recorder import Body, Change

UNBOUNDED = 32_767
# Timers are compared with the clock of the trigger, which runs after the statement began.
TOLERANCE = timedelta(milliseconds=50)


class Fault(NamedTuple):
    """What no sound history holds."""

    check: str
    job: UUID | None
    told: str


def check(changes: Iterable[Change], bodies: Iterable[Body] = ()) -> list[Fault]:
    """Return every fault of the histories, in the order of the changes."""
    faults: list[Fault] = []
    ran = {(body.job, body.token): body for body in bodies}
    latest: dict[UUID | None, Change] = {}
    succeeded: dict[tuple[UUID | None, int], int] = defaultdict(int)
    for change in changes:
        if change.op == "T":
            latest.clear()
            continue
        before = latest.get(change.job)
        latest[change.job] = change
        if change.op == "D":
            continue
        faults += _row(change)
        if change.op == "U":
            faults += _step(change, before)
            faults += _fence(change, ran)
        if change.old["state"] == "running" and change.new["state"] == "succeeded":
            succeeded[change.job, change.new["token"]] += 1
            if succeeded[change.job, change.new["token"]] > 1:
                faults.append(Fault("one end", change.job, "two ends under one token"))
    return faults


def _row(change: Change) -> list[Fault]:
    """What holds of every row, whoever wrote it."""
    new, faults = change.new, []
    unfinished = new["state"] in UNFINISHED
    if unfinished != (new["due_at"] is not None) or unfinished == (new["finished_at"] is not None):
        faults.append(Fault("timer", change.job, f"{new['state']}, due {new['due_at']}"))
    if new["state"] not in (*UNFINISHED, *FINISHED):
        faults.append(Fault("state", change.job, new["state"]))
    waits = new["state"] in ("scheduled", "queued")
    spent = new["attempts"] >= new["max_attempts"] and new["max_attempts"] < UNBOUNDED
    if not 0 <= new["attempts"] <= new["max_attempts"] or (waits and spent):
        told = f"{new['attempts']} attempts of {new['max_attempts']}"
        faults.append(Fault("budget", change.job, told))
    return faults


def _step(change: Change, before: Change | None) -> list[Fault]:
    """What holds between a row and the one it was."""
    new, old, faults = change.new, change.old, []
    for name in ("state", "token", "attempts"):
        if before is not None and before.new[name] != old[name]:
            told = f"{name} was {before.new[name]} and is {old[name]}"
            faults.append(Fault("recorded", change.job, told))
    claimed = new["state"] == "running" and old["state"] != "running"
    if claimed != (new["token"] != old["token"]) or new["token"] < old["token"]:
        told = f"{old['state']} -> {new['state']}: token {old['token']} -> {new['token']}"
        faults.append(Fault("token", change.job, told))
    drawn = [
        arrow for arrow in ARROWS if (arrow.source, arrow.target) == (old["state"], new["state"])
    ]
    if not drawn:
        return [*faults, Fault("arrow", change.job, f"{old['state']} -> {new['state']}")]
    if not (
        counted := [arrow for arrow in drawn if _counts(arrow, old["attempts"], new["attempts"])]
    ):
        told = f"{old['state']} -> {new['state']}: attempts {old['attempts']} -> {new['attempts']}"
        return [*faults, Fault("attempts", change.job, told)]
    if not (
        kept := [arrow for arrow in counted if arrow.dirty in (None, old["dirty"] or new["dirty"])]
    ):
        told = f"{old['state']} -> {new['state']} of a job that was called again: {old['dirty']}"
        return [*faults, Fault("called again", change.job, told)]
    if all(arrow.late for arrow in kept) and old["due_at"] > change.at + TOLERANCE:
        told = f"{old['state']} -> {new['state']} {old['due_at'] - change.at} before its timer"
        faults.append(Fault("early", change.job, told))
    return faults


def _counts(arrow: Arrow, before: int, after: int) -> bool:
    return {
        SAME: after == before,
        COUNTED: after == min(before, UNBOUNDED - 2) + 1,
        RETURNED: after == before - 1,
        ANEW: after == 0,
    }[arrow.attempts]


def _fence(change: Change, ran: dict[tuple[UUID, int], Body]) -> list[Fault]:
    """Nobody but the run of the row's token ends or repeats it, and only after its body has ended.

    One that died, or was killed, may be noticed by others, who write what became of its job.
    """
    new, old = change.new, change.old
    body = ran.get((change.job, old["token"])) if change.job else None
    if body is None or old["state"] != "running" or new["state"] not in ("succeeded", "scheduled"):
        return []
    if body.end is None or body.killed:
        over = new["state"] == "scheduled"
    else:
        over = datetime.fromtimestamp(body.end, change.at.tzinfo) <= change.at
    told = f"{new['state']} under token {old['token']}, whose body still runs"
    return [] if over else [Fault("fence", change.job, told)]


def at_once(bodies: Iterable[Body], until: float) -> int:
    """Return how many of the bodies ran at once at the worst; one without an end ran `until`."""
    events = []
    for body in bodies:
        events += [(body.begin, 1), (until if body.end is None else body.end, -1)]
    running = most = 0
    for _, step in sorted(events):
        running += step
        most = max(most, running)
    return most
