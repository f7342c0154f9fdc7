"""Every statement that moves a job from one state to another, in one place.

Written for PostgreSQL. SQLite gets the same text with the few words it spells differently; its
single writer stands in for SKIP LOCKED. Only the database's clock is read. No claim, renewal or
pass of the loop waits for a lock: rows in somebody's open transaction are skipped, and since the
loop skips them too, nobody takes them away meanwhile.
"""

# ruff: noqa: S608 - the only thing put together here is the name of our own table
T = "durable_jobs_job"
HINT = "id, task, queue, options, args, kwargs, attempts, state"

INSERT = f"""
INSERT INTO {T} (id, task, args, kwargs, queue, options, key, owner_type_id, owner_id,
                 max_attempts, expires_at, state, due_at)
VALUES (%(id)s, %(task)s, %(args)s, %(kwargs)s, %(queue)s, %(options)s, %(key)s, %(owner_type)s,
        %(owner_id)s, %(max_attempts)s, <soon expires %(expires_at)s>, %(state)s,
        <soon delay %(eta)s>)"""
ON_KEY = " ON CONFLICT (task, key) WHERE key IS NOT NULL AND due_at IS NOT NULL DO UPDATE SET "
# A job that waits for its first attempt starts at the earlier of both times; one that backs off
# after a failure keeps its pace; a running one is marked, and runs again with these arguments.
_WAITS = f"{T}.state = 'scheduled' AND {T}.attempts = 0"
UPSERT = f"""{INSERT}{ON_KEY}
  dirty = {T}.dirty OR {T}.state = 'running', args = excluded.args, kwargs = excluded.kwargs,
  expires_at = excluded.expires_at,
  queued_at = CASE WHEN {_WAITS} THEN <now> ELSE {T}.queued_at END,
  state = CASE WHEN {_WAITS} THEN excluded.state ELSE {T}.state END,
  due_at = CASE WHEN {_WAITS} THEN <least>({T}.due_at, excluded.due_at) ELSE {T}.due_at END
RETURNING id"""
# No overlap wanted: the live job is left as it is, but its id is the answer. One that has expired
# without having run makes room.
_PAST = f"{T}.state <> 'running' AND {T}.expires_at <= <now>"
_ANEW = "args kwargs expires_at state due_at queued_at attempts"
UPSERT_ONCE = (
    INSERT
    + ON_KEY
    + ", ".join(
        f"{column} = CASE WHEN {_PAST} THEN excluded.{column} ELSE {T}.{column} END"
        for column in _ANEW.split()
    )
    + " RETURNING id"
)
ADOPT = f"{INSERT} ON CONFLICT DO NOTHING"

# A job that crashed before is claimed alone: it must not take the jobs beside it down again.
_CLAIM = f"""
UPDATE {T} SET state = 'running', token = token + 1, attempts = <least>(attempts, 32765) + 1,
       dirty = false, due_at = <soon lease>, started_at = <now>, worker = %(worker)s,
       progress = 0, message = ''
 WHERE id <those>SELECT id FROM {T} WHERE id <wanted> AND task = %(task)s
     AND (%(alone)s OR attempts = 0)
     AND (state = 'queued' OR state = 'scheduled' AND due_at <= <now>)
     AND (expires_at IS NULL OR expires_at > <now>)
   ORDER BY id <skip locked></those>
RETURNING id, token, attempts, max_attempts, args, kwargs, options"""
CLAIM = _CLAIM.replace("<wanted>", "<in ids>")
# With a backlog: also what was enqueued right after, so that its hints find nothing left to do.
CLAIM_ALONG = _CLAIM.replace(
    "<wanted>",
    f"""= ANY(%(ids)s || ARRAY(
       SELECT near.id FROM (SELECT id, task, queue, options FROM {T} WHERE id > %(after)s
                             ORDER BY id LIMIT %(along)s) AS near
        WHERE near.task = %(task)s AND near.queue = %(queue)s
          AND near.options->'timelimit' IS NOT DISTINCT FROM %(limits)s::jsonb))""",
)

# The fence: who lost its job matches no row.
_MINE = "<in pairs> AND state = 'running'"
_MINE_FREE = f"id <those>SELECT id FROM {T} WHERE {_MINE} ORDER BY id <skip locked></those>"

RENEW = f"""
WITH pair AS MATERIALIZED (<pairs with progress>),
     mine AS MATERIALIZED (
  SELECT j.id FROM {T} j JOIN pair p ON j.id = p.id AND j.token = p.token
   WHERE j.state = 'running' ORDER BY j.id <skip locked of j>)
UPDATE {T} SET due_at = <soon lease>, progress = p.progress, message = p.message
  FROM pair p WHERE {T}.id = p.id AND {T}.id IN (SELECT id FROM mine)"""
STILL_MINE = f"SELECT id FROM {T} WHERE {_MINE}"

# Enqueued again by key while it ran: it runs once more, with a new budget.
_FINISH = f"""
UPDATE {T} SET
  state = CASE WHEN dirty THEN 'queued' ELSE 'succeeded' END,
  due_at = CASE WHEN dirty THEN <soon republish> END,
  finished_at = CASE WHEN NOT dirty THEN <now> END,
  queued_at = CASE WHEN dirty THEN <now> ELSE queued_at END,
  attempts = CASE WHEN dirty THEN 0 ELSE attempts END,
  progress = 100, error = '', result = %(result)s"""
FINISH = f"{_FINISH} WHERE {_MINE} RETURNING {HINT}"
# For those who cannot wait until a caller that enqueues the same key has committed.
FINISH_FREE = f"{_FINISH} WHERE {_MINE_FREE} RETURNING {HINT}"

# 32 767, the largest a row holds, stands for `max_retries=None`: such a job ends never.
_LIMIT = "<greatest>(max_attempts, %(max_attempts)s)"
_ENDS = f"(%(final)s OR {_LIMIT} < 32767 AND attempts >= {_LIMIT})"
_FAIL = f"""
UPDATE {T} SET
  state = CASE WHEN NOT {_ENDS} THEN 'scheduled' WHEN dirty THEN 'queued' ELSE 'dead' END,
  due_at = CASE WHEN NOT {_ENDS} THEN <delay> WHEN dirty THEN <soon republish> END,
  finished_at = CASE WHEN {_ENDS} AND NOT dirty THEN <now> END,
  queued_at = CASE WHEN {_ENDS} AND dirty THEN <now> ELSE queued_at END,
  attempts = CASE WHEN {_ENDS} AND dirty THEN 0 ELSE attempts END,
  max_attempts = <greatest>(max_attempts, %(max_attempts)s),
  args = CASE WHEN dirty THEN args ELSE COALESCE(%(args)s, args) END,
  kwargs = CASE WHEN dirty THEN kwargs ELSE COALESCE(%(kwargs)s, kwargs) END,
  error = %(error)s"""
_FAIL_MINE = _FAIL.replace("<delay>", "<soon delay %(eta)s>")
FAIL = f"{_FAIL_MINE}, queue = COALESCE(%(queue)s, queue) WHERE {_MINE} RETURNING {HINT}"
# A killed child: its first loss is repaired at once, a job that kills one after another slows down.
FAIL_WORKER = f"""{_FAIL.replace("<delay>", "<lost delay>")}
 WHERE id <those>SELECT id FROM {T} WHERE worker = %(worker)s AND state = 'running'
     AND due_at IS NOT NULL ORDER BY id <skip locked></those> RETURNING {HINT}"""

# Handed back unharmed: the attempt does not count.
_RELEASE = f"""
UPDATE {T} SET state = 'scheduled', due_at = <soon delay>, attempts = attempts - 1,
       error = COALESCE(%(error)s, error)"""
RELEASE = f"{_RELEASE} WHERE {_MINE_FREE} RETURNING {HINT}"
RELEASE_BOOT = f"""{_RELEASE}
 WHERE id <those>SELECT id FROM {T} WHERE worker LIKE %(worker)s AND state = 'running'
     AND due_at IS NOT NULL ORDER BY id <skip locked></those> RETURNING {HINT}"""

# The loop: timers, retries, lost messages, lost workers and expiry are one question, "who is due?"
_SPENT = "state = 'running' AND max_attempts < 32767 AND attempts >= max_attempts"
_DEAD = f"{_SPENT} AND NOT dirty"
_LATE = "state <> 'running' AND expires_at <= <now>"
DUE = f"""
WITH due AS MATERIALIZED (
  SELECT id FROM {T} WHERE due_at <= <now> ORDER BY due_at LIMIT %(limit)s <skip locked>)
UPDATE {T} SET
  state = CASE WHEN {_LATE} THEN 'cancelled' WHEN {_DEAD} THEN 'dead' ELSE 'queued' END,
  error = CASE WHEN {_LATE} AND error = '' THEN 'expired before it started'
               WHEN {_LATE} THEN 'expired before its next attempt; of the last one: ' || error
               WHEN state = 'running' THEN 'lost with its worker ' || worker ELSE error END,
  finished_at = CASE WHEN {_LATE} OR {_DEAD} THEN <now> END,
  attempts = CASE WHEN {_SPENT} AND dirty THEN 0 ELSE attempts END,
  queued_at = CASE WHEN state = 'queued' THEN queued_at ELSE <now> END,
  due_at = CASE WHEN {_LATE} OR {_DEAD} THEN NULL
                WHEN state = 'queued' THEN <doubled> ELSE <soon republish> END
 WHERE id IN (SELECT id FROM due) RETURNING {HINT}"""
