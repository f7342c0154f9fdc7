"""`JobTask`: a Celery task whose calls are rows. Use it as `task_cls` of the app, or as `base=`.

What is left to Celery: routing, headers, signals, signature checks, eager mode, the worker. What is
taken from it: publishing (enqueue.py), the message's arguments (run.py reads them from the row),
retries and results.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn
from uuid import UUID

from celery.contrib.django.task import DjangoTask
from celery.exceptions import Retry
from celery.utils.functional import head_from_fun
from django.db import models

from durable_jobs import attempt, coroutines, run, slices, worker  # noqa: F401 - worker connects its signals
from durable_jobs.attempt import Attempt
from durable_jobs.canvas import JobSignature
from durable_jobs.conf import conf
from durable_jobs.enqueue import Call, RowProducer, TemplateProducer, insert_many
from durable_jobs.exceptions import Unsupported
from durable_jobs.ids import uuid7
from durable_jobs.result import JobResult
from durable_jobs.values import (
    QUEUE_MAX_CHARS,
    UNBOUNDED,
    attempts,
    budget,
    checked_id,
    checked_key,
    checked_text,
    given,
    instant,
    merged,
    span,
)

logger = logging.getLogger("durable_jobs.task")
CANVAS = ("link", "link_error", "chain", "chord", "group_id")
OF_TEMPLATE = (
    "queue",
    "options",
    "packed",
    "delay",
    "eta",
    "expires",
    "expires_at",
    "max_attempts",
)
Tracer = Callable[..., Any]


class JobTask(DjangoTask):
    """A durable task; see the README for what its options mean."""

    abstract = True
    Request = "durable_jobs.worker:HintRequest"

    #: Claims until the job is dead; default `max_retries + 1` if that is given, else the setting.
    max_attempts: int | None = None
    #: Commit the body's writes together with "succeeded", or not at all. For short tasks.
    atomic = False
    #: The key of calls that name none; with `rerun=False` a call changes nothing while one is live.
    key: str | None = None
    rerun = True
    #: False keeps a child from taking more than one job of this task at a time.
    slices = True
    #: The task whose hints wake this one's jobs, where workers cannot know its name at start.
    via: str | None = None

    _tracer: Tracer | None = None

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Settle attempts, and switch off what a wake-up hint must not do."""
        if not cls.name.startswith("celery."):
            retries = next(vars(c)["max_retries"] for c in cls.__mro__ if "max_retries" in vars(c))
            own = cls.__mro__[: cls.__mro__.index(JobTask)]
            explicit = any("max_retries" in vars(c) for c in own)
            if cls.max_attempts is None:
                cls.max_attempts = attempts(retries if explicit else conf.MAX_ATTEMPTS - 1)
            if not explicit:
                cls.max_retries = cls.max_attempts - 1
            # Late, so that a busy worker does not hoard hints an idle one could take; a redelivered
            # hint finds nothing to do.
            cls.acks_late = True
            cls.acks_on_failure = cls.acks_on_timeout = True
            cls.reject_on_worker_lost = cls.retry_on_worker_lost = False
            cls.track_started = False
            if not hasattr(cls, "__header__"):  # a class with `run`: Celery checks nothing
                cls.__header__ = staticmethod(head_from_fun(cls.run, bound=True))
            coroutines.settle(cls)

    @property
    def durable(self) -> bool:
        """Celery's own tasks stay plain even where JobTask is the default."""
        return not self.name.startswith("celery.")

    # Celery builds a tracer per task in each process; ours claims first and then uses that one.
    @property
    def __trace__(self) -> Tracer | None:
        return self._tracer and (self._trace_hint if self.durable else self._tracer)

    @__trace__.setter
    def __trace__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def _trace_hint(self, uuid: str, args: Any, kwargs: Any, request: dict[str, Any]) -> Any:
        return slices.trace(self, self._tracer, uuid, args, kwargs, request)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (mine := attempt.current(self.request.id)) and not mine.entered:
            return run.perform(mine, args, kwargs)
        value = super().__call__(*args, **kwargs)
        return coroutines.done(value) if self.request.is_eager else value

    @property
    def job(self) -> Attempt:
        """The job being run: id, key for idempotency, fencing token, `checkpoint()`."""
        return attempt.of(self) or attempt.unclaimed(self)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Any:  # noqa: N802 - Celery's name
        if not self.durable:
            return super().AsyncResult(task_id, **kwargs)
        return JobResult(task_id, task_name=self.name, app=self._get_app())

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        *,
        key: str | None = None,
        owner: models.Model | None = None,
        max_attempts: int | None = None,
        **options: Any,
    ) -> Any:
        """Write the job in the caller's transaction; see Celery for the options both know."""
        if self.durable:
            self._refuse(link=link, link_error=link_error, **options)
        if not self.durable or self._get_app().conf.task_always_eager:
            return super().apply_async(
                args, kwargs, task_id, producer, link, link_error, shadow, **options
            )
        call = self._call(task_id)
        call.key = checked_key(self.name, self.key if key is None else key)
        call.owner = owner
        call.max_attempts = budget(self.name, self.max_attempts, max_attempts)
        call.timing(options, self.expires)
        if options.get("ignore_result"):
            call.options["ignore_result"] = True
        self._publish(args, kwargs, RowProducer(call), shadow=shadow, **options)
        return self.AsyncResult(call.task_id)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `delay`: the row commits with the caller's transaction."""
        return self.delay(*args, **kwargs)

    def apply_async_on_commit(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply_async(*args, **kwargs)

    def enqueue_many(
        self,
        calls: Iterable[Iterable[Any] | Mapping[str, Any]],
        *,
        key: Callable[[Any], str] | None = None,
        owner: Callable[[Any], models.Model] | None = None,
        countdown: float = 0,
        max_attempts: int | None = None,
        **options: Any,
    ) -> list[UUID]:
        """Write one job for each item (positional or keyword arguments); return the ids in order.

        `key` and `owner` are functions of the item. Headers and routing are of the first call; the
        others pass `before_task_publish` only where that changes its arguments.
        """
        self._refuse(**options)
        if self._get_app().conf.task_always_eager:
            return [UUID(self.apply_async(*given(item), **options).id) for item in calls]
        written: list[Call] = []
        template = self._call()
        template.max_attempts = budget(self.name, self.max_attempts, max_attempts)
        if options.get("ignore_result"):
            template.options["ignore_result"] = True
        options["countdown"] = countdown
        template.timing(options, self.expires)
        changed = self._dump_pydantic_arguments is not None
        for item in calls:
            args, kwargs = given(item)
            call = self._call()
            if not changed:
                if self.typing:
                    self.__header__(*args, **kwargs)
                call.take(args, kwargs)
            if changed or not written:
                self._publish(args, kwargs, TemplateProducer(template), **options)
                changed |= (call.args, call.kwargs) != (template.args, template.kwargs)
                call.args, call.kwargs = template.args, template.kwargs
            vars(call).update({name: getattr(template, name) for name in OF_TEMPLATE})
            call.key = checked_key(self.name, key(item) if key else self.key)
            call.owner = owner and owner(item)
            written.append(call)
        return insert_many(written)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Retry:
        """As in Celery: run again later, unless `max_retries` is used up; the same row.

        Of the call's other options only `queue` can be changed.
        """
        mine = attempt.of(self)
        if mine is None:
            return super().retry(args, kwargs, exc, throw, eta, countdown, max_retries, **options)
        self._refuse(**options)
        asked = mine.asked
        if queue := options.pop("queue", None):
            queue = getattr(queue, "name", queue)
            asked.queue = checked_text(self.name, "queue's name", queue, QUEUE_MAX_CHARS)
        if options:
            logger.warning(
                "durable_jobs: retry of %s keeps the call's %s", mine, ", ".join(options)
            )
        limit = self._retries(mine) if max_retries is None else max_retries
        if limit is not None and mine.attempts > limit:
            asked.final = True
            text = f"Can't retry {self.name}[{self.request.id}] more than {limit} times"
            raise exc or self.MaxRetriesExceededError(text)
        if eta is None and countdown is None:
            countdown = self.default_retry_delay
        when = instant(eta) or span(self.name, "countdown", countdown)
        args, kwargs = merged(self.run, (mine.args, mine.kwargs), args, kwargs)
        if args is not None or kwargs is not None:
            call = self._call(mine.task_id)
            self._publish(args, kwargs, TemplateProducer(call), add_to_parent=False)
            asked.args, asked.kwargs = call.args, call.kwargs
        asked.retry, asked.limit = Retry(exc=exc, when=when), attempts(limit)
        if throw:
            raise asked.retry
        return asked.retry

    def signature(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Return a signature that refuses a place in a canvas where the job could be lost."""
        if not self.durable:
            return super().signature(args, *more, **options)
        return JobSignature(self, args, *more, **{"app": self._get_app(), **options})

    subtask = signature

    def map(self, it: Any, n: int = 0) -> NoReturn:
        """Refused, as `starmap` and `chunks`: one plain message would hold all the calls."""
        raise Unsupported(self.name, "map, starmap or chunks")

    starmap = chunks = map

    def replace(self, sig: Any) -> NoReturn:
        """Refused: the job's id, and with it its row, cannot be another task's."""
        raise Unsupported(self.name, "replace()")

    def _retries(self, mine: Attempt) -> int | None:
        """Return how many retries the call, or else the task, allows; None is no limit."""
        if mine.max_attempts == self.max_attempts:
            return self.max_retries  # type: ignore[no-any-return]
        return None if mine.max_attempts >= UNBOUNDED else mine.max_attempts - 1

    def _refuse(self, **options: Any) -> None:
        if used := [name for name in CANVAS if options.get(name)]:
            raise Unsupported(self.name, " and ".join(used))

    def _publish(self, args: Any, kwargs: Any, producer: RowProducer, **options: Any) -> None:
        """Let Celery make the message, with all who have a say in it; the producer takes it."""
        # Celery's own rendering of the arguments costs more than the insert, its retries of a
        # publication have a connection to repair, and a result backend would be asked for its part.
        options |= {"argsrepr": "", "kwargsrepr": "", "retry": False, "ignore_result": True}
        super().apply_async(args, kwargs, producer.call.task_id, producer, **options)

    def _call(self, task_id: str | None = None) -> Call:
        known = {"id": checked_id(self.name, task_id), "via": self.via}
        return Call(
            task=self.name,
            max_attempts=self.max_attempts or 1,
            id=uuid7(),
            rerun=self.rerun,
            options={name: text for name, text in known.items() if text},
        )
