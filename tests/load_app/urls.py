from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from load_app.models import Wanted
from load_app.tasks import work

# Releases that send more than the first one has it here.
MORE: dict[str, int] = {}


@csrf_exempt
def want(request: HttpRequest) -> HttpResponse:
    """Ask for a job with a POST; a GET only looks."""
    if request.method == "POST":
        seconds, countdown = (float(request.POST[name]) for name in ("seconds", "countdown"))
        queue = "low" if seconds > 2 else "default"
        with transaction.atomic():
            wanted = Wanted.objects.create(seconds=seconds, countdown=countdown)
            args = [wanted.pk, seconds]
            work.apply_async(args, MORE, countdown=countdown or None, queue=queue)
    return HttpResponse(str(Wanted.objects.filter(pk=1).exists()))


urlpatterns = [path("load/", want)]
