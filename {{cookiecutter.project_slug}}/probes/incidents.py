"""Tells people of a late queue, once, and once that it moves again: by mail and by webhook.

Any process may look, and several do: beat, every worker, and the web process that is asked for
`/healthz/queues`. Who changes the row tells; when telling fails, it changes the row back, and the
next one tries.
"""

import json
import logging
import time
import urllib.request
from typing import Any

from django.conf import settings
from django.core.mail import mail_admins
from django.db.models.functions import Now

from probes.conf import conf
from probes.diagnosis import Verdict, verdicts
from probes.models import Queue

logger = logging.getLogger("probes")
WEBHOOK_SECONDS = 5
BEGAN = time.monotonic()


def tell() -> list[Verdict]:
    """Look at all queues, tell of what has changed, and return the verdicts."""
    found = verdicts()
    if time.monotonic() - BEGAN < conf.THRESHOLD:
        return found  # everything may just have been started, and the facts be of the time before
    told = dict(Queue.objects.exclude(alarm="").values_list("name", "alarm"))
    for verdict in found:
        if not verdict.fine and verdict.queue not in told:
            _change(verdict, "", verdict.state)
        elif verdict.fine and verdict.queue in told:
            _change(verdict, told[verdict.queue], "")
    return found


def _change(verdict: Verdict, before: str, after: str) -> None:
    rows = Queue.objects.filter(name=verdict.queue)
    if not rows.filter(alarm=before).update(alarm=after, alarmed_at=Now()):
        return  # somebody else was faster
    try:
        send(verdict)
    except Exception as error:  # a mail server says anything
        logger.warning("probes: nobody could be told of %s: %r", verdict.queue, error)
        rows.filter(alarm=after).update(alarm=before)


def send(verdict: Verdict) -> None:
    """Log, mail and post the verdict; raise what the mail server or the webhook answers."""
    if verdict.fine:
        logger.warning("queue %s moves again", verdict.queue)
    else:
        logger.error("queue %s is late: %s", verdict.queue, verdict.state)
    subject = f"queue {verdict.queue} {'moves again' if verdict.fine else 'does not move'}"
    lines = (f"{name}: {value}" for name, value in verdict.as_dict().items())
    if settings.ADMINS:
        mail_admins(subject, f"{verdict.words}\n\n" + "\n".join(lines))
    if conf.WEBHOOK:
        post(conf.WEBHOOK, {"text": f"{subject}: {verdict.words}", **verdict.as_dict()})


def post(url: str, body: dict[str, Any]) -> None:
    """POST JSON; `text` is what chat services show."""
    request = urllib.request.Request(  # noqa: S310 - the project's own setting
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=WEBHOOK_SECONDS).close()  # noqa: S310
