"""What a worker adds to Celery for whoever supervises it: a heartbeat file, and a prompt end.

The file is touched while the event loop turns, or while the main thread is where it may stay long.
Waiting for a broker is such a place: a restart would not bring the broker back. A main process that
hangs or is stopped touches nothing. Not seen here: pool processes that hang (time limits end them),
and a worker that is connected but gets no messages.
"""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

from celery import bootsteps
from celery.concurrency.base import apply_target
from celery.worker import WorkController
from kombu.connection import Connection

SECONDS = 1
BROKER_CLIENTS = {"amqp", "redis"}  # packages that wait for answers, which a frozen broker delays
MAY_STAY: set[CodeType] = {
    Connection._ensure_connection.__code__,  # retries until the broker is back; publishing too
    apply_target.__code__,  # the solo pool runs a task in the main thread
    WorkController.stop.__code__,  # waits for running tasks; the launcher sets the deadline
    WorkController.terminate.__code__,
}


class Heartbeat(bootsteps.StartStopStep):
    """Touch the file named by `WORKER_HEARTBEAT_FILE`; do nothing when that is not set."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: WorkController, **options: Any) -> None:
        self.path = os.environ.get("WORKER_HEARTBEAT_FILE")
        self.enabled = bool(self.path)
        self.turned = False
        super().__init__(worker, **options)

    def start(self, worker: WorkController) -> None:
        """Watch the main thread from another one, which runs as long as the process."""
        worker.timer.call_repeatedly(SECONDS / 2, self.turn)
        main = threading.get_ident()
        # A thread, because the main thread turns no loop while it waits for a broker.
        threading.Thread(target=self.watch, args=[main], name="heartbeat", daemon=True).start()

    def turn(self) -> None:
        """Note that the event loop came round."""
        self.turned = True

    def watch(self, main: int) -> None:
        """Touch the file now and then, unless the main thread hangs."""
        path = Path(str(self.path))
        pause = threading.Event()
        while True:
            if self.turned or may_stay(main):
                self.turned = False
                with suppress(OSError):  # a full disk for a minute must not end the watch
                    path.touch()
            pause.wait(SECONDS)


def may_stay(thread: int) -> bool:
    """Tell whether a thread waits for the broker, or is in a function that may take long."""
    frame = sys._current_frames().get(thread)
    while frame:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if frame.f_code in MAY_STAY or package in BROKER_CLIENTS:
            return True
        frame = frame.f_back
    return False


class KeepSent(bootsteps.StartStopStep):
    """On shutdown, wait for tasks that were just sent to a pool process, as for all that run.

    Celery forgets those whose start the process has not confirmed yet (`Consumer.on_close` calls
    `AsynPool.flush`). The process runs such a task nevertheless, but nobody reads the result: the
    task is not acknowledged and runs again on another worker, and the process waits to be read for
    30 s (billiard, `_ensure_messages_consumed`). Flushing is for lost connections, not for the end.
    """

    requires = ("celery.worker.components:Pool",)

    def close(self, worker: WorkController) -> None:
        """Take `flush` away; Celery looks whether it is there, and other pools have none."""
        worker.pool.flush = None
