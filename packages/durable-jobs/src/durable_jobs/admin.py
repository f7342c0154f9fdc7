"""The operator's view: what is unfinished or dead, why, and the verbs Retry and Cancel.

A job is changed by its verbs only, never by a form, which would write over a run in progress.
What the list holds, and what it costs, is in admin_list.py.
"""

from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.views.main import ChangeList
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.db.models import F, Q
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.shortcuts import redirect
from django.urls import URLPattern, path

from durable_jobs.admin_columns import JobColumns
from durable_jobs.admin_list import WINDOW, JobChangeList, QueueFilter, StateFilter, TaskFilter
from durable_jobs.models import Job, JobQuerySet, among
from durable_jobs.transitions import retriable


@admin.register(Job)
class JobAdmin(JobColumns, admin.ModelAdmin):
    list_display = ("state_badge", "task", "when", "tries", "queue", "owner_link", "headline")
    list_display_links = ("state_badge", "task")
    list_filter = (StateFilter, TaskFilter, QueueFilter)
    # What needs somebody comes first: the newest dead, then what is due.
    ordering = (F("finished_at").desc(nulls_last=True), F("due_at").asc())
    search_fields = ("pk",)
    search_help_text = (
        "Exact id, key of an unfinished or dead job, or owner as app.model:id. Without a search,"
        f" the list holds at most {WINDOW:,} of a kind: due first, dead or finished last."
    )
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = ("retry", "cancel")
    fields = readonly_fields = (
        *(
            "state_badge",
            "when",
            "timeline",
            "task",
            "given_id",
            "tries",
            "owner_link",
            "key",
            "queue",
        ),
        *("progress", "message", "error_text", "args_", "kwargs_", "options_", "result_"),
        *("worker", "token", "idempotency_key"),
    )

    class Media:
        css = {"all": ["durable_jobs/admin.css"]}

    # ---- Who may do what

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_verbs_permission(self, request: HttpRequest) -> bool:
        return super().has_change_permission(request)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # The delete page of an owner asks too: its jobs go with it, and runs are fenced off.
        here = request.resolver_match and "_durable_jobs_job_" in request.resolver_match.view_name
        deletable = obj is None or obj.finished or not here
        return deletable and super().has_delete_permission(request, obj)

    def delete_model(self, request: HttpRequest, obj: Job) -> None:
        deleted, _ = Job.objects.filter(pk=obj.pk, due_at=None).delete()
        if not deleted:
            raise PermissionDenied("The job was retried meanwhile.")

    # ---- The list

    def get_changelist(self, request: HttpRequest, **_: Any) -> type[ChangeList]:
        return JobChangeList

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> Any:
        # Django 6.1 says where the actions are shown; before, nobody asks.
        place = {} if action_location is None else {"action_location": action_location}
        actions = super().get_actions(request, **place)
        return {name: action for name, action in actions.items() if name != "delete_selected"}

    def get_search_results(self, request: HttpRequest, queryset: Any, search_term: str) -> Any:
        """Find by equality only, each column through its index."""
        term = search_term.strip()
        if not term:
            return queryset, False
        dead = Job.objects.filter(state=Job.State.DEAD, finished_at__isnull=False, key=term)
        found = Q(key=term, due_at__isnull=False) | Q(given_id=term) | among(dead)
        try:
            found |= Q(pk=UUID(term))
        except ValueError:
            label, _, owner_id = term.partition(":")
            app, _, model = label.lower().rpartition(".")
            owner_type = ContentType.objects.filter(app_label=app, model=model).first()
            if owner_type:
                found |= Q(owner_type=owner_type, owner_id=owner_id)
        return queryset.filter(found), False

    # ---- The verbs

    @admin.action(permissions=["verbs"], description="Retry jobs that are over or back off")
    def retry(self, request: HttpRequest, queryset: JobQuerySet) -> None:
        jobs = self._chosen(request, queryset)
        chosen, able = jobs.count(), jobs.filter(retriable()).count()
        spread = jobs.pace(able)
        retried = jobs.retry(spread)
        over = f" over the next {spread:.0f} seconds" if spread else ""
        self._say(request, retried, f"will run again{over}.", messages.SUCCESS)
        self._say(request, chosen - able, "left as is: neither dead, cancelled nor backing off.")
        twice = "left as is: another job with the same key does it."
        self._say(request, able - retried, twice)

    @admin.action(permissions=["verbs"], description="Cancel unfinished jobs")
    def cancel(self, request: HttpRequest, queryset: JobQuerySet) -> None:
        jobs = self._chosen(request, queryset)
        chosen = jobs.count()
        cancelled = jobs.cancel(f"cancelled by {request.user}")
        self._say(request, cancelled, "cancelled.", messages.SUCCESS)
        self._say(request, chosen - cancelled, "left as is: finished already.")

    def _chosen(self, request: HttpRequest, queryset: JobQuerySet) -> JobQuerySet:
        """Return what was ticked, even if it left the filtered list meanwhile."""
        ticked = request.POST.getlist(ACTION_CHECKBOX_NAME)
        whole_list = request.POST.get("select_across", "0") == "1"
        return Job.objects.filter(pk__in=ticked) if ticked and not whole_list else queryset

    def _say(self, request: HttpRequest, n: int, what: str, level: int = messages.WARNING) -> None:
        if n > 0:
            self.message_user(request, f"{n} {'job' if n == 1 else 'jobs'} {what}", level)

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.verb_view)
        name = "durable_jobs_job_{}".format
        verbs = [
            path(f"<uuid:pk>/{verb}/", view, {"verb": verb}, name=name(verb))
            for verb in self.actions
        ]
        return verbs + super().get_urls()

    def verb_view(self, request: HttpRequest, pk: UUID, verb: str) -> HttpResponse:
        """Do what a button of the detail page says."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        if not self.has_verbs_permission(request):
            raise PermissionDenied
        jobs = Job.objects.filter(pk=pk)
        getattr(self, verb)(request, jobs)
        for job in jobs:
            self.log_change(request, job, f"{verb}: now {job.state}")
        return redirect("../change/")

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **how: Any) -> Any:
        if (obj := how.get("obj")) and self.has_verbs_permission(request):
            context["may_cancel"] = not obj.finished
            context["may_retry"] = Job.objects.filter(retriable(), pk=obj.pk).exists()
        return super().render_change_form(request, context, *args, **how)
