"""Settings of the environment: taken literally; what cannot be had stops the process."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent / "{{cookiecutter.project_slug}}"
SECRET = "s3cret"
PRODUCTION = {
    "DATABASE_URL": "postgres://u:p@127.0.0.1:1/n",
    "CELERY_BROKER_URL": "redis://:p@127.0.0.1:1/0",
    "DJANGO_SECRET_KEY": "$q*eo" + "k" * 50,
    "DJANGO_ALLOWED_HOSTS": "a.example, b.example",
}
CHECK = ("manage.py", "check")
SHOW = "import django; django.setup(); from django.conf import settings; print({})"


def python(*arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the project, in production, with more variables."""
    path = str(Path(sys.executable).parent)
    environment = {"PATH": path, "DJANGO_SETTINGS_MODULE": "config.settings", **PRODUCTION, **given}
    return subprocess.run(
        [sys.executable, "-B", *arguments],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def setting(name: str, **given: str) -> str:
    done = python("-c", SHOW.format(f"settings.{name}"), **given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_token_that_begins_with_a_dollar_protects() -> None:
    """django-environ took it for the name of another variable: /metrics answered everybody."""
    token = "$abcdefgh0123456789"
    assert setting("QUEUE_PROBES['TOKEN']", PROBES_TOKEN=token) == token
    assert setting("QUEUE_PROBES['TOKEN']") == "None"


def test_a_key_that_begins_with_a_dollar_is_the_key() -> None:
    assert setting("SECRET_KEY") == PRODUCTION["DJANGO_SECRET_KEY"]


def test_every_host_of_a_list_with_spaces_is_answered() -> None:
    assert setting("ALLOWED_HOSTS") == "['a.example', 'b.example']"


def test_the_line_on_deploys_stands_for_every_list() -> None:
    done = python(*CHECK, DJANGO_ALLOWED_HOSTS=f"{SECRET},,b.example")
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(
        "DJANGO_ALLOWED_HOSTS is not a list with commas between, and no empty item"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROBES_TOKEN", ""),
        ("PROBES_TOKEN", f"{SECRET} {SECRET}"),
        ("PROBES_TOKEN", f" {SECRET}"),
        ("PROBES_TOKEN", f"{SECRET}ä"),
        ("FLOWER_BASIC_AUTH", SECRET),
        ("FLOWER_BASIC_AUTH", ""),
        ("SENTRY_DSN", SECRET),
        ("SENTRY_DSN", f"https://{SECRET}@h:{SECRET}/1"),
        ("DJANGO_SECRET_KEY", ""),
        ("DJANGO_SECURE_SSL_REDIRECT", "ture"),
        ("DJANGO_SECURE_HSTS_SECONDS", f"{SECRET}"),
        ("DJANGO_CSRF_TRUSTED_ORIGINS", f"https://{SECRET},"),
        ("DJANGO_LOG_LEVEL", SECRET),
        ("DATABASE_URL", SECRET),
        ("DATABASE_URL", f"postgres://u:{SECRET}/@h/n"),
        ("DATABASE_URL", f"postgres://u:1#{SECRET}@h/n"),
        ("CELERY_BROKER_URL", SECRET),
        ("CELERY_BROKER_URL", f"redis://:{SECRET}/x@h:6379/0"),
        ("CELERY_BROKER_URL", f"redis://:{SECRET}"),
        ("CELERY_BROKER_URL", f"redis://:1#{SECRET}@h:6379/0"),
        ("CELERY_RESULT_BACKEND", f"redis://:{SECRET}?@h:6379/0"),
        ("CELERY_TASK_ALWAYS_EAGER", SECRET),
        ("CACHE_URL", f"rediscache://:{SECRET}/@h/1"),
        ("EMAIL_URL", f"smtp://u:{SECRET}/@h"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_stops_in_words_without_it(
    name: str, value: str
) -> None:
    done = python(*CHECK, **{name: value})
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    last = said.strip().splitlines()[-1]
    assert ("QUEUE_PROBES['TOKEN']" if name == "PROBES_TOKEN" else name) in last
    assert SECRET not in said


@pytest.mark.parametrize(
    "url",
    [
        "redis://:$pa$s@127.0.0.1:6379/0",
        "redis://:p@[::1]:6379/0",
        "amqp://u:p@h1:5672//;amqp://u:p@h2:5672//",
        "sentinel://:p@h1:26379;sentinel://:p@h2:26379",
        "rediss://u:p%2Fq@h/0?ssl_cert_reqs=required",
    ],
)
def test_urls_that_celery_reads_are_taken(url: str) -> None:
    assert setting("CELERY_BROKER_URL", CELERY_BROKER_URL=url) == url


# Of WEB_CONCURRENCY that is no number gunicorn itself complains, before it reads the file.
@pytest.mark.parametrize(
    ("name", "value"),
    [("WEB_CONCURRENCY", "0"), ("GUNICORN_THREADS", SECRET), ("DJANGO_DEBUG", SECRET)],
)
def test_gunicorn_says_what_is_wrong_with_a_number(name: str, value: str) -> None:
    gunicorn = ("-m", "gunicorn", "--check-config", "config.wsgi", "-c", "config/gunicorn.conf.py")
    done = python(*gunicorn, **{name: value})
    assert done.returncode != 0
    assert f"ValueError: {name} " in done.stderr
    assert SECRET not in done.stderr
