"""How the admin shows a job: a row's text is escaped, and no owner is loaded to be linked."""

import json
from typing import Any

from django.contrib import admin
from django.contrib.contenttypes.models import ContentType
from django.contrib.humanize.templatetags.humanize import naturaltime
from django.urls import NoReverseMatch, reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.timesince import timesince

from durable_jobs.admin_list import HEADLINE_CHARS
from durable_jobs.models import Job


def _pretty(name: str) -> Any:
    @admin.display(description=name)
    def column(self: admin.ModelAdmin, job: Job) -> str:
        return _pre(json.dumps(getattr(job, name), indent=2, ensure_ascii=False))

    return column


def _pre(text: str) -> str:
    return format_html("<pre>{}</pre>", text)


class JobColumns:
    """Mixin of a ModelAdmin."""

    admin_site: admin.AdminSite

    @admin.display(description="state", ordering="state")
    def state_badge(self, job: Job) -> str:
        badge = '<span class="job-state job-{}">{}</span>'
        return format_html(badge, job.state, job.get_state_display())

    @admin.display(description="when", ordering="due_at")
    def when(self, job: Job) -> str:
        if job.finished_at:
            return f"ended {naturaltime(job.finished_at)}"
        if job.due_at and job.due_at < timezone.now():
            return format_html('<b class="job-late">overdue for {}</b>', timesince(job.due_at))
        if job.state == Job.State.SCHEDULED:
            return f"due {naturaltime(job.due_at)}" if job.due_at else ""
        since = job.started_at if job.state == Job.State.RUNNING else job.queued_at
        return f"for {timesince(since)}" if since else ""

    @admin.display(description="attempts", ordering="attempts")
    def tries(self, job: Job) -> str:
        return f"{job.attempts}/{job.max_attempts}"

    @admin.display(description="owner")
    def owner_link(self, job: Job) -> str:
        if job.owner_type_id is None:
            return ""
        kind = ContentType.objects.get_for_id(job.owner_type_id)
        name = f"{kind.name} {job.owner_id}"
        try:
            page = f"admin:{kind.app_label}_{kind.model}_change"
            url = reverse(page, args=[job.owner_id], current_app=self.admin_site.name)
        except NoReverseMatch:
            return name
        return format_html('<a href="{}">{}</a>', url, name)

    @admin.display(description="error")
    def headline(self, job: Any) -> str:
        """Return the last line, in which a traceback says what happened."""
        lines: list[str] = job.tail.strip().splitlines()
        return lines[-1][:HEADLINE_CHARS] if lines else ""

    @admin.display(description="timeline")
    def timeline(self, job: Job) -> str:
        names = ("created", "queued", "started", "finished")
        steps = [(name, at) for name in names if (at := getattr(job, f"{name}_at"))]
        local = (
            # With USE_TZ = False it is naive, and local already.
            (name, at, timezone.localtime(at) if timezone.is_aware(at) else at)
            for name, at in steps
        )
        step = '<span class="job-step">{} <time datetime="{}">{}</time></span>'
        shown = ((name, at.isoformat(), f"{here:%Y-%m-%d %H:%M:%S}") for name, at, here in local)
        return format_html_join("", step, shown)

    @admin.display(description="error")
    def error_text(self, job: Job) -> str:
        return _pre(job.error) if job.error else "-"

    args_, kwargs_, options_, result_ = map(_pretty, ("args", "kwargs", "options", "result"))
