"""Settings of the environment: taken literally, refused in one line that shows no value."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from hardened_celery import env, literal

SECRET = "s3cret"
Read = Callable[[literal.Env], Any]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Read], Any]:
    """Return a function that reads the variable V, of a given value."""

    def read(value: str, how: Read) -> Any:
        monkeypatch.setenv("V", value)
        monkeypatch.setenv("abc", "of another variable")
        return how(literal.Env())

    return read


@pytest.mark.parametrize("value", ["$abc", "$q*eo$$", "$", r"\$abc", "${abc}", " a b ", ""])
def test_a_text_is_what_is_written(given: Any, value: str) -> None:
    assert given(value, lambda env: env.str("V")) == value
    assert given(value, lambda env: env.str("V", default="other")) == value
    assert given("x", lambda env: env.str("NOT_SET", default=value)) == value


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("a.example, b.example", ["a.example", "b.example"]),
        (" a ", ["a"]),
        ("", ["default"]),
        ("  ", ["default"]),
        ("$abc,b", ["$abc", "b"]),
    ],
)
def test_a_list_is_stripped(given: Any, value: str, items: list[str]) -> None:
    assert given(value, lambda env: env.list("V", default=["default"])) == items
    assert given(value, lambda env: env.tuple("V", default=("default",))) == tuple(items)
    assert given(value, lambda env: env("V", default=["default"])) == items


def test_numbers_of_a_list_are_numbers(given: Any) -> None:
    assert given("1, 2", lambda env: env.list("V", cast=int)) == [1, 2]
    assert given("a=1, b=2", lambda env: env.dict("V")) == {"a": "1", "b": "2"}


@pytest.mark.parametrize(("value", "means"), [("1", True), ("Yes", True), ("off", False)])
def test_a_switch_says_yes_or_no(given: Any, value: str, means: bool) -> None:
    assert given(value, lambda env: env.bool("V")) is means
    assert given("", lambda env: env.bool("V", default=not means)) is not means


def test_a_url_with_a_dollar_is_read(given: Any) -> None:
    found = given("postgres://u:$pa$s@h:5432/n", lambda env: env.db("V"))
    assert (found["PASSWORD"], found["HOST"], found["PORT"]) == ("$pa$s", "h", 5432)
    assert given("postgres://u:p@h1:1,h2:2/n", lambda env: env.db("V"))["HOST"] == "h1,h2"
    assert given("sqlite://:memory:", lambda env: env.db("V"))["NAME"] == ":memory:"
    assert (
        given("rediscache://:$p@h/1", lambda env: env.cache("V"))["LOCATION"] == "redis://:$p@h/1"
    )
    assert given("consolemail:", lambda env: env.email("V"))["EMAIL_BACKEND"]
    assert given("", lambda env: env.cache("V", default="locmemcache://"))["BACKEND"]


@pytest.mark.parametrize(
    ("value", "how", "says"),
    [
        (f"a,,{SECRET}", lambda env: env.list("V"), "no empty item"),
        (f"{SECRET},", lambda env: env.list("V"), "no empty item"),
        (f", {SECRET}", lambda env: env.tuple("V"), "no empty item"),
        (SECRET, lambda env: env.list("V", cast=int), "V is not"),
        (SECRET, lambda env: env.bool("V"), "1 or 0"),
        (SECRET, lambda env: env.int("V", default=3), "a whole number"),
        (f"1{SECRET}", lambda env: env.float("V"), "a number"),
        (SECRET, lambda env: env.json("V"), "V is not"),
        (SECRET, lambda env: env.str("V", choices=["A", "B"]), "none of: A, B"),
        (SECRET, lambda env: env.logins("V"), "user:password"),
        (f":{SECRET}", lambda env: env.logins("V"), "user:password"),
        (f"user:{SECRET},{SECRET}", lambda env: env.logins("V"), "user:password"),
        ("", lambda env: env.logins("V"), "user:password"),
        ("", lambda env: env.db("V"), "V is not set"),
        (SECRET, lambda env: env.db("V"), "no URL like postgres://"),
        (f"${SECRET}", lambda env: env.db("V"), "no URL like postgres://"),
        (f"{SECRET}://u@h/n", lambda env: env.db("V"), "no URL like postgres://"),
        (f"postgres://u:{SECRET}/x@h/n", lambda env: env.db("V"), "%2F"),
        (f"postgres://u:{SECRET}#x@h/n", lambda env: env.db("V"), "%23"),
        (f"postgres://u:12?{SECRET}@h/n", lambda env: env.db("V"), "%3F"),
        (f"postgres://u:{SECRET} x@h/n", lambda env: env.db("V"), "no URL like postgres://"),
        (f"postgres://u:p@h:{SECRET}/n", lambda env: env.db("V"), "no URL like postgres://"),
        (f"redis://:{SECRET}/@h", lambda env: env.cache("V"), "no URL like rediscache://"),
        (f"rediscache://:{SECRET}@a,  b", lambda env: env.cache("V"), "no URL like rediscache://"),
        (f"smtp://u:{SECRET}#@h", lambda env: env.email("V"), "no URL like smtp+tls://"),
    ],
)
def test_what_cannot_be_read_is_one_line_without_the_value(
    given: Any, value: str, how: Read, says: str
) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        given(value, how)
    said = str(caught.value)
    assert said.startswith("V is ")
    assert says in said
    assert SECRET not in said
    assert "\n" not in said
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_line_of_a_file_that_sets_nothing_is_named_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(f"# comment\n\nA='$x'\nB = {SECRET}\n")
    with pytest.raises(ImproperlyConfigured, match=f"line 4 of {file} is not NAME=value"):
        literal.Env.read_env(file)


def test_a_file_is_read_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "")
    monkeypatch.delenv("A")
    file = tmp_path / "env"
    file.write_text("A='$x'\n")
    literal.Env.read_env(file)
    assert literal.Env().str("A") == "$x"


@pytest.mark.parametrize(
    ("value", "how", "says"),
    [
        ("ture", lambda: env.flag("V"), "V says neither yes nor no"),
        (SECRET, lambda: env.number("V", 1), "V is no number of 0 or more"),
        ("2", lambda: env.number("V", 0, 0, 1), "V is no number of 0 to 1"),
        ("1.5", lambda: env.number("V", 1, 1, whole=True), "V is no whole number of 1 or more"),
        ("nan", lambda: env.number("V", 1), "V is no number"),
        ("inf", lambda: env.number("V", 1), "V is no number"),
    ],
)
def test_what_is_no_number_or_switch_is_one_line(
    monkeypatch: pytest.MonkeyPatch, value: str, how: Callable[[], object], says: str
) -> None:
    monkeypatch.setenv("V", value)
    with pytest.raises(ValueError, match=says) as caught:
        how()
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("V", " ")
    assert how() in (0, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SENTRY_DSN", SECRET),
        ("SENTRY_DSN", f"https://{SECRET}@host:{SECRET}/1"),
        ("SENTRY_DSN", f"https://host/{SECRET}"),
        ("SENTRY_TRACES_SAMPLE_RATE", SECRET),
        ("SENTRY_TRACES_SAMPLE_RATE", "1.1"),
        ("SENTRY_MONITOR_BEAT_TASKS", SECRET),
    ],
)
def test_sentry_that_was_asked_for_and_cannot_be_had_stops_the_process(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("SENTRY_DSN", "https://key@127.0.0.1:1/1")
    monkeypatch.setenv(name, value)
    code = "from hardened_celery import sentry; sentry.init()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: {name} ")
    assert SECRET not in done.stderr
