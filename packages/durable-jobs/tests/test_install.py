"""The README, followed to the letter in a project that was not made from this template."""

import ast
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

import durable_jobs
from durable_jobs.conf import DEFAULTS
from tests.conftest import wait_until

pytestmark = pytest.mark.faults
APP = Path(__file__).resolve().parent.parent
SOURCE = APP / "src" / "durable_jobs"
README = (APP / "README.md").read_text()
EXAMPLES = (APP.parent.parent / "docs" / "jobs-examples.md").read_text()
KEPT = ["HOME", "LANG", "TMPDIR", *(name for name in os.environ if name.startswith("PIP_"))]
NAMES = sorted(durable_jobs.__all__, key=lambda name: (name.islower(), name))
# What every Django project with Celery has before it meets this app.
PLAIN_CELERY = """
import os
from celery import Celery
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
app = Celery("mysite")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
"""
SETTINGS = """
import os
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": os.environ["TEST_NAME"],
    "HOST": os.environ["TEST_HOST"], "PORT": os.environ["TEST_PORT"],
    "USER": os.environ["TEST_USER"], "PASSWORD": os.environ["TEST_PASSWORD"],
}}
CELERY_BROKER_URL = os.environ["TEST_BROKER"]
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
INSTALLED_APPS += ["shop"]
"""
# Short enough for a test; the README's block comes before it.
FAST = """
DURABLE_JOBS = {"LEASE": 3, "HEARTBEAT": 1, "TICK": 0.5, "REPUBLISH": 3}
CELERY_BEAT_SCHEDULE["durable_jobs.reconcile"]["schedule"] = 0.5
"""
MODELS = """
from django.db import models

class Effect(models.Model):
    name = models.CharField(max_length=40)
"""
TASKS = """
import time
from celery import shared_task
from shop.models import Effect

@shared_task(atomic=True)
def write(name, seconds=0):
    Effect.objects.create(name=name)
    time.sleep(seconds)
"""


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def blocks(title: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a section: language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", section(title), re.M | re.S)


class Site:
    """A project in a folder, and the processes it runs."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.processes: list[subprocess.Popen[bytes]] = []

    def file(self, name: str) -> Path:
        return self.folder / name

    def append(self, name: str, text: str) -> None:
        self.file(name).write_text(self.file(name).read_text() + text)

    def follow(self, language: str, text: str) -> None:
        """Do what a block of the README says."""
        if language == "sh":
            self.run(text)
        elif language == "python":
            name = re.match(r"# (\S+\.py)", text)[1]
            if "in place of the line that makes the app" in text:
                line = text.partition("\n")[2]
                old = self.file(name).read_text()
                self.file(name).write_text(re.sub(r"app = Celery\(.*\n", line, old))
            else:
                self.append(name, text)
        elif language == "processes":
            for line in text.splitlines():
                self.start(line)

    def run(self, script: str) -> str:
        done = subprocess.run(
            ["sh", "-ec", script],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            text=True,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}"
        return done.stdout

    def shell(self, code: str) -> str:
        return self.run(f"python manage.py shell -v 0 -c {shlex.quote(code)}")

    def start(self, line: str) -> subprocess.Popen[bytes]:
        """Start a program as a service does: as the leader of a group of its own."""
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                shlex.split(line),
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        if "worker" in line:
            wait_until(lambda: " ready." in log.read_text() or process.poll() is not None, 30)
        assert process.poll() is None, log.read_text()
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End the whole group at once, and see that nothing of it is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        wait_until(lambda: not group_lives(process.pid), 10)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    def rows(self, query: str) -> list[tuple]:
        names = {"dbname": "NAME", "host": "HOST", "port": "PORT", "user": "USER"}
        where = {name: self.environment[f"TEST_{key}"] for name, key in names.items()}
        password = self.environment["TEST_PASSWORD"]
        with psycopg.connect(**where, password=password, autocommit=True) as connection:
            return connection.execute(query).fetchall()

    def states(self) -> dict[str, int]:
        return dict(self.rows("SELECT state, count(*) FROM durable_jobs_job GROUP BY state"))

    def unfinished(self) -> int:
        return self.rows("SELECT count(*) FROM durable_jobs_job WHERE due_at IS NOT NULL")[0][0]

    def queued(self) -> int:
        with redis.Redis.from_url(self.environment["TEST_BROKER"]) as broker:
            return broker.llen("celery")

    def effects(self) -> list[str]:
        return [name for (name,) in self.rows("SELECT name FROM shop_effect ORDER BY name")]


def group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """An environment that has what this one has, but none of our packages: those are editable."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    libraries, ours = (
        sysconfig.get_path("purelib"),
        next(folder.glob("lib/python*/site-packages")),
    )
    # Plain paths: files that make editable packages importable are read in neither.
    (ours / "these_tests.pth").write_text(f"{libraries}\n")
    celery = folder / "bin" / "celery"
    celery.write_text(f"#!{python}\nfrom celery.__main__ import main\nmain()\n")
    celery.chmod(0o755)
    return folder / "bin"


@pytest.fixture
def site(tmp_path: Path, programs: Path) -> Iterator[Site]:
    """A plain Django and Celery project with a database of its own."""
    database = f"site_{os.getpid()}_{os.urandom(3).hex()}"
    server = urlsplit(os.environ["DATABASE_URL"])
    broker = urlsplit(os.environ["CELERY_BROKER_URL"])._replace(path="/7").geturl()
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment = kept | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "TEST_NAME": database,
        "TEST_HOST": server.hostname or "",
        "TEST_PORT": str(server.port or ""),
        "TEST_USER": server.username or "",
        "TEST_PASSWORD": server.password or "",
        "TEST_BROKER": broker,
        "PYTHONWARNINGS": "error::DeprecationWarning:mysite",
    }
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")
    made = Site(tmp_path / "mysite", environment)
    made.folder.mkdir()
    (made.folder / "packages").symlink_to(APP.parent)
    made.run("python -m django startproject mysite . && python manage.py startapp shop")
    made.file("mysite/celery.py").write_text(PLAIN_CELERY)
    made.file("mysite/__init__.py").write_text("from mysite.celery import app as celery_app\n")
    made.append("mysite/settings.py", SETTINGS)
    yield made
    for process in made.processes:
        made.kill(process)
    with redis.Redis.from_url(broker) as client:
        client.flushdb()
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {database} WITH (FORCE)")


def install(site: Site) -> list[subprocess.Popen[bytes]]:
    """Take the five steps; return the processes of the last."""
    *steps, last = blocks("Install")
    assert [language for language, _ in (*steps, last)] == [
        "sh",
        "python",
        "python",
        "python",
        "sh",
        "processes",
    ]
    for language, text in steps[:-1]:
        site.follow(language, text)
    site.append("mysite/settings.py", FAST)
    site.follow(*steps[-1])
    site.follow(*last)
    return site.processes


def test_the_five_steps_make_a_fresh_project_durable_and_four_make_it_plain_again(site):
    site.file("shop/models.py").write_text(MODELS)
    site.file("shop/tasks.py").write_text(TASKS)
    site.run("python manage.py makemigrations -v 0 shop && python manage.py migrate -v 0")
    worker, control = install(site)
    kill_the_worker_in_the_middle(site, worker)
    site.kill(control)
    remove(site, site.processes[-1])


def kill_the_worker_in_the_middle(site: Site, worker: subprocess.Popen[bytes]) -> None:
    slow = "SELECT state, attempts FROM durable_jobs_job WHERE args::text LIKE '%slow%'"
    site.shell(
        "from django.db import transaction; from shop.tasks import write\n"
        "with transaction.atomic():\n"
        "    [write.delay(f'slow {n}', 2) for n in (1, 2)]\n"
        "    [write.delay(f'{n}') for n in range(20)]"
    )
    wait_until(lambda: site.rows(slow) == [("running", 1)] * 2)
    site.kill(worker)
    # The fault took effect: nobody holds these two, and their rows do not know it yet.
    assert site.rows(slow) == [("running", 1)] * 2
    assert not [name for name in site.effects() if "slow" in name]
    site.follow("processes", blocks("Install")[-1][1].splitlines()[0])
    wait_until(lambda: site.states() == {"succeeded": 22})
    assert site.rows(slow) == [("succeeded", 2)] * 2
    assert site.effects() == sorted([*map(str, range(20)), "slow 1", "slow 2"])


def remove(site: Site, worker: subprocess.Popen[bytes]) -> None:
    """Take the steps of the removal while jobs are waiting, with the loop that needs no beat."""
    before = site.effects()
    plain, count, last = blocks("Remove it")
    loop = site.start("python manage.py reconcile --loop")
    site.shell(
        "from shop.tasks import write\n"
        "write.delay('durable slow', 2); write.apply_async(['durable later'], countdown=3)"
    )
    site.follow(*plain)
    site.file("shop/tasks.py").write_text(TASKS.replace("(atomic=True)", ""))
    assert "AsyncResult" in site.shell(
        "from shop.tasks import write; print(repr([write.delay(f'plain {n}') for n in range(5)]))"
    )
    wait_until(lambda: not site.unfinished() and not site.queued())
    assert "\n0 unfinished" in "\n" + site.run(count[1])
    site.stop(worker)
    assert "\n0 unfinished" in "\n" + site.run(count[1])
    site.kill(loop)
    settings = site.file("mysite/settings.py").read_text()
    site.follow("sh", last[1])
    for _, text in blocks("Install"):
        if text.startswith("# mysite/settings.py"):
            settings = settings.replace(text, "")
    site.file("mysite/settings.py").write_text(settings.replace(FAST, ""))
    site.start("celery -A mysite worker -l info -Q celery")
    site.shell("from shop.tasks import write; write.delay('after')")
    wait_until(lambda: "after" in site.effects())
    new = ["after", "durable later", "durable slow", *(f"plain {n}" for n in range(5))]
    assert site.effects() == sorted([*before, *new])


# What the examples are part of, and what shows that each does what its comment says.
BANK = """
CALLS, LOSSES = [], []

def charge(cents, idempotency_key):
    CALLS.append(idempotency_key)
    if LOSSES:
        raise LOSSES.pop()
"""
MORE_TESTS = """
from django.test import TestCase
from durable_jobs import Job
from durable_jobs.testing import drain
from shop import bank, models, tasks

class Examples(TestCase):
    def test_each_attempt_shows_the_bank_the_same_key(self):
        bank.CALLS.clear()
        bank.LOSSES.append(OSError("its answer was lost"))
        order = tasks.buy(cents=500)
        drain(everything=True)
        self.assertEqual(bank.CALLS, [order.jobs.get().idempotency_key] * 2)
        order.refresh_from_db()
        self.assertEqual(order.status, "paid")

    def test_nothing_to_pay_is_dead_at_once(self):
        order = tasks.buy(cents=0)
        drain(everything=True)
        self.assertEqual((order.jobs.get().state, order.jobs.get().attempts), ("dead", 1))

    def test_progress_reconciler_and_periodic_job(self):
        order = models.Order.objects.create()
        tasks.export.delay([1, 2, 3])
        first, second = tasks.nightly_report.delay(), tasks.nightly_report.delay()
        self.assertEqual(first.id, second.id)
        drain(reconcile=True)
        order.refresh_from_db()
        self.assertTrue(order.indexed)
        self.assertEqual(first.get(timeout=1), 1)
        self.assertEqual(Job.objects.exclude(state="succeeded").count(), 0)

    def test_a_batch_is_finished_after_its_last_item(self):
        batch = models.Batch.objects.create()
        models.Item.objects.bulk_create(models.Item(batch=batch) for _ in range(3))
        tasks.process(batch)
        models.Job.objects.filter(task="shop.tasks.process_item").update(task="elsewhere")
        drain()
        batch.refresh_from_db()
        self.assertFalse(batch.finished)
        models.Job.objects.filter(task="elsewhere").update(task="shop.tasks.process_item")
        drain()
        drain(everything=True)
        batch.refresh_from_db()
        self.assertTrue(batch.finished)

    def test_what_was_cancelled_does_not_run(self):
        tasks.give_up(tasks.buy(cents=500))
        self.assertEqual((drain(), Job.objects.unfinished().count()), (0, 0))
"""


def test_the_examples_of_the_readme_work(site):
    for language, text in blocks("Install")[:4]:
        site.follow(language, text)
    site.file("shop/bank.py").write_text(BANK)
    for text in re.findall(r"^```python\n(.*?)^```", EXAMPLES, re.M | re.S):
        site.file(re.match(r"# (\S+\.py)", text)[1]).write_text(text)
    site.append("shop/tests.py", MORE_TESTS)
    site.run("python manage.py makemigrations -v 0 shop")
    assert "Ran 6 tests" in site.run("python -W error manage.py test shop")
    # The command that loops knows the reconcilers of modules that nothing else imports.
    site.run("python manage.py migrate -v 0")
    site.shell("from shop.models import Order; Order.objects.create()")
    assert "1 inserted" in site.run("python manage.py reconcile")


def test_the_table_of_settings_is_that_of_the_code():
    table = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section("Settings"), re.M)
    assert {name: ast.literal_eval(default) for name, default in table} == DEFAULTS


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+)`", README + EXAMPLES))
    tests = "".join(path.read_text() for path in APP.glob("tests/test_*.py"))
    assert named - set(re.findall(r"^def (test_\w+)\(", tests, re.M)) == set()
    assert len(named) > 25


def test_the_numbers_of_the_readme_are_those_of_the_code():
    assert len(NAMES) == 9
    assert f"Nine public names: {', '.join(f'`{name}`' for name in NAMES)}." in README
    limit = int(re.search(r"No module has more than (\d+) lines", README)[1])
    sizes = {path.name: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > limit} == {}
    assert len(README.splitlines()) <= 200
