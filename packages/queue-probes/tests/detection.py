"""How long until a fault is known, with the default settings; and what a loaded system is told.

python -m tests.detection --runs 2
python -m tests.detection --load 600
python -m tests.detection --cost 120

In this package's folder. Starts its own database and broker, unless DATABASE_URL and
CELERY_BROKER_URL name some: rows of the probes are deleted there. Prints its seed.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import django
import psutil

from devstack import services

SERVICES = contextlib.ExitStack()
FOLDER = Path(SERVICES.enter_context(tempfile.TemporaryDirectory()))
# Before the settings are read.
os.environ |= SERVICES.enter_context(services.running(FOLDER, os.environ)).environment
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
django.setup()

from django.conf import settings  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.test import Client  # noqa: E402

from queue_probes.models import Node, Queue  # noqa: E402
from tests.conftest import Crew, wait_until  # noqa: E402
from tests.slow import sleep  # noqa: E402

LONGEST = 150


def hang(crew: Crew, seconds: float) -> None:
    """Fill the worker's only process with one task."""
    sleep.apply_async((seconds,), queue="default")
    wait_until(lambda: Node.objects.filter(name="work@test", active=1).exists())


FAULTS: dict[str, tuple[str, Callable[[Crew], None], Callable[[Crew], None]]] = {
    "beat killed": (
        "beat_dead",
        lambda crew: crew.signal("beat", signal.SIGKILL),
        lambda crew: crew.beat(),
    ),
    "beat frozen": (
        "beat_dead",
        lambda crew: crew.signal("beat", signal.SIGSTOP),
        lambda crew: crew.signal("beat", signal.SIGCONT),
    ),
    "worker killed": (
        "worker_dead",
        lambda crew: crew.signal("work", signal.SIGKILL),
        lambda crew: crew.worker("work", "default,high,low"),
    ),
    "worker frozen": (
        "worker_stopped",
        lambda crew: crew.signal("work", signal.SIGSTOP),
        lambda crew: crew.signal("work", signal.SIGCONT),
    ),
    "pool stuck": (
        "wedged",
        lambda crew: crew.signal("work", signal.SIGSTOP, main=False),
        lambda crew: crew.signal("work", signal.SIGCONT, main=False),
    ),
    "pool stopped in tasks": (
        "wedged",
        lambda crew: (hang(crew, 60), crew.signal("work", signal.SIGSTOP, main=False)),
        lambda crew: crew.signal("work", signal.SIGCONT, main=False),
    ),
    "tasks that hang": (
        "full",
        lambda crew: hang(crew, 180),
        lambda crew: None,  # they end
    ),
    "worker stopped for good": (
        "no_worker",
        lambda crew: (crew.started["work"].popen.terminate(), crew.started["work"].popen.wait(60)),
        lambda crew: crew.worker("work", "default,high,low"),
    ),
    "broker frozen": (
        "broker_down",
        lambda crew: broker().send_signal(signal.SIGSTOP),
        lambda crew: broker().send_signal(signal.SIGCONT),
    ),
}


def broker() -> psutil.Process:
    """Return the process that listens on the broker's port."""
    port = urlsplit(os.environ["CELERY_BROKER_URL"]).port
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(
                c.laddr.port == port and c.status == "LISTEN" for c in process.net_connections()
            ):
                return process
    raise SystemExit("the broker is not on this machine")


class Told(ThreadingHTTPServer):
    """A webhook that notes when it was told of what."""

    def __init__(self) -> None:
        self.news: list[tuple[float, dict[str, object]]] = []

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.server.news.append((time.monotonic(), body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Receiver)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def answers() -> dict[str, int]:
    client = Client(headers={"Host": "localhost"})
    return {
        name: client.get(f"/healthz/{name}").status_code for name in ("queues", "live", "ready")
    }


def states() -> set[str]:
    found = Client(headers={"Host": "localhost"}).get("/healthz/queues").json()["queues"]
    return {queue["state"] for queue in found.values()}


def metric_is_down() -> bool:
    text = Client(headers={"Host": "localhost"}).get("/metrics").content.decode()
    return any(line.startswith("queue_up{") and line.endswith(" 0.0") for line in text.splitlines())


def logged(crew: Crew) -> int:
    """Return how many errors on late queues beat, workers and this process have logged."""
    found = sum(path.read_text().count(" is late: ") for path in crew.folder.glob("*.log"))
    return found + len(LOGGED)


class Note(logging.Handler):
    """Keeps what this process logs of late queues."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.ERROR:
            LOGGED.append(record)


LOGGED: list[logging.LogRecord] = []


def measure(crew: Crew, told: Told, name: str, rng: random.Random) -> tuple[float, ...]:
    """Cause one fault; return the seconds to the 503, to the metric, the webhook and the log."""
    expected, cause, mend = FAULTS[name]
    time.sleep(rng.uniform(0, 10))  # any moment between two probes
    told.news.clear()
    before = logged(crew)
    cause(crew)
    begin = time.monotonic()
    wait_until(lambda: answers()["queues"] == 503, LONGEST, name)
    late = time.monotonic() - begin
    assert expected in states(), (name, states())
    ready = 503 if expected == "broker_down" else 200
    assert (answers()["live"], answers()["ready"]) == (200, ready), "they see what they should"
    wait_until(metric_is_down, LONGEST, name)
    metric = time.monotonic() - begin
    wait_until(lambda: told.news, LONGEST, name)
    heard = told.news[0][0] - begin
    wait_until(lambda: logged(crew) > before, LONGEST, name)
    line = time.monotonic() - begin
    mend(crew)
    wait_until(lambda: states() == {"ok"}, LONGEST, name)
    wait_until(lambda: not Queue.objects.exclude(alarm="").exists(), LONGEST, name)
    return late, metric, heard, line


def load(crew: Crew, seconds: float) -> None:
    """Keep every queue busy and count the answers that were not 200."""
    end, wrong, asked = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        for queue in ("default", "high", "low"):
            for _ in range(6):
                sleep.apply_async((0.05,), queue=queue)
        asked += 1
        wrong += answers()["queues"] != 200
        time.sleep(1)
    print(f"{seconds:.0f} s under load: {asked} answers, {wrong} of them false alarms")


def cost(crew: Crew, seconds: float) -> None:
    """Print how much of one processor beat and two workers use, with and without probes."""
    for arm in ("with", "without", "with", "without"):
        crew.environment.pop("WITHOUT_PROBES", None)
        if arm == "without":
            crew.environment["WITHOUT_PROBES"] = "1"
        crew.beat()
        crew.worker("work", "default,high,low", 2)
        crew.worker("control", "control")
        time.sleep(20)
        before = used(crew)
        time.sleep(seconds)
        assert all(process.popen.poll() is None for process in crew.started.values())
        print(f"{arm} probes: {(used(crew) - before) / seconds:.2%} of one processor", flush=True)
        crew.end()


def used(crew: Crew) -> float:
    """Return the processor seconds of all that was started."""
    family = [
        each for name in crew.started.values() for each in [name, *name.children(recursive=True)]
    ]
    return sum(sum(process.cpu_times()[:2]) for process in family)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--load", type=float, default=0)
    parser.add_argument("--cost", type=float, default=0)
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    call_command("migrate", verbosity=0)
    Queue.objects.all().delete()
    Node.objects.all().delete()
    logging.getLogger().handlers = [Note()]
    told, rng = Told(), random.Random(options.seed)
    hook = f"http://127.0.0.1:{told.server_port}/"
    settings.QUEUE_PROBES["WEBHOOK"] = hook  # asking for /healthz/queues notices, too
    environment = {
        **os.environ,
        "PROBES_WEBHOOK": hook,
        "DJANGO_SETTINGS_MODULE": "tests.detection_settings",
    }
    print(f"seed {options.seed}")
    with SERVICES:
        crew = Crew(FOLDER, environment)
        try:
            if options.cost:
                cost(crew, options.cost)
                return
            crew.everybody()
            if options.load:
                load(crew, options.load)
                return
            time.sleep(40)  # a process that has just started tells nobody
            for name in options.only:
                times = [measure(crew, told, name, rng) for _ in range(options.runs)]
                worst = " | ".join(f"{max(each):.0f} s" for each in zip(*times, strict=True))
                print(f"| {name} | `{FAULTS[name][0]}` | {worst} |", flush=True)
        finally:
            crew.end()


if __name__ == "__main__":
    main()
