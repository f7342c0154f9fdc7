"""Who holds a job: `host/boot/pid`. A boot is one start of a worker: names and pids may repeat."""

import os
import socket
import uuid
from functools import cache

# Children inherit it, forked or spawned: the main process knows which jobs died with them.
ENVIRONMENT = "DURABLE_JOBS_BOOT"


def start() -> None:
    """Give this start of a worker its name; children that are started from now on share it."""
    os.environ[ENVIRONMENT] = uuid.uuid4().hex[:12]
    boot.cache_clear()


@cache
def boot() -> str:
    name = os.environ.setdefault(ENVIRONMENT, uuid.uuid4().hex[:12])
    return f"{socket.gethostname()[:120]}/{name}"


def child(pid: int | None = None) -> str:
    """Return the name of a process of this boot, by default the calling one."""
    return f"{boot()}/{pid or os.getpid()}"
