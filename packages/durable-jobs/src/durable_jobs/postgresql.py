"""The protocol's statements for PostgreSQL: sqlite.py has the same names for a first look.

Only the database's clock is read. No claim, renewal or pass of the loop waits for a lock: rows in
somebody's open transaction are skipped, and since the loop skips them too, nobody takes them away
meanwhile. Each statement finds its rows through an index, however many there are
(`test_each_statement_uses_its_index`).
"""

# ruff: noqa: S608 - these statements are put together from each other, never from input
from collections.abc import Iterable
from typing import Any

NOW = "statement_timestamp()"
HINT = "id, task, queue, options, args::text, kwargs::text, attempts, state"
SPREAD = f"{NOW} + random() * %s * interval '1s'"
LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %(wait)s, true)"


def _in(span: str) -> str:
    return f"({NOW} + %({span})s::float8 * interval '1s')"


INSERT = f"""
INSERT INTO durable_jobs_job AS job (id, given_id, task, args, kwargs, queue, options, key,
                                     owner_type_id, owner_id, max_attempts, expires_at, state,
                                     due_at)
VALUES (%(id)s, %(given_id)s, %(task)s, %(args)s, %(kwargs)s, %(queue)s, %(options)s, %(key)s,
        %(owner_type)s, %(owner_id)s, %(max_attempts)s,
        COALESCE(%(expires_at)s::timestamptz, {_in("expires")}),
        %(state)s, COALESCE(%(eta)s::timestamptz, {_in("delay")}))"""
ADOPT = f"{INSERT} ON CONFLICT DO NOTHING"
KNOWN = "SELECT id FROM durable_jobs_job WHERE id = %(id)s"
_ON_KEY = "ON CONFLICT (task, key) WHERE key IS NOT NULL AND due_at IS NOT NULL DO UPDATE SET"
# A job that waits for its first attempt starts at the earlier of both times; one that backs off
# after a failure keeps its pace; a running one is marked, and runs again with these arguments.
_WAITS = "job.state = 'scheduled' AND job.attempts = 0"
UPSERT = f"""{INSERT} {_ON_KEY}
  dirty = job.dirty OR job.state = 'running', args = excluded.args, kwargs = excluded.kwargs,
  expires_at = excluded.expires_at,
  queued_at = CASE WHEN {_WAITS} THEN {NOW} ELSE job.queued_at END,
  state = CASE WHEN {_WAITS} THEN excluded.state ELSE job.state END,
  due_at = CASE WHEN {_WAITS} THEN LEAST(job.due_at, excluded.due_at) ELSE job.due_at END
RETURNING id"""
# No overlap wanted: the live job is left as it is, but its id is the answer. One that has expired
# without having run makes room.
_PAST = f"job.state <> 'running' AND job.expires_at <= {NOW}"
_ANEW = ("args", "kwargs", "expires_at", "state", "due_at", "queued_at", "attempts")
UPSERT_ONCE = f"""{INSERT} {_ON_KEY}
  {", ".join(f"{x} = CASE WHEN {_PAST} THEN excluded.{x} ELSE job.{x} END" for x in _ANEW)}
RETURNING id"""
MANY = """COPY durable_jobs_job (id, task, args, kwargs, queue, options, owner_type_id, owner_id,
                                 max_attempts, state, due_at) FROM STDIN"""
IN_DELAY = f"SELECT {_in('delay')}"

# An array is read once and first, and costs the planner less than a join.
_WHERE = "WHERE id = ANY(ARRAY(SELECT id FROM durable_jobs_job WHERE"
_FREE = "ORDER BY id FOR UPDATE SKIP LOCKED))"
# A job that crashed before is claimed alone: it must not take the jobs beside it down again.
_CLAIM = f"""
UPDATE durable_jobs_job
   SET state = 'running', token = token + 1, attempts = LEAST(attempts, 32765) + 1, dirty = false,
       due_at = {_in("lease")}, started_at = {NOW}, worker = %(worker)s, progress = 0, message = ''
 {_WHERE} id <wanted> AND task = %(task)s
     AND (%(alone)s OR attempts = 0)
     AND (state = 'queued' OR state = 'scheduled' AND due_at <= {NOW})
     AND (expires_at IS NULL OR expires_at > {NOW})
   {_FREE}
RETURNING id, token, attempts, max_attempts, args::text, kwargs::text, options"""
CLAIM = _CLAIM.replace("<wanted>", "= ANY(%(ids)s)")
# With a backlog: also what was enqueued right after, so that its hints find nothing left to do.
CLAIM_ALONG = _CLAIM.replace(
    "<wanted>",
    """= ANY(%(ids)s || ARRAY(
       SELECT near.id FROM (SELECT id, task, queue, options FROM durable_jobs_job
                             WHERE id > %(after)s ORDER BY id LIMIT %(along)s) AS near
        WHERE near.task = %(task)s AND near.queue = %(queue)s
          AND near.options->'timelimit' IS NOT DISTINCT FROM %(limits)s::jsonb))""",
)

# The fence: who lost its job matches no row.
_MINE = """id = ANY(%(ids)s) AND token = (%(tokens)s::int[])[array_position(%(ids)s, id)]
     AND state = 'running'"""
RENEW = f"""
WITH pair AS MATERIALIZED (
  SELECT * FROM unnest(%(ids)s::uuid[], %(tokens)s::int[], %(progress)s::int[],
                       %(messages)s::text[]) AS p (id, token, progress, message)),
     mine AS MATERIALIZED (
  SELECT job.id FROM durable_jobs_job job JOIN pair ON job.id = pair.id AND job.token = pair.token
   WHERE job.state = 'running' ORDER BY job.id FOR UPDATE OF job SKIP LOCKED)
UPDATE durable_jobs_job job
   SET due_at = {_in("lease")}, progress = pair.progress, message = pair.message
  FROM pair WHERE job.id = pair.id AND job.id IN (SELECT id FROM mine) RETURNING job.id"""
STILL_MINE = f"SELECT id FROM durable_jobs_job WHERE {_MINE}"

# Enqueued again by key while it ran: it runs once more, with a new budget.
_FINISH = f"""
UPDATE durable_jobs_job SET
  state = CASE WHEN dirty THEN 'queued' ELSE 'succeeded' END,
  due_at = CASE WHEN dirty THEN {_in("republish")} END,
  finished_at = CASE WHEN NOT dirty THEN {NOW} END,
  queued_at = CASE WHEN dirty THEN {NOW} ELSE queued_at END,
  attempts = CASE WHEN dirty THEN 0 ELSE attempts END,
  progress = 100, error = '', result = %(result)s"""
FINISH = f"{_FINISH} WHERE {_MINE} RETURNING {HINT}"
# For those who cannot wait until a caller that enqueues the same key has committed.
FINISH_FREE = f"{_FINISH} {_WHERE} {_MINE} {_FREE} RETURNING {HINT}"

# 32 767, the largest a row holds, stands for `max_retries=None`: such a job ends never.
_LIMIT = "GREATEST(max_attempts, %(limit)s)"
_ENDS = f"(%(final)s OR {_LIMIT} < 32767 AND attempts >= {_LIMIT})"
_FAIL = f"""
UPDATE durable_jobs_job SET
  state = CASE WHEN NOT {_ENDS} THEN 'scheduled' WHEN dirty THEN 'queued' ELSE 'dead' END,
  due_at = CASE WHEN NOT {_ENDS} THEN <pause> WHEN dirty THEN {_in("republish")} END,
  finished_at = CASE WHEN {_ENDS} AND NOT dirty THEN {NOW} END,
  queued_at = CASE WHEN {_ENDS} AND dirty THEN {NOW} ELSE queued_at END,
  attempts = CASE WHEN {_ENDS} AND dirty THEN 0 ELSE attempts END,
  max_attempts = {_LIMIT}, error = %(error)s"""
_PAUSE = f"COALESCE(%(eta)s::timestamptz, {_in('delay')})"
FAIL = f"""{_FAIL.replace("<pause>", _PAUSE)},
  args = CASE WHEN dirty THEN args ELSE COALESCE(%(args)s, args) END,
  kwargs = CASE WHEN dirty THEN kwargs ELSE COALESCE(%(kwargs)s, kwargs) END,
  queue = COALESCE(%(queue)s, queue)
 WHERE {_MINE} RETURNING {HINT}"""
# As the index of `worker` spells it.
_RUNS = "state LIKE 'running%%'"
# A killed child: its first loss is repaired at once, a job that kills one after another slows down.
_SLOWER = "LEAST(%(backoff_max)s, %(backoff_min)s * (1 << LEAST(attempts - 2, 20)))"
_LOST = f"{NOW} + CASE WHEN attempts > 1 THEN {_SLOWER} ELSE 0 END * interval '1s'"
LOSE = f"""{_FAIL.replace("<pause>", _LOST)}
 {_WHERE} worker = %(worker)s AND {_RUNS} {_FREE} RETURNING {HINT}"""

# Handed back unharmed: the attempt does not count.
_RELEASE = f"""
UPDATE durable_jobs_job SET state = 'scheduled', due_at = {_in("delay")}, attempts = attempts - 1,
       error = COALESCE(%(error)s, error)"""
RELEASE = f"{_RELEASE} {_WHERE} {_MINE} {_FREE} RETURNING {HINT}"
RELEASE_BOOT = f"""{_RELEASE}
 {_WHERE} worker LIKE %(worker)s AND {_RUNS} {_FREE} RETURNING {HINT}"""

# The loop: timers, retries, lost messages, lost workers and expiry are one question, "who is due?"
_SPENT = "state = 'running' AND max_attempts < 32767 AND attempts >= max_attempts"
_DEAD = f"{_SPENT} AND NOT dirty"
_LATE = f"state <> 'running' AND expires_at <= {NOW}"
_DOUBLED = f"""{NOW} + LEAST(GREATEST(%(republish)s * interval '1s', {NOW} - queued_at),
                                %(republish_max)s * interval '1s')"""
FIRE = f"""
WITH due AS MATERIALIZED (
  SELECT id FROM durable_jobs_job WHERE due_at <= {NOW}
   ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
UPDATE durable_jobs_job SET
  state = CASE WHEN {_LATE} THEN 'cancelled' WHEN {_DEAD} THEN 'dead' ELSE 'queued' END,
  error = CASE WHEN {_LATE} AND error = '' THEN 'expired before it started'
               WHEN {_LATE} THEN 'expired before its next attempt; of the last one: ' || error
               WHEN state = 'running' THEN 'lost with its worker ' || worker ELSE error END,
  finished_at = CASE WHEN {_LATE} OR {_DEAD} THEN {NOW} END,
  attempts = CASE WHEN {_SPENT} AND dirty THEN 0 ELSE attempts END,
  queued_at = CASE WHEN state = 'queued' THEN queued_at ELSE {NOW} END,
  due_at = CASE WHEN {_LATE} OR {_DEAD} THEN NULL
                WHEN state = 'queued' THEN {_DOUBLED} ELSE {_in("republish")} END
 WHERE id IN (SELECT id FROM due) RETURNING {HINT}"""


def adapted(statement: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters as the driver takes them: as they are."""
    return params


def insert_many(cursor: Any, rows: Iterable[dict[str, Any]], delay: float) -> None:
    """Write rows without a key and times of their own, in one COPY."""
    cursor.execute(IN_DELAY, {"delay": delay})
    (due_at,) = cursor.fetchone()
    names = ("id", "task", "args", "kwargs", "queue", "options", "owner_type", "owner_id")
    with cursor.copy(MANY) as copy:
        for row in rows:
            copy.write_row(
                (*(row[name] for name in names), row["max_attempts"], row["state"], due_at)
            )
