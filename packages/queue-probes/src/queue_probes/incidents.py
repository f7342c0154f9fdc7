"""Tells people of a late queue, once, and once that it moves again: by mail and by webhook.

Any process may look, and several do: beat, every worker, and the web process that is asked for
`/healthz/queues`; each in a thread of its own, since a mail server may hang. Who changes the row
tells. When no way of telling works, or the teller dies, another one tries.
"""

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.core.mail import mail_admins
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now

from queue_probes.conf import conf
from queue_probes.diagnosis import Verdict, verdicts
from queue_probes.models import Queue

logger = logging.getLogger("queue_probes")
WEBHOOK_SECONDS = 5
# Longer than any way of telling takes.
FORGOTTEN = timedelta(seconds=60)
BEGAN = time.monotonic()


def news() -> list[tuple[Verdict, str]]:
    """Return the verdicts that people have not heard of, each with the alarm they have heard."""
    found = verdicts()
    if time.monotonic() - BEGAN < conf.THRESHOLD:
        return []  # everything may just have been started, and the facts be of the time before
    alarms = Queue.objects.exclude(alarm="", told=True)
    told = {row.name: row.alarm for row in alarms if row.alarm}
    if alarms:  # whoever wanted to tell of these may have died before it did
        forgotten = Queue.objects.filter(told=False, alarmed_at__lt=Now() - FORGOTTEN)
        if forgotten.update(alarm=F("alarm_before"), told=True):
            return news()
    changed = [(v, told.get(v.queue, "")) for v in found if v.fine == (v.queue in told)]
    if changed:  # a queue that beat has never looked at has no row to note the incident in
        Queue.objects.bulk_create([Queue(name=v.queue) for v in found], ignore_conflicts=True)
    return changed


def tell() -> None:
    """Look at all queues and tell of what has changed; takes as long as a mail server does."""
    for verdict, before in news():
        rows = Queue.objects.filter(name=verdict.queue)
        after = "" if verdict.fine else verdict.state
        claim = {"alarm": after, "alarm_before": before, "alarmed_at": Now(), "told": False}
        if not rows.filter(alarm=before, told=True).update(**claim):
            continue  # somebody else was faster
        heard = after if send(verdict) else before
        rows.filter(alarm=after).update(alarm=heard, told=True)


class Teller:
    """Tells in a thread of its own, one in each process, when there is something to tell."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def look(self) -> None:
        if news() and self.lock.acquire(blocking=False):
            try:
                threading.Thread(target=self._run, name="queue_probes_tell", daemon=True).start()
            except RuntimeError as error:  # no more threads; the next look may find one
                self.lock.release()
                logger.warning("queue_probes: cannot tell: %r", error)

    def _run(self) -> None:
        try:
            tell()
        except Exception as error:  # a database that is away
            logger.warning("queue_probes: cannot look for late queues: %r", error)
        finally:
            connection.close()
            self.lock.release()


teller = Teller()
os.register_at_fork(after_in_child=lambda: setattr(teller, "lock", threading.Lock()))


def send(verdict: Verdict) -> bool:
    """Log, mail and post the verdict; return False when there are ways to tell and none worked."""
    queue, facts = verdict.queue, verdict.as_dict()
    subject = f"queue {queue} {'moves again' if verdict.fine else 'does not move'}"
    if verdict.fine:
        logger.warning("queue %s moves again", queue)
    else:
        logger.error("queue %s is late: %s", queue, verdict.state, extra={"queue": queue})
    body = "\n".join([verdict.words, "", *(f"{name}: {value}" for name, value in facts.items())])
    ways: dict[str, Callable[[], object]] = {}
    if conf.WEBHOOK:
        news = {"text": f"{subject}: {verdict.words}", **facts}
        ways["webhook"] = lambda: post(conf.WEBHOOK, news)
    if settings.ADMINS:
        ways["mail"] = lambda: mail_admins(subject, body)
    failed = 0
    for name, way in ways.items():  # one that fails neither stops the other nor repeats it
        try:
            way()
        except Exception as error:  # a mail server says anything
            failed += 1
            logger.warning("queue_probes: the %s about %s failed: %r", name, queue, error)
    if ways and failed == len(ways):
        logger.warning("queue_probes: nobody could be told of %s", queue)
    return not ways or failed < len(ways)


def post(url: str, body: dict[str, Any]) -> None:
    """POST JSON; `text` is what chat services show."""
    request = urllib.request.Request(  # noqa: S310 - the project's own setting
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()  # an answer, too: its socket would stay open
        raise
