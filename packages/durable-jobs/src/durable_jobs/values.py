"""What may go into a row; says what is wrong with it while the caller can still act."""

import inspect
import json
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from os.path import dirname
from typing import Any
from uuid import UUID

from django.db import models
from django.utils import timezone
from kombu.utils.json import dumps, loads

from durable_jobs.conf import conf

KEY_MAX_CHARS = 200
OWNER_MAX_CHARS = 255
ID_MAX_CHARS = 255
TASK_MAX_CHARS = 200
QUEUE_MAX_CHARS = 100
# As many attempts as a row can hold: the statements take it for no limit at all.
UNBOUNDED = 32_767
# PostgreSQL stores no NUL character; a backslash before it would make it other text.
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
Arguments = tuple[Any, Any]
# Where the code of other people is, and ours.
LIBRARIES = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), dirname(__file__))


def checked_key(task: str, key: str | int | UUID | None) -> str | None:
    """Return the key as text, or raise TypeError or ValueError."""
    if isinstance(key, int | UUID):
        key = str(key)
    return None if key is None else checked_text(task, "key", key, KEY_MAX_CHARS)


def checked_id(task: str, task_id: Any) -> str | None:
    """Return the id that a call was given, None for none, or raise TypeError or ValueError."""
    if isinstance(task_id, UUID):
        task_id = str(task_id)
    return checked_text(task, "id", task_id, ID_MAX_CHARS) if task_id else None


def checked_text(task: str, name: str, text: str, most: int, least: int = 1) -> str:
    """Return the text, or raise TypeError or ValueError if its column cannot hold it."""
    if not isinstance(text, str):
        raise TypeError(f"{task}: the {name} {text!r} is no text.")
    if not least <= len(text) <= most:
        told = f"has {least} to {most} characters, this one {len(text)}"
        raise ValueError(f"{task}: a {name} {told}.")
    if storable(text) != text:
        raise ValueError(f"{task}: {text!r} has a character that PostgreSQL does not store.")
    return text


def owner_key(owner: models.Model) -> str:
    """Return the owner's primary key as a row holds it, or raise ValueError."""
    name = type(owner).__name__
    if owner.pk is None:
        raise ValueError(f"The owner {owner!r} is not saved: it has no primary key yet.")
    if isinstance(owner.pk, tuple | bytes | memoryview):
        told = "its primary key is composite or binary, and a job can name its owner by neither"
        raise ValueError(f"A {name} cannot own a job: {told}.")
    return checked_text(name, "owner's key", str(owner.pk), OWNER_MAX_CHARS)


def packed(task: str, options: Mapping[str, Any]) -> str:
    """Return a call's options as JSON, or raise TypeError or ValueError."""
    priority = options.get("priority", 0)
    # A broker that was given another would refuse each hint, and the loop would send them for ever.
    if not isinstance(priority, int) or not 0 <= priority <= 255:
        raise ValueError(f"{task}: a priority is a number from 0 to 255, not {priority!r}.")
    for limit in options.get("timelimit", ()):
        if not isinstance(limit, int | float | None):
            raise TypeError(f"{task}: a time limit is a number of seconds, not {limit!r}.")
    try:
        return to_json(options) if options else "{}"
    except (TypeError, ValueError) as error:
        raise type(error)(f"{task}: headers and options must be JSON: {error}") from error


def storable(text: str) -> str:
    """Return the text with NUL characters and lone surrogates spelled out."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def describe(error: BaseException) -> str:
    """Return the traceback; of a long one the begin and the end, where the error stands."""
    text = storable("".join(traceback.format_exception(error)).strip())
    if len(text) <= conf.ERROR_MAX_CHARS:
        return text
    half = conf.ERROR_MAX_CHARS // 2 - 10
    return f"{text[:half]}\n[...]\n{text[-half:]}"


def place(error: BaseException) -> str:
    """Return `file:line in function` where it was raised, in code that is not a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    if not (found := own or frames):
        return "an unknown place"
    return f"{found[-1].filename}:{found[-1].lineno} in {found[-1].name}"


def decode(text: str) -> Any:
    """Return what was encoded; a caller's own `__type__`, which says nothing to Kombu, as it is."""
    try:
        return loads(text)
    except Exception:  # whatever a registered decoder makes of it
        return json.loads(text)


def encode(task: str, value: Any) -> str:
    """Return arguments as JSON; raises TypeError or ValueError."""
    if model := next((item for item in _leaves(value) if isinstance(item, models.Model)), None):
        name = type(model).__name__.lower()
        raise TypeError(
            f"{task} was given a {type(model).__name__} instance. The worker would see an old copy "
            f"of it: pass {name}.pk and read it in the task."
        )
    try:
        text = to_json(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{task}: arguments must be JSON: {error}") from error
    if len(text) > conf.ARGS_MAX_BYTES:
        raise ValueError(
            f"{task}: {len(text)} bytes of arguments, more than ARGS_MAX_BYTES "
            f"({conf.ARGS_MAX_BYTES}). Store the data and pass its key."
        )
    return text


def to_json(value: Any) -> str:
    """Return JSON that PostgreSQL takes; raises TypeError or ValueError."""
    text = str(dumps(value, allow_nan=False))
    if "\\u" in text:
        if NUL.search(text):
            raise ValueError("it has a NUL character, which PostgreSQL does not store")
        try:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a character (a lone surrogate)") from None
    return text


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple | set):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def given(item: Iterable[Any] | Mapping[str, Any]) -> Arguments:
    """Return positional and keyword arguments of an item of `enqueue_many`."""
    return ((), item) if isinstance(item, Mapping) else (tuple(item), {})


def merged(body: Callable[..., Any], before: Arguments, args: Any, kwargs: Any) -> Arguments:
    """Return the arguments of a retry that gives some anew, (None, None) if it gives none.

    As Celery merges them: a keyword may replace what was positional, and the other way round.
    """
    if (args is None) == (kwargs is None):
        return args, kwargs
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    kinds = (inspect.Parameter.POSITIONAL_ONLY, either)
    places = [p for p in inspect.signature(body).parameters.values() if p.kind in kinds]
    if kwargs is None:
        taken = {place.name for place in places[: len(args)] if place.kind is either}
        return args, {name: value for name, value in before[1].items() if name not in taken}
    args, kwargs = list(before[0]), dict(kwargs)
    for number, place in enumerate(places[: len(args)]):
        if place.kind is either and place.name in kwargs:
            args[number] = kwargs.pop(place.name)
    return args, kwargs


def attempts(retries: int | None) -> int:
    """Return how many attempts that many retries are, None being no limit."""
    return UNBOUNDED if retries is None else min(retries + 1, UNBOUNDED - 1)


def budget(task: str, usual: int | None, limit: int | None) -> int:
    """Return the number of attempts, or raise ValueError."""
    limit = usual if limit is None else limit
    if not isinstance(limit, int) or not 0 < limit <= UNBOUNDED:
        raise ValueError(f"{task}: max_attempts is a number from 1, not {limit!r}.")
    return limit


def instant(value: datetime | str | None) -> datetime | None:
    """Return a time with its zone; one without is UTC, as for Celery's worker."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if value is not None and timezone.is_naive(value):
        value = value.replace(tzinfo=UTC)
    if value is not None and not 1 < value.year < 9999:  # elsewhere it is another year
        raise ValueError(f"{value} is no time that every clock can show.")
    return value


def span(task: str, name: str, seconds: float | None) -> float:
    """Return the seconds, or raise ValueError if no clock gets so far."""
    try:
        timezone.now() + timedelta(seconds=seconds or 0, days=366)
    except (OverflowError, ValueError):
        raise ValueError(
            f"{task}: {name}={seconds} is beyond the year 9999; it is in seconds."
        ) from None
    return seconds or 0
