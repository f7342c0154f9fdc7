"""The job protocol as a state machine: callers, workers that crash, the loop, operators, and time.

Each actor has a connection of its own and goes through the app's own code. Time passes by moving
the instants in the rows, so that no step waits. What must hold is checked after every step; at the
end a healthy worker and the loop have to bring every job to its end. Over 400 lines, since
Hypothesis wants a state machine to be one class.
"""

# ruff: noqa: S608 - the only thing put into statements here is the name of our own table
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

from celery import current_app
from django.db import connections, transaction
from django.db.models import F
from django.db.models.functions import Now
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from durable_jobs import Job, attempt, transitions
from durable_jobs.enqueue import Call
from durable_jobs.exceptions import LeaseLost
from durable_jobs.heartbeat import heartbeat
from durable_jobs.ids import uuid7
from durable_jobs.reconcile import fire_timers
from durable_jobs.slices import claim
from tests import tasks
from tests.conftest import effects
from tests.history import recorder

State = Job.State
MAX_ATTEMPTS = 2
WORKERS = range(2)
worker = st.sampled_from(WORKERS)
which = st.integers(0, 20)
_at_hand = {}


def connected(name):
    """Return the connection of that actor; whoever waits for a lock on it fails."""
    if name not in _at_hand:
        connection = connections["default"].copy()
        connection.settings_dict["OPTIONS"] = {"options": "-c lock_timeout=1000"}
        _at_hand[name] = connection
    return _at_hand[name]


def disconnect():
    while _at_hand:
        _at_hand.popitem()[1].close()


@contextmanager
def acting(name):
    """Let the code of the app use that actor's connection."""
    usual = connections["default"], attempt.holder
    connections["default"] = connected(name)
    attempt.holder = lambda: f"host/boot{name}/1"
    try:
        yield
    finally:
        connections["default"], attempt.holder = usual


@dataclass
class Asked:
    """What a caller was promised of a job."""

    args: list
    # A run under this token, or an older one, began before the last call for it.
    token: int = 0
    generations: int = 1
    cancellable: bool = False
    pruned: bool = False


@dataclass
class Seen:
    token: int = 0
    ended: set = field(default_factory=set)


class Protocol(RuleBasedStateMachine):
    """Two workers, any number of callers."""

    @initialize()
    def begin(self):
        with connections["default"].cursor() as cursor:
            cursor.execute(f"TRUNCATE durable_jobs_job, {tasks.TABLE}")
        heartbeat.runs.clear()
        self.task = current_app.tasks[tasks.noop.name]
        self.number = 0
        self.asked = {}
        self.seen = {}
        self.held = {name: [] for name in WORKERS}
        self.stale = []

    # Callers

    @rule(
        key=st.sampled_from([None, "a", "b"]),
        rerun=st.booleans(),
        delay=st.sampled_from([0, 0, 30]),
        expires=st.sampled_from([None, None, None, 50]),
    )
    def enqueue(self, key, rerun, delay, expires):
        self.number += 1
        call = Call(self.task.name, MAX_ATTEMPTS, uuid7(), f"[{self.number}]", queue="default")
        call.key, call.rerun, call.delay, call.expires = key, rerun, delay, expires
        with acting("caller"), transaction.atomic():
            job = call.insert()
        row = self.row(job)
        if job not in self.asked:
            self.asked[job] = Asked([self.number], cancellable=bool(expires))
        elif rerun:
            asked = self.asked[job]
            asked.args, asked.token, asked.cancellable = [self.number], row.token, bool(expires)
            asked.generations += row.state == State.RUNNING

    @precondition(lambda self: any(self.held.values()))
    @rule(rerun=st.booleans())
    def call_again_what_runs(self, rerun):
        run = next(run for runs in self.held.values() for run in runs)
        row = self.row(run.id)
        if row and row.key:
            self.enqueue(row.key, rerun, 0, None)

    @rule(key=st.sampled_from([None, "a"]))
    def enqueue_and_roll_back(self, key):
        call = Call(self.task.name, MAX_ATTEMPTS, uuid7(), "[0]", key=key, queue="default")
        before = self.rows()
        with acting("caller"), transaction.atomic():
            call.insert()
            transaction.set_rollback(True)
        assert self.rows() == before

    # Workers

    @precondition(lambda self: self.asked)
    @rule(name=worker, first=which)
    def deliver(self, name, first):
        """Deliver a hint, be it the first, a duplicate or one of a job that has ended."""
        self.claims(name, first, 1, alone=True)

    @precondition(lambda self: self.asked)
    @rule(name=worker, first=which)
    def deliver_many(self, name, first):
        self.claims(name, first, 3)

    @precondition(lambda self: self.asked)
    @rule(name=worker, first=which)
    def deliver_in_a_backlog(self, name, first):
        self.claims(name, first, 1, along=3)

    def claims(self, name, first, count, **how):
        jobs = sorted(self.asked)
        first %= len(jobs)
        before = self.rows()
        with acting(name):
            runs = claim(self.task, jobs[first : first + count], queue="default", **how)
        for run in runs:
            assert how.get("alone") or not before[run.id].attempts, "it drags others down"
        for run in runs:
            recorder.note("+", run, self.task.name)
        self.held[name] += runs
        self.stale += runs

    @precondition(lambda self: self.held[0])
    @rule()
    def take_over(self):
        """The first worker is paused for longer than its lease, and the second gets its job."""
        job = self.held[0][0].id
        Job.objects.filter(pk=job, state=State.RUNNING).update(due_at=Now())
        self.loop()
        self.deliver(1, sorted(self.asked).index(job))

    @rule(name=worker)
    def succeed(self, name):
        for run in self.take(name):
            with self.fenced(run), acting(name):
                self.effect(run)

    @rule(name=worker)
    def succeed_together(self, name):
        runs = self.take(name, all_of_them=True)
        if runs:
            with self.fenced(*runs), acting(name):
                self.ended(runs, transitions.finish(runs))

    @rule(name=worker, final=st.booleans())
    def fail(self, name, final):
        for run in self.take(name):
            with self.fenced(run), acting(name):
                self.end_badly(run, final=final)

    @rule(name=worker)
    def hand_back(self, name):
        for run in self.take(name):
            with self.fenced(run), acting(name):
                transitions.release([run])

    @rule(name=worker)
    def stay_alive(self, name):
        runs = self.held[name]
        if runs:
            with acting(name):
                self.renew(runs)

    @rule(name=worker)
    def crash(self, name):
        self.dies(name)

    @rule(name=worker)
    def lose_a_child_and_notice(self, name):
        self.dies(name)
        with acting("main"):
            transitions.lose(f"host/boot{name}/1", "lost")

    @rule(name=worker)
    def stop_cold(self, name):
        self.dies(name)
        with acting("main"), patch.object(attempt, "boot", lambda: f"host/boot{name}"):
            transitions.release_boot()

    @precondition(lambda self: self.stale)
    @rule(index=which, how=st.sampled_from(["succeed", "finish", "fail", "renew", "release"]))
    def write_late(self, index, how):
        """A run that crashed, was fenced off or has ended long ago writes (once more)."""
        run = self.stale[-1 - index % len(self.stale)]
        recorder.note("-", run, self.task.name)
        with self.fenced(run), acting("zombie"):
            if how == "succeed":
                self.effect(run)
            elif how == "finish":
                self.ended([run], transitions.finish([run], wait=True))
            elif how == "renew":
                self.renew([run])
            elif how == "release":
                transitions.release([run])
            else:
                self.end_badly(run, final=False)

    # The loop, operators, and time

    @rule()
    def loop(self):
        with acting("loop"):
            fire_timers()

    @rule(seconds=st.sampled_from([5, 35, 100]))
    def wait(self, seconds):
        span = f"interval '{seconds}s'"
        with connections["default"].cursor() as cursor:
            cursor.execute(
                f"UPDATE durable_jobs_job SET due_at = due_at - {span}, expires_at = expires_at -"
                f" {span}, queued_at = queued_at - {span}, finished_at = finished_at - {span}"
            )

    @rule(index=which)
    def cancel(self, index):
        if self.asked:
            job = sorted(self.asked)[index % len(self.asked)]
            with acting("operator"):
                if Job.objects.filter(pk=job).cancel():
                    self.asked[job].cancellable = True

    @rule()
    def retry_all(self):
        ended = {job for job, row in self.rows().items() if row.due_at is None}
        with acting("operator"):
            Job.objects.all().retry()
        for job, row in self.rows().items():
            if job in ended and row.due_at is not None:
                self.asked[job].generations += 1

    @rule()
    def prune(self):
        with connections["default"].cursor() as cursor:
            cursor.execute("UPDATE durable_jobs_job SET finished_at = '2001-01-01' WHERE state <>"
                           " 'dead' AND finished_at IS NOT NULL")  # fmt: skip
        with acting("operator"):
            Job.objects.prune()
        for job in set(self.asked) - set(self.rows()):
            self.asked[job].pruned = True

    @rule(index=which, name=worker)
    def nobody_waits_for_a_row_in_an_open_transaction(self, index, name):
        """A user's transaction holds a row; who may not wait for it passes by."""
        if not self.asked:
            return
        job = sorted(self.asked)[index % len(self.asked)]
        user = connected("user")
        user.set_autocommit(False)
        try:
            with user.cursor() as cursor:
                cursor.execute(
                    "SELECT token, state FROM durable_jobs_job WHERE id = %s FOR UPDATE", [job]
                )
                before = self.row(job)
                runs = [run for run in self.held[name] if run.id == job]
                with acting(name):
                    assert claim(self.task, [job], alone=True) == []
                    if runs:
                        self.renew(runs)
                        assert transitions.finish(runs) == set()
                        transitions.release(runs)
                with acting("loop"):
                    fire_timers()
                assert self.row(job) == before
        finally:
            user.rollback()
            user.set_autocommit(True)

    # What must hold

    @invariant()
    def every_row_is_sound(self):
        rows = self.rows()
        keys = [row.key for row in rows.values() if row.key and row.due_at]
        assert len(keys) == len(set(keys)), "two unfinished jobs have one key"
        for job, asked in self.asked.items():
            row = rows.get(job)
            assert (row is None) == asked.pruned, "a job is forgotten"
            if row is None:
                continue
            unfinished = row.state in {State.SCHEDULED, State.QUEUED, State.RUNNING}
            assert unfinished == (row.due_at is not None) == (row.finished_at is None)
            seen = self.seen.setdefault(job, Seen())
            assert row.token >= seen.token, "a token went backwards"
            seen.token = row.token
            assert 0 <= row.attempts <= row.max_attempts, "attempts are out of bounds"
            if row.state in {State.SUCCEEDED, State.DEAD} and asked.token:
                assert row.token > asked.token, "a call made while it ran is lost"
            if row.state == State.CANCELLED:
                assert asked.cancellable, "a job expired whose last call does not"
            if row.state != State.RUNNING:
                assert row.attempts < row.max_attempts or not unfinished, "nobody can end it"

    @invariant()
    def nothing_takes_effect_twice(self):
        found = effects()
        assert len(found) == len(set(found)), "two effects under one token"
        count = dict.fromkeys(self.asked, 0)
        for note in found:
            count[next(job for job in count if str(job) == note.split()[0])] += 1
        for job, asked in self.asked.items():
            assert count[job] <= asked.generations, "more effects than calls"

    def teardown(self):
        """Bring everything to its end, with a worker that does not crash."""
        if not hasattr(self, "asked"):
            return
        for _ in range(8):
            self.wait(1000)
            self.loop()
            self.wait(1)
            for job in sorted(self.asked):
                with acting(0):
                    for run in claim(self.task, [job], alone=True):
                        self.effect(run)
        self.every_row_is_sound()
        self.nothing_takes_effect_twice()
        for row in self.rows().values():
            assert row.due_at is None, f"{row} never ends"

    # Helpers

    def rows(self):
        return {row["id"]: SimpleNamespace(**row) for row in Job.objects.values()}

    def row(self, job):
        return next((SimpleNamespace(**row) for row in Job.objects.filter(pk=job).values()), None)

    @contextmanager
    def fenced(self, *runs):
        """What these runs do changes no row that is not theirs any more."""
        before = self.rows()
        yield
        after = self.rows()
        for run in runs:
            row = before.get(run.id)
            if row is None or (row.state, row.token) != (State.RUNNING, run.token):
                assert after.get(run.id) == row, "a write under a stale token"

    def dies(self, name):
        for run in self.held[name]:
            recorder.note(recorder.KILLED, run, self.task.name)
        self.held[name] = []

    def take(self, name, *, all_of_them=False):
        runs = self.held[name] if all_of_them else self.held[name][:1]
        self.held[name] = self.held[name][len(runs) :]
        for run in runs:
            recorder.note("-", run, self.task.name)
        return list(runs)

    def effect(self, run):
        """An atomic task: its effect and its end commit together, or not at all."""
        try:
            with transaction.atomic():
                tasks.effect(run.id, f"{run.id} {run.token}")
                if not transitions.finish([run]):
                    raise LeaseLost
        except LeaseLost:
            return
        self.ended([run], {run.id})

    def ended(self, runs, found):
        for run in runs:
            if run.id in found:
                ends = self.seen.setdefault(run.id, Seen()).ended
                assert run.token not in ends, "one run ended twice"
                ends.add(run.token)
                row = self.row(run.id)
                if row.state == State.SUCCEEDED:
                    assert run.args == self.asked[run.id].args, "it ran with stale arguments"

    def end_badly(self, run, *, final):
        transitions.fail(run, "failed", 10, final=final)

    def renew(self, runs):
        for run in runs:
            run.progress = 50
        transitions.renew(runs)
        mine = transitions.still_mine(runs)
        for run in runs:
            row = self.row(run.id)
            really = row is not None and (row.state, row.token) == (State.RUNNING, run.token)
            assert (run.id in mine) == really, "a run is wrong about its lease"
            if really:
                soon = Job.objects.filter(pk=run.id, due_at__gt=F("started_at"))
                assert soon.exists()
