"""The protocol's statements for SQLite: for a first look, with one writer at a time.

That one writer stands in for the locks which PostgreSQL's statements skip; postgresql.py has the
reasons for what is done.
"""

# ruff: noqa: S608 - these statements are put together from each other, never from input
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

_FORMAT = "'%%Y-%%m-%%d %%H:%%M:%%f', 'now'"
NOW = f"strftime({_FORMAT})"
HINT = "id, task, queue, options, args, kwargs, attempts, state"
SPREAD = f"strftime({_FORMAT}, ((abs(random()) %% 1000000) / 1000000.0 * %s) || ' seconds')"


def _in(seconds: str) -> str:
    return f"strftime({_FORMAT}, ({seconds}) || ' seconds')"


INSERT = f"""
INSERT INTO durable_jobs_job AS job (id, given_id, task, args, kwargs, queue, options, key,
                                     owner_type_id, owner_id, max_attempts, expires_at, state,
                                     due_at)
VALUES (%(id)s, %(given_id)s, %(task)s, %(args)s, %(kwargs)s, %(queue)s, %(options)s, %(key)s,
        %(owner_type)s, %(owner_id)s, %(max_attempts)s,
        COALESCE(%(expires_at)s, {_in("%(expires)s")}), %(state)s,
        COALESCE(%(eta)s, {_in("%(delay)s")}))"""
ADOPT = f"{INSERT} ON CONFLICT DO NOTHING"
KNOWN = "SELECT id FROM durable_jobs_job WHERE id = %(id)s"
# An upsert finds its index by the index's own words, in their order.
_ON_KEY = "ON CONFLICT (task, key) WHERE due_at IS NOT NULL AND key IS NOT NULL DO UPDATE SET"
_WAITS = "job.state = 'scheduled' AND job.attempts = 0"
UPSERT = f"""{INSERT} {_ON_KEY}
  dirty = job.dirty OR job.state = 'running', args = excluded.args, kwargs = excluded.kwargs,
  expires_at = excluded.expires_at,
  queued_at = CASE WHEN {_WAITS} THEN {NOW} ELSE job.queued_at END,
  state = CASE WHEN {_WAITS} THEN excluded.state ELSE job.state END,
  due_at = CASE WHEN {_WAITS} THEN MIN(job.due_at, excluded.due_at) ELSE job.due_at END
RETURNING id"""
_PAST = f"job.state <> 'running' AND job.expires_at <= {NOW}"
_ANEW = ("args", "kwargs", "expires_at", "state", "due_at", "queued_at", "attempts")
UPSERT_ONCE = f"""{INSERT} {_ON_KEY}
  {", ".join(f"{x} = CASE WHEN {_PAST} THEN excluded.{x} ELSE job.{x} END" for x in _ANEW)}
RETURNING id"""

CLAIM = f"""
UPDATE durable_jobs_job
   SET state = 'running', token = token + 1, attempts = MIN(attempts, 32765) + 1, dirty = false,
       due_at = {_in("%(lease)s")}, started_at = {NOW}, worker = %(worker)s,
       progress = 0, message = ''
 WHERE id IN (SELECT value FROM json_each(%(ids)s)) AND task = %(task)s
   AND (%(alone)s OR attempts = 0)
   AND (state = 'queued' OR state = 'scheduled' AND due_at <= {NOW})
   AND (expires_at IS NULL OR expires_at > {NOW})
RETURNING id, token, attempts, max_attempts, args, kwargs, options"""
CLAIM_ALONG = CLAIM  # none are taken along

_PAIR = """SELECT i.value AS id, t.value AS token, i.key AS place
  FROM json_each(%(ids)s) i JOIN json_each(%(tokens)s) t ON t.key = i.key"""
_MINE = f"(id, token) IN (SELECT id, token FROM ({_PAIR})) AND state = 'running'"
RENEW = f"""
UPDATE durable_jobs_job SET due_at = {_in("%(lease)s")},
  progress = (SELECT told.value FROM ({_PAIR}) pair JOIN json_each(%(progress)s) told
                  ON told.key = pair.place WHERE pair.id = durable_jobs_job.id),
  message = (SELECT told.value FROM ({_PAIR}) pair JOIN json_each(%(messages)s) told
                 ON told.key = pair.place WHERE pair.id = durable_jobs_job.id)
 WHERE {_MINE} RETURNING id"""
STILL_MINE = f"SELECT id FROM durable_jobs_job WHERE {_MINE}"

FINISH = FINISH_FREE = f"""
UPDATE durable_jobs_job SET
  state = CASE WHEN dirty THEN 'queued' ELSE 'succeeded' END,
  due_at = CASE WHEN dirty THEN {_in("%(republish)s")} END,
  finished_at = CASE WHEN NOT dirty THEN {NOW} END,
  queued_at = CASE WHEN dirty THEN {NOW} ELSE queued_at END,
  attempts = CASE WHEN dirty THEN 0 ELSE attempts END,
  progress = 100, error = '', result = %(result)s
 WHERE {_MINE} RETURNING {HINT}"""

_LIMIT = "MAX(max_attempts, %(limit)s)"
_ENDS = f"(%(final)s OR {_LIMIT} < 32767 AND attempts >= {_LIMIT})"
_FAIL = f"""
UPDATE durable_jobs_job SET
  state = CASE WHEN NOT {_ENDS} THEN 'scheduled' WHEN dirty THEN 'queued' ELSE 'dead' END,
  due_at = CASE WHEN NOT {_ENDS} THEN <pause> WHEN dirty THEN {_in("%(republish)s")} END,
  finished_at = CASE WHEN {_ENDS} AND NOT dirty THEN {NOW} END,
  queued_at = CASE WHEN {_ENDS} AND dirty THEN {NOW} ELSE queued_at END,
  attempts = CASE WHEN {_ENDS} AND dirty THEN 0 ELSE attempts END,
  max_attempts = {_LIMIT}, error = %(error)s"""
FAIL = f"""{_FAIL.replace("<pause>", f"COALESCE(%(eta)s, {_in('%(delay)s')})")},
  args = CASE WHEN dirty THEN args ELSE COALESCE(%(args)s, args) END,
  kwargs = CASE WHEN dirty THEN kwargs ELSE COALESCE(%(kwargs)s, kwargs) END,
  queue = COALESCE(%(queue)s, queue)
 WHERE {_MINE} RETURNING {HINT}"""
_SLOWER = "MIN(%(backoff_max)s, %(backoff_min)s * (1 << MIN(attempts - 2, 20)))"
_LOST = _in(f"CASE WHEN attempts > 1 THEN {_SLOWER} ELSE 0 END")
LOSE = f"""{_FAIL.replace("<pause>", _LOST)}
 WHERE worker = %(worker)s AND state = 'running' RETURNING {HINT}"""

_RELEASE = f"""
UPDATE durable_jobs_job SET state = 'scheduled', due_at = {_in("%(delay)s")},
       attempts = attempts - 1, error = COALESCE(%(error)s, error)"""
RELEASE = f"{_RELEASE} WHERE {_MINE} RETURNING {HINT}"
RELEASE_BOOT = f"""{_RELEASE}
 WHERE worker LIKE %(worker)s ESCAPE '\\' AND state = 'running' RETURNING {HINT}"""

_SPENT = "state = 'running' AND max_attempts < 32767 AND attempts >= max_attempts"
_DEAD = f"{_SPENT} AND NOT dirty"
_LATE = f"state <> 'running' AND expires_at <= {NOW}"
_SINCE = f"(julianday({NOW}) - julianday(queued_at)) * 86400"
_DOUBLED = _in(f"MIN(MAX(%(republish)s, {_SINCE}), %(republish_max)s)")
FIRE = f"""
UPDATE durable_jobs_job SET
  state = CASE WHEN {_LATE} THEN 'cancelled' WHEN {_DEAD} THEN 'dead' ELSE 'queued' END,
  error = CASE WHEN {_LATE} AND error = '' THEN 'expired before it started'
               WHEN {_LATE} THEN 'expired before its next attempt; of the last one: ' || error
               WHEN state = 'running' THEN 'lost with its worker ' || worker ELSE error END,
  finished_at = CASE WHEN {_LATE} OR {_DEAD} THEN {NOW} END,
  attempts = CASE WHEN {_SPENT} AND dirty THEN 0 ELSE attempts END,
  queued_at = CASE WHEN state = 'queued' THEN queued_at ELSE {NOW} END,
  due_at = CASE WHEN {_LATE} OR {_DEAD} THEN NULL
                WHEN state = 'queued' THEN {_DOUBLED} ELSE {_in("%(republish)s")} END
 WHERE id IN (SELECT id FROM durable_jobs_job WHERE due_at <= {NOW}
               ORDER BY due_at LIMIT %(limit)s) RETURNING {HINT}"""


def adapted(statement: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return what the statement uses, since with DEBUG on Django has SQLite quote them all."""
    used = (name for name in params if f"%({name})s" in statement)
    return {name: _plain(params[name]) for name in used}


def _plain(value: Any) -> Any:
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return json.dumps([_plain(item) for item in value])
    return value
