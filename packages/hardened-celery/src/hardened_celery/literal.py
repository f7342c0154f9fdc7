"""django-environ's `Env`, for settings that mean what is written in the environment.

`env = literal.Env()` reads as `environ.Env()` does, but for this: a value that begins with `$` is
no name of another one; lists are stripped, and none of their items is empty; a switch says yes or
no; an empty switch, number, list or URL is one that is not set. What cannot be read is one line
with the name of the variable and what it may be. The value is never shown: it may be a secret.
Needs django-environ.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import environ
from django.core.exceptions import ImproperlyConfigured

from hardened_celery.env import switch

NOTSET = environ.Env.NOTSET
VALID = {
    bool: "1 or 0",
    int: "a whole number",
    float: "a number",
    list: "a list with commas between, and no empty item",
}
DATABASE = "postgres://user:password@host:5432/name"
CACHE = "rediscache://host:6379/1"
EMAIL = "smtp+tls://user:password@host:587"


class Env(environ.Env):
    """Takes values literally; has no table of types, each setting says its own."""

    def __init__(self) -> None:
        super().__init__()

    def get_value(
        self, var: str, cast: Any = None, default: Any = NOTSET, parse_default: bool = False
    ) -> Any:
        """Return the value of a variable, or the default if it is not set."""
        text = self.ENVIRON.get(f"{self.prefix}{var}")
        if text is None or (cast is not str and not text.strip()):
            if default is NOTSET:
                raise ImproperlyConfigured(f"{var} is not set")
            return self.parse_value(default, cast) if parse_default and default else default
        if cast is None and default is not NOTSET and default is not None:
            cast = type(default)
        try:
            return self.parse_value(text, cast)
        except Exception:  # whatever a cast raises; its words hold the value
            kind = list if isinstance(cast, (list, tuple)) or cast is tuple else cast
            valid = VALID.get(kind, "what it should be")
            raise ImproperlyConfigured(f"{var} is not {valid}") from None

    @classmethod
    def parse_value(cls, value: Any, cast: Any) -> Any:
        """Return what a text means."""
        if cast is bool:
            return switch(value, "it")
        if cast is float:
            return float(value)
        if cast in (list, tuple, dict) or isinstance(cast, (list, tuple)):
            items = [item.strip() for item in value.split(",")]
            if not all(items):
                raise ValueError
            value = ",".join(items)
        return super().parse_value(value, cast)

    def str(
        self, var: Any, default: Any = NOTSET, multiline: Any = False, choices: Any = ()
    ) -> Any:
        """Return a text; one of the choices, if there are any."""
        value = super().str(var, default, multiline)
        if choices and value not in choices:
            raise ImproperlyConfigured(f"{var} is none of: {', '.join(choices)}")
        return value

    def logins(self, var: Any) -> None:
        """See that a variable that another program reads holds logins, if it is set."""
        for login in self.ENVIRON[var].split(",") if var in self.ENVIRON else ():
            user, _, password = login.partition(":")
            if not user.strip() or not password:
                raise ImproperlyConfigured(f"{var} is not user:password, or several with commas")

    def db_url(self, var: Any = "DATABASE_URL", default: Any = NOTSET, engine: Any = None) -> Any:
        """Return an entry of DATABASES."""
        with self._url(var, DATABASE, () if engine else self.DB_SCHEMES):
            return super().db_url(var, default, engine)

    def cache_url(self, var: Any = "CACHE_URL", default: Any = NOTSET, backend: Any = None) -> Any:
        """Return an entry of CACHES."""
        with self._url(var, CACHE, self.CACHE_SCHEMES):
            return super().cache_url(var, default, backend)

    def email_url(self, var: Any = "EMAIL_URL", default: Any = NOTSET, backend: Any = None) -> Any:
        """Return Django's settings `EMAIL_...`."""
        with self._url(var, EMAIL, self.EMAIL_SCHEMES):
            return super().email_url(var, default, backend)

    db, cache, email = db_url, cache_url, email_url

    @contextmanager
    def _url(self, var: Any, like: Any, schemes: Any) -> Iterator[None]:
        """Raise one line, without the value, for what is no URL or ends before its host."""
        text = self.ENVIRON.get(f"{self.prefix}{var}", "").strip()
        found = re.match(r"([a-z][\w+.-]*):(?://([^/?#\s]*))?(\S*)$", text, re.IGNORECASE)
        known = found and (not schemes or found[1] in schemes)
        # an @ behind the host: what was to be a password has ended it
        if not text or (found and known and not (found[2] and "@" in found[3])):
            try:
                yield
            except ValueError:  # its words hold a part of the password
                pass
            else:
                return
        raise ImproperlyConfigured(
            f"{var} is no URL like {like}; in a password write `/` as %2F, `?` as %3F, `#` as %23"
        ) from None

    @classmethod
    def read_env(cls, env_file: Any, **options: Any) -> None:
        """Read a file of NAME=value into the environment, which wins; a line that is none stops."""
        for number, line in enumerate(Path(env_file).read_text("utf8").splitlines(), 1):
            if line.strip() and not re.match(r"#|(export )?\w+=", line):
                raise ImproperlyConfigured(f"line {number} of {env_file} is not NAME=value")
        super().read_env(env_file, **options)
