"""Health endpoints: is this process alive, can it work, and do the queues move?

Each answers within a few milliseconds, and within `TIMEOUT` when the database or the broker hangs.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.utils.crypto import constant_time_compare
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from queue_probes.conf import RELEASE, conf
from queue_probes.diagnosis import Verdict, verdicts
from queue_probes.incidents import teller
from queue_probes.probe import broker

# Of each kind so many at once: what hangs holds up nothing else.
AT_ONCE = 4
_places: defaultdict[str, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(AT_ONCE))
# When nobody got a place for so many times `TIMEOUT`, those who hold them may hang for ever: others
# get new ones, as long as no more than so many hang.
GIVEN_UP = 5
MOST = 3 * AT_ONCE
_taken: dict[str, float] = {}


@never_cache
@require_safe
def live(request: HttpRequest) -> JsonResponse:
    """Answer 200, and which release this is, while the process serves requests."""
    return JsonResponse({"status": "ok", "release": RELEASE})


@never_cache
@require_safe
def ready(request: HttpRequest) -> JsonResponse:
    """Answer 200 when database and broker answer, else 503 and which of them does not.

    `?only=database` leaves the broker out: pages that only enqueue durable jobs work without it.
    """
    wanted = request.GET.getlist("only") or list(CHECKS)
    if unknown := set(wanted) - CHECKS.keys():
        known = ", ".join(CHECKS)
        text = f"only={', '.join(sorted(unknown))}: there are {known}"
        return JsonResponse({"error": text}, status=400)
    found = {name: within(name, CHECKS[name])[1] or "ok" for name in wanted}
    return JsonResponse(found, status=200 if set(found.values()) == {"ok"} else 503)


@never_cache
@require_safe
def queues(request: HttpRequest) -> JsonResponse:
    """Answer 200 when every queue moves, else 503; the facts of each queue either way."""
    if not allowed(request):
        return JsonResponse({"status": "unauthorized"}, status=401)
    found, error = within("facts", _queues)
    if error:
        return JsonResponse({"status": "database_down", "error": error}, status=503)
    fine = all(verdict.fine for verdict in found)
    body = {"status": "ok" if fine else "late", "queues": {v.queue: v.as_dict() for v in found}}
    return JsonResponse(body, status=200 if fine else 503)


def allowed(request: HttpRequest) -> bool:
    """Tell whether the request carries the token, if one is set."""
    given = request.headers.get("Authorization", "")
    return conf.TOKEN is None or constant_time_compare(given, f"Bearer {conf.TOKEN}")


def within(kind: str, check: Callable[[], Any]) -> tuple[Any, str]:
    """Run a check; return what it returns, and what is wrong in one word: "" when nothing is."""
    until = time.monotonic() + conf.TIMEOUT
    places = _places[kind]
    if not places.acquire(timeout=conf.TIMEOUT):
        hanging = sum(thread.name == f"health-{kind}" for thread in threading.enumerate())
        if time.monotonic() - _taken[kind] > GIVEN_UP * conf.TIMEOUT and hanging < MOST:
            _places.pop(kind, None)
        return None, "TimeoutError"
    _taken[kind] = time.monotonic()
    answer: SimpleQueue[tuple[Any, str]] = SimpleQueue()

    def run() -> None:
        try:
            _hurry()
            answer.put((check(), ""))
        except Exception as error:
            # the class only: messages of drivers carry hosts and user names
            answer.put((None, type(error).__name__))
        finally:
            connection.close()
            places.release()

    try:
        # A daemon: a check that hangs does not keep the process from ending.
        threading.Thread(target=run, name=f"health-{kind}", daemon=True).start()
    except RuntimeError as error:  # no more threads
        places.release()
        return None, type(error).__name__
    try:
        return answer.get(timeout=max(0.0, until - time.monotonic()))
    except Empty:
        return None, "TimeoutError"


def _hurry() -> None:
    """Let this thread's connection give up when PostgreSQL is silent or the network is gone."""
    if connection.vendor == "postgresql":
        seconds = math.ceil(conf.TIMEOUT)
        limits = {
            "connect_timeout": seconds,
            "tcp_user_timeout": 1000 * seconds,
            "keepalives_idle": seconds,
            "keepalives_interval": 1,
            "keepalives_count": 3,
        }
        own = connection.settings_dict  # all threads have the same: this one gets a copy
        connection.settings_dict = {**own, "OPTIONS": {**own.get("OPTIONS", {}), **limits}}


def _queues() -> list[Verdict]:
    found = verdicts()
    teller.look()
    return found


def _database() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


CHECKS = {"database": _database, "broker": lambda: broker().release()}
