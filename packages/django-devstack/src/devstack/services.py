"""The database and the broker: given ones are used, missing ones are started privately.

They listen on 127.0.0.1 with a random password, and keep their data in a folder of their own. A
broker that loses tasks (Celery's file system or SQL transports) or a database without row locks
that skip (SQLite) is never the fallback: what would be tested then is not what runs in production.
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devstack import postgres, rabbitmq, state, valkey
from devstack.processes import PORTS, Process, stop, wait_until_ready


@dataclass(frozen=True)
class Services:
    """The URLs of the services, and the processes that are ours to start and stop."""

    database_url: str
    broker_url: str
    processes: list[Process]

    @property
    def environment(self) -> dict[str, str]:
        """Return what programs of the project need to reach them."""
        return {"DATABASE_URL": self.database_url, "CELERY_BROKER_URL": self.broker_url}


def prepare(
    folder: Path,
    environment: Mapping[str, str],
    *,
    durable: bool = True,
    rabbit: Path | None = None,
) -> Services:
    """Return the services, ready to start; `environment` may name servers to be used instead.

    Their ports depend on the folder, so that URLs stay the same from one start to the next. The
    broker is a RabbitMQ if its program is given, else a Valkey.
    """
    database_url = environment.get("DATABASE_URL", "")
    broker_url = environment.get("CELERY_BROKER_URL", "")
    processes = []
    if not database_url:
        process, database_url = postgres.process(
            folder / "postgres", ports=(own_port(folder, 0),), durable=durable
        )
        processes.append(process)
    if not broker_url and rabbit:
        ports = tuple((own_port(folder, number),) for number in (1, 4, 5))
        more, broker_url = rabbitmq.processes(folder / "rabbitmq", rabbit, ports=ports)
        processes += more
    elif not broker_url:
        process, broker_url = valkey.process(folder / "valkey", ports=(own_port(folder, 1),))
        processes.append(process)
    return Services(database_url, broker_url, processes)


def own_port(folder: Path, offset: int) -> int:
    """Return a port that is likely to be this folder's alone."""
    return PORTS[(zlib.crc32(str(folder.resolve()).encode()) + offset) % len(PORTS)]


@contextmanager
def running(
    folder: Path, environment: Mapping[str, str], *, durable: bool = True
) -> Iterator[Services]:
    """Run the services for the length of a `with` block."""
    services = prepare(folder, environment, durable=durable)
    try:
        for process in services.processes:
            process.start()
        state.record(folder, (process.popen.pid for process in services.processes if process.popen))
        wait_until_ready(services.processes)
        yield services
    finally:
        stop(reversed(services.processes))
        (folder / state.PIDS).unlink(missing_ok=True)
