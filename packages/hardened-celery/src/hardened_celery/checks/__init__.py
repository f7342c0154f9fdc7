"""Django system checks for Celery: `manage.py check --tag celery`, and a part of plain `check`.

They find settings that Celery does not know, queues and tasks that do not exist, secrets in code,
and combinations of valid settings that lose tasks, run them forever or twice, or block who sends
them. For Celery 5.7.

An error is certain to go wrong; a warning may be meant so, then name its id in
SILENCED_SYSTEM_CHECKS. Not seen: options given to `apply_async` or on a command line, and schedules
that are kept in a database.
"""

import os
import re
import traceback
from collections.abc import Callable
from typing import Any

from celery import Celery, current_app
from celery.loaders.default import Loader as UnconfiguredLoader
from django.conf import settings
from django.core.checks import CheckMessage

from hardened_celery.checks import delivery, names, secrets, servers
from hardened_celery.checks.options import Messages, fault

Rule = Callable[[Celery], Messages]
RULES: list[Rule] = [
    *(names.names, names.queues, names.beat),
    *(delivery.visibility, delivery.endless, delivery.lost, delivery.waiting),
    *(servers.blocking, servers.results, servers.broker),
    *(secrets.pickle, secrets.eager, secrets.secrets),
]


def check_celery(**_options: Any) -> list[CheckMessage]:
    """Return every fault of the current Celery app."""
    app = current_app._get_current_object()
    if isinstance(app.loader, UnconfiguredLoader):
        hint = "Import it in the project's __init__.py; shared_task uses RabbitMQ on localhost now."
        return [fault("W011", "No Celery app is loaded with Django.", hint)]
    found: list[CheckMessage] = []
    for rule in (import_tasks, *RULES):
        # one that stops all rules is told once
        found += [message for message in found_by(rule, app) if message not in found]
    return found


def found_by(rule: Rule, app: Celery) -> list[CheckMessage]:
    """Return what a rule finds; when it raises, a warning that it could not look further."""
    found: list[CheckMessage] = []
    try:
        found.extend(rule(app))
    except (Exception, SystemExit) as error:  # whatever a module, or an odd setting, raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        # what was given stands in quotes, and may be a part of a password
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        if isinstance(error, ValueError):
            line = re.sub(r"(['\"]).*\1", "'...'", line)
        text = f"A check could not go on: {line} ({place.filename}:{place.lineno})"
        found.append(fault("W012", text, "Mend that: until then other faults may stay unseen."))
    return found


def import_tasks(app: Celery) -> Messages:
    """Import all modules with tasks, so that the rules see them."""
    skipped = "CELERY_SKIP_CHECKS" in os.environ
    # Else Celery runs all of Django's checks first, this one too.
    os.environ["CELERY_SKIP_CHECKS"] = "1"
    try:
        app.loader.import_default_modules()
        app.finalize()
    finally:
        if not skipped:
            del os.environ["CELERY_SKIP_CHECKS"]
    yield from ()


def check_debug(**_options: Any) -> list[CheckMessage]:
    """Return an error when DEBUG is on where the project is deployed."""
    hint = "Set it to False: error pages show settings and arguments."
    return [fault("E016", "DEBUG is True in a deployment.", hint)] if settings.DEBUG else []
