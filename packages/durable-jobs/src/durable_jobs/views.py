"""How far a job is, as JSON of less than 1 kB: what `durable_jobs/progress.html` polls.

Who may see a job is for the project to say, with `DURABLE_JOBS["MAY_SEE"]`. Everybody else gets
the same 404 as for a job that does not exist.
"""

from uuid import UUID

from django.http import Http404, HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.utils.module_loading import import_string
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from durable_jobs.conf import conf
from durable_jobs.models import Job


def staff_may_see(request: HttpRequest, job: Job) -> bool:
    """The default of `MAY_SEE`."""
    user = request.user
    return user.is_active and user.is_staff and user.has_perm("durable_jobs.view_job")


@never_cache
@require_safe
def progress(request: HttpRequest, pk: UUID) -> JsonResponse:
    """Return state and progress; never the arguments, the result or the error."""
    job = get_object_or_404(Job.objects.defer("args", "kwargs", "result", "error"), pk=pk)
    if not import_string(conf.MAY_SEE)(request, job):
        raise Http404("No Job matches the given query.")
    names = ("state", "progress", "message", "attempts", "max_attempts", "due_at")
    body = {name: getattr(job, name) for name in names}
    # As UTF-8 even 200 emoji stay below 1 kB.
    return JsonResponse(body, json_dumps_params={"ensure_ascii": False})
