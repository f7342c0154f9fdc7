"""What a caller of a durable task meets: Celery's own behaviour, plus a row."""

import uuid
from datetime import timedelta

import pytest
from celery import chain, chord, current_app, group, signals
from celery.exceptions import TimeoutError as ResultTimeout
from django.contrib.auth.models import Group
from django.db import connection, transaction
from django.utils import timezone

from durable_jobs import Job, JobDead, JobTask, Unsupported
from durable_jobs.publisher import publisher
from durable_jobs.testing import drain
from tests import tasks
from tests.conftest import effects

State = Job.State
pytestmark = pytest.mark.usefixtures("jobs_db")


@pytest.fixture
def sent(monkeypatch):
    hints = []
    monkeypatch.setattr(publisher, "send", hints.extend)
    return hints


def test_a_rolled_back_transaction_leaves_no_job_and_sends_no_hint(sent):
    with pytest.raises(RuntimeError), transaction.atomic():  # noqa: PT012
        tasks.noop.delay()
        raise RuntimeError
    assert (Job.objects.count(), sent) == (0, [])


def test_a_committed_transaction_sends_one_hint_for_each_job_after_the_commit(sent):
    with transaction.atomic():
        first = tasks.noop.delay(1)
        assert sent == []
        second = tasks.noop.delay(2)
    assert [str(hint.id) for hint in sent] == [first.id, second.id]
    assert first.id < second.id


def test_a_rolled_back_savepoint_drops_its_jobs_only(sent):
    with transaction.atomic():
        with pytest.raises(RuntimeError), transaction.atomic():  # noqa: PT012
            tasks.noop.delay("inner")
            raise RuntimeError
        outer = tasks.noop.delay("outer")
    assert [str(hint.id) for hint in sent] == [outer.id]
    assert Job.objects.get().args == ["outer"]


def test_a_delayed_job_is_scheduled_and_sends_no_hint(sent):
    in_an_hour = timezone.now() + timedelta(hours=1)
    for options in ({"countdown": 3600}, {"eta": in_an_hour}):
        job = tasks.noop.apply_async([1], **options).job
        assert job.state == State.SCHEDULED
        assert abs(job.due_at - in_an_hour) < timedelta(seconds=30)
    assert sent == []


def test_a_wrong_signature_is_refused_at_the_call():
    with pytest.raises(TypeError):
        tasks.add.delay(1)
    assert Job.objects.count() == 0


def test_a_model_instance_is_refused_with_what_to_pass_instead():
    with pytest.raises(TypeError, match=r"pass group\.pk"):
        tasks.noop.delay(Group(pk=1))


def test_arguments_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="ARGS_MAX_BYTES"):
        tasks.noop.delay("x" * 70_000)


def test_dates_uuids_and_decimals_survive_as_celery_serialises_them(sent):
    now, value, seen = timezone.now(), uuid.uuid4(), []
    signals.task_prerun.connect(remember := lambda args, **_: seen.append(args))
    tasks.noop.delay(now, value)
    drain()
    signals.task_prerun.disconnect(remember)
    assert seen == [[now, value]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: tasks.noop.apply_async([1], link=tasks.noop.si(2)),
        lambda: tasks.noop.apply_async([1], link_error=tasks.noop.si(2)),
        lambda: chain(tasks.noop.si(1), tasks.noop.si(2)).apply_async(),
        lambda: group(tasks.noop.si(1), tasks.noop.si(2)).apply_async(),
        lambda: chord([tasks.noop.si(1), tasks.noop.si(2)], tasks.noop.si(3)).apply_async(),
    ],
)
def test_a_canvas_of_durable_tasks_fails_loudly_at_the_call(call):
    with pytest.raises((Unsupported, NotImplementedError)):
        call()
    assert Job.objects.count() == 0


def test_headers_of_the_call_and_of_signal_receivers_reach_every_attempt(sent):
    seen = []

    def add_header(headers, **_):
        headers["trace"] = "t1"

    def remember(task, **_):
        seen.append(
            (
                task.request.trace,
                task.request.mine,
                task.request.retries,
                task.request.id,
            )
        )

    signals.before_task_publish.connect(add_header)
    signals.task_prerun.connect(remember)
    try:
        job = tasks.fail.apply_async(headers={"mine": 1}, priority=3)
    finally:
        signals.before_task_publish.disconnect(add_header)
    try:
        drain()
        Job.objects.update(due_at=timezone.now())
        drain()
    finally:
        signals.task_prerun.disconnect(remember)
    assert seen == [("t1", 1, 0, job.id), ("t1", 1, 1, job.id)]
    assert job.job.options["priority"] == 3


def test_a_result_is_read_from_the_row(sent):
    result = tasks.add.delay(1, 2)
    assert (result.state, result.ready()) == ("PENDING", False)
    with pytest.raises(ResultTimeout):
        result.get(timeout=0.05)
    drain()
    assert (result.get(timeout=1), result.successful(), result.status) == (
        3,
        True,
        "SUCCESS",
    )


def test_a_permanent_failure_is_dead_at_once_and_get_raises_its_text(sent):
    result = tasks.fail_for_good.delay()
    drain(everything=True)
    assert (result.state, result.job.attempts) == ("FAILURE", 1)
    with pytest.raises(JobDead, match="no such account"):
        result.get(timeout=1)


def test_an_exception_is_tried_again_with_backoff_until_attempts_are_used_up(sent, settings):
    settings.DURABLE_JOBS = {**settings.DURABLE_JOBS, "BACKOFF_MIN": 60, "BACKOFF_MAX": 60}
    result = tasks.fail.delay()
    drain()
    row = result.job
    assert (row.state, row.attempts, result.state) == (State.SCHEDULED, 1, "RETRY")
    assert "ValueError: boom" in row.error
    assert drain(everything=True) == 7
    assert (result.job.state, len(effects("try"))) == (State.DEAD, 8)


def test_an_exception_that_is_in_throws_ends_the_job(sent):
    result = tasks.throw.delay()
    assert drain(everything=True) == 1
    assert result.job.state == State.DEAD


def test_retry_by_hand_and_autoretry_keep_to_max_retries(sent):
    by_hand, auto = tasks.retry_by_hand.delay("x"), tasks.autoretry.delay()
    drain(everything=True)
    assert (by_hand.job.attempts, by_hand.job.state) == (3, State.DEAD)
    assert (auto.job.attempts, auto.job.state) == (2, State.DEAD)
    assert "ValueError: again" in by_hand.job.error


def test_one_unfinished_job_per_key_with_the_latest_arguments(sent):
    first = tasks.noop.apply_async([1], key="k")
    second = tasks.noop.apply_async([2], key="k")
    assert first.id == second.id
    assert Job.objects.get().args == [2]
    drain()
    assert tasks.noop.apply_async([3], key="k").id != first.id


def test_a_key_enqueued_again_while_running_runs_again_afterwards(sent, monkeypatch):
    again = []

    def run(note, seconds=0):
        if not again:
            again.append(tasks.write.apply_async(["second"], key="k").id)
        else:
            again.append(note)

    monkeypatch.setattr(tasks.write, "run", run)
    first = tasks.write.apply_async(["first"], key="k")
    assert drain() == 2
    assert again == [first.id, "second"]
    assert first.job.state == State.SUCCEEDED


def test_with_rerun_off_a_call_while_one_is_live_changes_nothing(sent, monkeypatch):
    monkeypatch.setattr(tasks.noop, "rerun", False)
    monkeypatch.setattr(tasks.noop, "key", "nightly")
    assert tasks.noop.delay(1).id == tasks.noop.delay(2).id
    assert Job.objects.get().args == [1]


def test_eager_mode_runs_in_process_without_a_row():
    current_app.conf.task_always_eager = True
    try:
        assert tasks.add.delay(1, 2).get() == 3
    finally:
        current_app.conf.task_always_eager = False
    assert Job.objects.count() == 0


def test_a_direct_call_runs_the_function():
    assert tasks.add(1, 2) == 3


def test_celerys_own_tasks_stay_plain():
    task = current_app.tasks["celery.backend_cleanup"]
    assert isinstance(task, JobTask)
    assert not task.durable


def test_ten_thousand_jobs_are_written_with_copy(sent):
    ids = tasks.noop.enqueue_many([number] for number in range(10_000))
    assert len(set(ids)) == Job.objects.filter(state=State.QUEUED).count() == len(sent) == 10_000
    assert Job.objects.get(pk=ids[7]).args == [7]
    assert Job.objects.get(pk=ids[7]).max_attempts == 8


def test_jobs_of_an_owner_are_cancelled_with_it_and_can_be_tried_again(sent):
    owner = Group.objects.create(name="g")
    tasks.noop.apply_async([1], owner=owner)
    tasks.noop.apply_async([2])
    assert Job.objects.for_owner(owner).cancel() == 1
    assert drain() == 1
    assert Job.objects.for_owner(owner).retry() == 1
    assert drain(everything=True) == 1
    assert Job.objects.for_owner(owner).get().state == State.SUCCEEDED


def test_retry_leaves_dead_jobs_whose_key_is_held_by_a_live_one(sent):
    for _ in range(2):
        tasks.fail_for_good.apply_async(key="k")
        drain()
    assert Job.objects.filter(state=State.DEAD).count() == 2
    assert Job.objects.all().retry() == 1
    assert Job.objects.all().retry() == 0


def test_an_expired_job_is_cancelled_by_the_loop_and_never_runs(sent):
    from durable_jobs.reconcile import fire_timers

    job = tasks.write.apply_async(["x"], expires=-1)
    Job.objects.update(due_at=timezone.now())
    assert fire_timers()[State.CANCELLED] == 1
    assert (job.job.state, effects()) == (State.CANCELLED, [])


def test_the_claim_uses_the_primary_key_and_the_loop_its_partial_index():
    with connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(
            "EXPLAIN SELECT id FROM durable_jobs_job WHERE due_at <= now() ORDER BY due_at"
        )
        plan = str(cursor.fetchall())
        cursor.execute("RESET enable_seqscan")
    assert "durable_job_due" in plan


def failing(text):
    raise ValueError(text)


def test_each_failed_attempt_says_where_what_when_the_next_comes_and_where_to_look(
    jobs_db, monkeypatch, caplog
):
    line = failing.__code__.co_firstlineno + 1
    monkeypatch.setattr(tasks.noop, "run", lambda: failing("first line\nsecond line"))
    job = tasks.noop.apply_async(max_attempts=2)
    drain(everything=True)
    said = [r.message for r in caplog.records if r.name == "durable_jobs.run"]
    assert len(said) == 2
    for number, text in enumerate(said, 1):
        assert (
            f"{tasks.noop.name}[{job.id}] attempt {number} of 2 failed at {__file__}:{line}" in text
        )
        assert "in failing: ValueError: first line second line; " in text
        assert f"`manage.py jobs show {job.id}`" in text
    assert "the next in " in said[0]
    assert "the job is dead" in said[1]
