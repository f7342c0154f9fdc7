"""How long until a fault is known, with the default settings; and what a loaded system is told.

python -m devstack run -- .venv/bin/python -m probes.tests.detection --runs 2
python -m devstack run -- .venv/bin/python -m probes.tests.detection --load 600

Needs a database that may be written to: rows of the probes are deleted. Prints its seed.
"""

import argparse
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

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
django.setup()

from django.conf import settings  # noqa: E402
from django.test import Client  # noqa: E402

from probes.models import Node, Queue  # noqa: E402
from probes.tests.conftest import Crew, wait_until  # noqa: E402
from probes.tests.slow import sleep  # noqa: E402

LONGEST = 90
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
    "worker stopped for good": (
        "no_worker",
        lambda crew: (crew.started["work"].popen.terminate(), crew.started["work"].popen.wait(60)),
        lambda crew: crew.worker("work", "default,high,low"),
    ),
}


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


def measure(crew: Crew, told: Told, name: str, rng: random.Random) -> tuple[float, float]:
    """Cause one fault; return the seconds to the 503 and to the webhook."""
    expected, cause, mend = FAULTS[name]
    time.sleep(rng.uniform(0, 10))  # any moment between two probes
    told.news.clear()
    cause(crew)
    begin = time.monotonic()
    wait_until(lambda: answers()["queues"] == 503, LONGEST, name)
    late = time.monotonic() - begin
    assert expected in states(), (name, states())
    assert (answers()["live"], answers()["ready"]) == (200, 200), "blind, as they should be"
    wait_until(lambda: told.news, LONGEST, name)
    heard = told.news[0][0] - begin
    mend(crew)
    wait_until(lambda: answers()["queues"] == 200, LONGEST, name)
    wait_until(lambda: not Queue.objects.exclude(alarm="").exists(), LONGEST, name)
    return late, heard


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--load", type=float, default=0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    Queue.objects.all().delete()
    Node.objects.all().delete()
    logging.disable()
    told, rng = Told(), random.Random(options.seed)
    hook = f"http://127.0.0.1:{told.server_port}/"
    settings.PROBES["WEBHOOK"] = hook  # asking for /healthz/queues notices, too
    environment = {
        **os.environ,
        "PROBES_WEBHOOK": hook,
        "DJANGO_SETTINGS_MODULE": "probes.tests.detection_settings",
    }
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        crew = Crew(Path(folder), environment)
        try:
            crew.everybody()
            if options.load:
                load(crew, options.load)
                return
            time.sleep(40)  # a process that has just started tells nobody
            for name in FAULTS:
                times = [measure(crew, told, name, rng) for _ in range(options.runs)]
                late, heard = (max(each) for each in zip(*times, strict=True))
                print(f"| {name} | {FAULTS[name][0]} | {late:.0f} s | {heard:.0f} s |", flush=True)
        finally:
            crew.end()


if __name__ == "__main__":
    main()
