"""Run what a body has returned and not yet done, in the body's own thread.

The event loop is this thread's, so `self.request`, the task's connection and its transaction are
what they are for plain code: what `sync_to_async` calls, the ORM's `a` methods with it, runs here
between two turns of the loop. A soft time limit raises in code that works, and cancels what waits.
"""

import asyncio
import inspect
import signal
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from asgiref.sync import AsyncToSync
from billiard.pool import SIG_SOFT_TIMEOUT, soft_timeout_sighandler
from celery.exceptions import SoftTimeLimitExceeded

from durable_jobs.exceptions import Permanent

Work = tuple[Future[Any], Callable[[], Any]]


class Loop(asyncio.SelectorEventLoop, Executor):
    """An event loop that is the executor of its own thread."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = threading.get_ident()
        self.work: deque[Work] = deque()
        self.works = self.ended = False
        AsyncToSync.loop_thread_executors[self] = self  # type: ignore[assignment]

    def close(self) -> None:
        super().close()
        AsyncToSync.loop_thread_executors.pop(self, None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, partial(fn, *args, **kwargs)))
        super().stop()
        return future

    def stop(self) -> None:
        self.ended = True
        super().stop()

    def run_forever(self) -> None:
        self.ended = False
        while not self.ended:
            super().run_forever()
            while self.work:
                self._do(*self.work.popleft())

    def _do(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self.works = True
            value = call()
        except BaseException as error:
            self.works = False
            future.set_exception(error)
        else:
            self.works = False
            future.set_result(value)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        # `async_to_sync` in such code would wait for a loop that waits for it; so it makes its own.
        if self.works and threading.get_ident() == self.owner:
            raise RuntimeError("the loop of this thread waits for the code that calls it")
        return super().call_soon_threadsafe(callback, *args, context=context)


def done(value: Any) -> Any:
    """Return what a body means by what it returned: the end of an awaitable, for one."""
    if inspect.isgenerator(value) or inspect.isasyncgen(value):
        raise Permanent(f"it returned {value!r}: a generator, whose code nobody runs")
    if not inspect.isawaitable(value) or _in_loop():  # which is there to await it
        return value
    outer = getattr(AsyncToSync.executors, "current", None)
    AsyncToSync.executors.current = None  # or it would come before the loop's own
    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            loop: Any = runner.get_loop()
            main = loop.create_task(_awaited(value))
            # SystemExit comes out of the loop itself; asyncio need not say that nobody saw it.
            main.add_done_callback(lambda task: task.cancelled() or task.exception())
            with _soft_limit(loop, main):
                return loop.run_until_complete(main)
    finally:
        AsyncToSync.executors.current = outer


def _in_loop() -> bool:
    try:
        return bool(asyncio.get_running_loop())
    except RuntimeError:
        return False


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


@contextmanager
def _soft_limit(loop: Loop, main: asyncio.Task[Any]) -> Iterator[None]:
    """Let the signal cancel the coroutine where it waits: raised in the loop it might get lost."""
    if not SIG_SOFT_TIMEOUT or signal.getsignal(SIG_SOFT_TIMEOUT) is not soft_timeout_sighandler:
        yield  # not in a child of the prefork pool
        return
    exceeded: list[Any] = []

    def on_signal(*received: Any) -> None:
        if loop.works or asyncio.current_task(loop) is main:
            raise SoftTimeLimitExceeded
        exceeded.append(received)
        loop.call_soon_threadsafe(main.cancel)

    signal.signal(SIG_SOFT_TIMEOUT, on_signal)
    try:
        yield
    except asyncio.CancelledError as error:
        if exceeded:
            raise SoftTimeLimitExceeded from error
        raise
    finally:
        signal.signal(SIG_SOFT_TIMEOUT, soft_timeout_sighandler)


def settle(task: Any) -> None:
    """Refuse a task that is a generator, and run a coroutine within Celery's `autoretry_for`."""
    body = inspect.getattr_static(task, "run")
    code = getattr(body, "__func__", body)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise TypeError(f"{task.name} is a generator ('yield'): nobody would run its body.")
    if not inspect.iscoroutinefunction(code):
        return

    @wraps(code)
    def run(*args: Any, **kwargs: Any) -> Any:
        value = code(*args, **kwargs)
        request = task.request_stack.top
        # Called by a person's own code it is theirs to await.
        return value if request is None or request.called_directly else done(value)

    task.run = staticmethod(run) if isinstance(body, staticmethod) else run
