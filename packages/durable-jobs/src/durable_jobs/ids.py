"""Job ids: UUIDv7, made by the caller, so that an insert needs no answer and ids sort by time."""

import os
import time
from uuid import NAMESPACE_OID, UUID, uuid5


def uuid7() -> UUID:
    """Return a new id; the bits after the milliseconds are a fraction of one, so order is finer."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    fraction = (rest << 12) // 1_000_000
    tail = int.from_bytes(os.urandom(8)) >> 2
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | tail)


def row_id(task_id: str) -> UUID:
    """Return the key of the job's row; ids of Celery may be any text."""
    try:
        return UUID(task_id)
    except ValueError:
        return uuid5(NAMESPACE_OID, task_id)
