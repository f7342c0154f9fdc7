"""What worker and beat add to Celery for who supervises them: a heartbeat file, and a prompt end.

The file is touched while a worker's event loop turns and while beat's scheduler does, or while the
main thread is where it may stay long. Waiting for a broker is such a place: a restart would not
bring the broker back. A main process that hangs or is stopped touches nothing. One that hangs for
long writes where each thread was and ends, so that it is started again: not every supervisor looks
at the file. Not seen here: pool processes that hang (time limits end them), and a worker that is
connected but gets no messages.
"""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from celery import Celery, beat, bootsteps, signals
from celery.concurrency.base import apply_target
from celery.worker import WorkController
from kombu.connection import Connection

from hardened_celery import env
from hardened_celery.heartbeat_file import ready
from hardened_celery.requests import PlainTasks

SECONDS = 1
HANG_SECONDS = 60  # after which beat ends, of which there is only one
BROKER_CLIENTS = {"amqp", "redis"}  # packages that wait for answers, which a frozen broker delays
MAY_STAY: set[CodeType] = {
    Connection._ensure_connection.__code__,  # retries until the broker is back; publishing too
    apply_target.__code__,  # the solo pool runs a task in the main thread
    WorkController.stop.__code__,  # waits for running tasks; the launcher sets the deadline
    WorkController.terminate.__code__,
}


def connect(app: Celery) -> None:
    """Add all of it to an app, also where its worker is not run by the launcher."""
    app.steps["worker"].update(STEPS)
    signals.beat_init.connect(watch_beat)


def add_steps(sender: WorkController, **_signal: object) -> None:
    """Add to the worker of an app what `connect` adds; the launcher does that in any project."""
    sender.app.steps["worker"].update(STEPS)


class Heartbeat(bootsteps.StartStopStep):
    """Touch the file named by `WORKER_HEARTBEAT_FILE`; do nothing when that is not set.

    Another of the same name and `.ready` is there once the worker has begun to take messages.
    """

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: WorkController, **options: Any) -> None:
        self.path = os.environ.get("WORKER_HEARTBEAT_FILE")
        self.enabled = bool(self.path)
        self.patience = env.number("WORKER_HANG_SECONDS", 120)
        self.turned = False
        self.ready = ready(Path(str(self.path)))
        super().__init__(worker, **options)

    def start(self, worker: WorkController) -> None:
        """Watch the main thread from another one, which runs as long as the process."""
        self.ready.unlink(missing_ok=True)
        # It takes messages: only now may it replace another. Later the broker may come and go.
        signals.worker_ready.connect(self.note_ready)
        worker.timer.call_repeatedly(SECONDS / 2, self.turn)
        end_unless_called_again(self.patience)
        watch(str(self.path), partial(self.lives, threading.get_ident()))

    def lives(self, main: int) -> bool:
        """Tell whether the event loop turns or waits for what may take long; else its time runs."""
        if not self.came_round() and not may_stay(main):
            return False
        end_unless_called_again(self.patience)
        return True

    def note_ready(self, **_signal: object) -> None:
        self.ready.touch()

    def turn(self) -> None:
        self.turned = True

    def came_round(self) -> bool:
        turned, self.turned = self.turned, False
        return turned


def watch_beat(**_signal: object) -> None:
    """Touch the file named by `BEAT_HEARTBEAT_FILE`, and end beat when it hangs, if that is set."""
    if path := os.environ.get("BEAT_HEARTBEAT_FILE"):
        watch(path, partial(beat_turns, threading.get_ident()))


def beat_turns(main: int) -> bool:
    """Tell whether beat sleeps between two ticks or waits for the broker; else its time runs."""
    frame = sys._current_frames().get(main)
    between = frame is not None and frame.f_code is beat.Service.start.__code__
    if not between and not may_stay(main):
        return False
    end_unless_called_again(HANG_SECONDS)
    return True


def end_unless_called_again(seconds: float) -> None:
    """End this process in so many seconds; needs no lock of the interpreter by then."""
    # Celery by default puts a logger in the place of sys.stderr, which is no file.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)


def watch(path: str, alive: Callable[[], bool]) -> None:
    """Touch a file now and then, from a thread, unless `alive` says no."""
    # A thread, because the main thread turns no loop while it waits for a broker.
    threading.Thread(target=_touch, args=[Path(path), alive], name="heartbeat", daemon=True).start()


def _touch(path: Path, alive: Callable[[], bool]) -> None:
    pause = threading.Event()
    while True:
        # Neither a full disk nor a stack that changes while it is looked at may end the watch.
        with suppress(Exception):
            if alive():
                path.touch()
        pause.wait(SECONDS)


def may_stay(thread: int) -> bool:
    """Tell whether a thread waits for the broker, or is in a function that may take long."""
    frame = sys._current_frames().get(thread)
    while isinstance(frame, FrameType):  # under load one may have ended meanwhile
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


STEPS = {Heartbeat, KeepSent, PlainTasks}
