"""The page for staff: the queues, who works, what runs, fails and died; and its JSON."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.db.models import F, Max
from django.db.models.functions import Now, TruncMinute
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_POST, require_safe

from queue_probes import jobs as durable
from queue_probes.conf import RELEASE, conf
from queue_probes.diagnosis import verdicts
from queue_probes.models import JobSample, Node, Queue, Sample

logger = logging.getLogger("queue_probes")
# How far the curves go back; they have a point a minute.
MINUTES = 180
WORKERS = 100


@never_cache
@require_safe
def page(request: HttpRequest) -> HttpResponse:
    """Show the frame of the page, which its script fills."""
    if _staff(request):
        return render(request, "queue_probes/status.html")
    user = getattr(request, "user", None)
    if user is not None and user.is_authenticated:
        raise PermissionDenied
    login = durable.admin_url("login") or str(settings.LOGIN_URL)
    return redirect_to_login(request.get_full_path(), login)


@never_cache
@require_safe
def data(request: HttpRequest) -> JsonResponse:
    """Return everything the page shows; spans are seconds, measured by the database."""
    if not _staff(request):
        return JsonResponse({"error": "for staff only"}, status=403)
    now = Queue.objects.annotate(now=Now()).values_list("now", flat=True).first()
    facts = {
        "queues": queues(now),
        "beat": beat(),
        "loop": loop() if durable.job_model() else None,
        "workers": workers(),
        "jobs": jobs(request, now) if durable.job_model() else None,
    }
    known = {"minutes": MINUTES, "interval": conf.INTERVAL, "release": RELEASE}
    return JsonResponse({**known, **facts})


@require_POST
@csrf_protect
def retry(request: HttpRequest) -> JsonResponse:
    """Retry one dead job (`job`), or those of a `task`; return how many will run again."""
    if not (_staff(request) and durable.job_model() and _may(request, "change_job")):
        return JsonResponse({"error": "you may not retry jobs"}, status=403)
    job, task = request.POST.get("job"), request.POST.get("task")
    known = durable.dead().values_list("pk", "task")[: durable.DEAD]
    chosen = [pk for pk, of in known if str(pk) == job or of == task]
    jobs = durable.job_model().objects.filter(pk__in=chosen, state="dead")
    spread = jobs.pace(len(chosen))
    retried = jobs.retry(spread)
    logger.info("user %s retried %d dead jobs: %s", request.user.pk, retried, task or job)
    return JsonResponse({"chosen": len(chosen), "retried": retried, "seconds": spread})


def _staff(request: HttpRequest) -> bool:
    user = getattr(request, "user", None)
    return user is not None and user.is_active and user.is_staff


def _may(request: HttpRequest, permission: str) -> bool:
    return bool(request.user.has_perm(f"durable_jobs.{permission}"))


def queues(now: datetime | None) -> list[dict[str, Any]]:
    """Return the verdict of each queue, and by minute the longest latency of its probes."""
    curves: dict[str, list[float | None]] = {}
    if now:
        found = (
            Sample.objects.filter(at__gt=now - timedelta(minutes=MINUTES))
            .values("queue", minute=TruncMinute("at", tzinfo=UTC))
            .annotate(longest=Max("latency"))
        )
        for row in found:
            curve = curves.setdefault(row["queue"], [None] * MINUTES)
            _put(curve, now, row["minute"], round(row["longest"], 4))
    return [
        {**verdict.as_dict(), "fine": verdict.fine, "curve": curves.get(verdict.queue, [])}
        for verdict in verdicts()
    ]


def beat() -> dict[str, Any]:
    """Return since when beat has not looked, and what the broker said to it."""
    last = Queue.objects.annotate(now=Now()).order_by(F("seen_at").desc(nulls_last=True)).first()
    if last is None or last.seen_at is None:
        return {"age": None, "fine": False, "failure": ""}
    age = _since(last, last.seen_at)
    return {"age": age, "fine": _lately(age), "failure": last.failure if last.failing_since else ""}


def loop() -> dict[str, Any]:
    """Return since when the loop of durable jobs has not passed."""
    age = durable.job_model().objects.loop_age()
    return {"age": age, "fine": age is not None and _lately(age)}


def workers() -> list[dict[str, Any]]:
    """Return what each worker says of itself, and for how long it has been silent."""
    told = ("name", "queues", "release", "slots", "active")
    return [
        {
            **{name: getattr(node, name) for name in told},
            "oldest": _since(node, node.oldest_at),
            "silent": _since(node, node.seen_at),
            "fine": _since(node, node.seen_at) < conf.NODE_TTL,
        }
        for node in Node.objects.annotate(now=Now())[:WORKERS]
    ]


def jobs(request: HttpRequest, now: datetime | None) -> dict[str, Any]:
    """Return how many jobs are in which state, and to who may view jobs what runs and what died."""
    curves: dict[str, list[int | None]] = {}
    if now:
        for row in JobSample.objects.filter(at__gt=now - timedelta(minutes=MINUTES)):
            for state, count in row.counts.items():
                _put(curves.setdefault(state, [None] * MINUTES), now, row.at, count)
    current, seen = durable.counts(durable.COUNTED), _may(request, "view_job")
    full = sum(current.values()) - current["dead"] >= durable.COUNTED
    capped = {**dict.fromkeys(current, full), "dead": current["dead"] >= durable.COUNTED}
    for state in (state for state in current if not capped[state]):
        # The sample of this minute is older than the number that stands above it.
        curves.setdefault(state, [None] * MINUTES)[-1] = current[state]
    return {
        "states": [
            {
                "state": state,
                "count": count,
                "capped": capped[state],
                "curve": curves.get(state, []),
            }
            for state, count in current.items()
        ],
        "failing": durable.failing() if seen else None,
        "running": durable.running() if seen else None,
        "dead": durable.died() if seen else None,
        "retry": _may(request, "change_job"),
    }


def _lately(age: float) -> bool:
    return bool(age <= max(conf.THRESHOLD, 3 * conf.INTERVAL))


def _put(curve: list[Any], now: datetime, minute: datetime, value: Any) -> None:
    """Write a value to its minute; the last place is the current one."""
    back = (now.replace(second=0, microsecond=0) - minute) // timedelta(minutes=1)
    if 0 <= back < len(curve):
        curve[-1 - back] = value


def _since(row: Any, moment: datetime | None) -> Any:
    return None if moment is None else max(0.0, (row.now - moment).total_seconds())
