"""Enqueues and watches for one arm: `python driver.py MODULE`, one JSON request per line.

It runs in the arm's own environment and stays for a whole measurement, so that connections and
caches are warm as in a web process.
"""

import importlib
import json
import os
import random
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import django

django.setup()
arm = importlib.import_module(sys.argv[1])

from django.contrib.auth.models import Group  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection, transaction  # noqa: E402

SAMPLE_DEADLINE = 60


def migrate():
    """Create the arm's tables; return nothing."""
    call_command("migrate", verbosity=0)
    getattr(arm, "prepare", lambda: None)()
    clear()


def clear():
    """Forget jobs and domain rows; the broker is the caller's to empty."""
    with connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {', '.join([*arm.TABLES, 'auth_group'])} CASCADE")


def settle():
    """Wait until a publishing thread, if there is one, has nothing to do."""
    getattr(arm, "settle", lambda: None)()


def disconnect():
    """End the session with the database; the next statement begins a new one."""
    connection.close()


def enqueue(calls):
    """Return the seconds of each call: a transaction with a domain row and a job."""
    seconds = []
    for number in range(calls):
        begin = time.perf_counter()
        with transaction.atomic():
            Group.objects.create(name=f"{begin}-{number}")
            arm.send(number)
        seconds.append(time.perf_counter() - begin)
    settle()
    return seconds


def outage(calls, budget):
    """Return the seconds of each call while the broker is away, and how many raised."""
    seconds, raised, begun = [], 0, time.perf_counter()
    for number in range(calls):
        begin = time.perf_counter()
        try:
            with transaction.atomic():
                Group.objects.create(name=f"{begin}-{number}")
                arm.send(number)
        except Exception:
            raised += 1
        seconds.append(time.perf_counter() - begin)
        if time.perf_counter() > begun + budget:
            break
    return {"seconds": seconds, "raised": raised}


def bulk(count):
    """Return how long it took until `count` jobs were enqueued."""
    begin = time.perf_counter()
    arm.send_many(count)
    took = time.perf_counter() - begin
    settle()
    return took


def fill(count):
    """Enqueue one by one, each in a transaction of its own, as a request does."""
    for number in range(count):
        with transaction.atomic():
            arm.send(number)
    settle()
    return arm.left()


def apart(count):
    """Enqueue one by one with one message for each job, as from many processes at once."""
    arm.alone()
    return fill(count)


def watch(count, deadline):
    """Return the seconds from the first finished job to the last."""
    end = time.monotonic() + deadline
    while arm.left() >= count:
        if time.monotonic() > end:
            raise TimeoutError("no job was finished")
        time.sleep(0.005)
    begin = time.perf_counter()
    while remaining := arm.left():
        if time.monotonic() > end:
            raise TimeoutError(f"{remaining} of {count} jobs were left")
        time.sleep(min(0.2, max(0.01, (time.perf_counter() - begin) / 100)))
    return time.perf_counter() - begin


def latency(samples, budget):
    """Return for each sample the seconds from the call to each mark of it, `body` last."""
    found, begun = [], time.monotonic()
    with listener() as ear:
        while len(found) < samples and time.monotonic() < begun + budget:
            time.sleep(random.uniform(0.04, 0.08))  # noqa: S311
            begin = time.time()
            arm.send_start()
            marks = {"call returned": time.time() - begin}
            while "body" not in marks:
                mark, at = ear.recv(200).decode().rsplit(" ", 1)
                if float(at) > begin:  # else a late one of the sample before
                    marks[mark] = float(at) - begin
            found.append(marks)
    return found


def warm():
    """Return once a worker of this arm has run a job."""
    latency(1, SAMPLE_DEADLINE)


def limits(samples):
    """Return the seconds of single round trips, each after a pause like that of `latency`."""
    found = {}
    with arm.app.pool.acquire(block=True) as broker, connection.cursor() as cursor:
        insert = "INSERT INTO auth_group (name) VALUES (gen_random_uuid())"
        push = broker.default_channel.client.lpush
        steps = {
            "SELECT 1": ("on", lambda: cursor.execute("SELECT 1")),
            "INSERT, committed": ("on", lambda: cursor.execute(insert)),
            "INSERT, synchronous_commit off": ("off", lambda: cursor.execute(insert)),
            "LPUSH of 600 bytes": ("on", lambda: push("bench_limit", b"x" * 600)),
        }
        for step, (synchronous, call) in list(steps.items()) * samples:
            cursor.execute(f"SET synchronous_commit = {synchronous}")
            time.sleep(random.uniform(0.04, 0.08))  # noqa: S311
            begin = time.perf_counter()
            call()
            found.setdefault(step, []).append(time.perf_counter() - begin)
        cursor.execute("RESET synchronous_commit")
    return found


def wait_for_body(deadline):
    """Return the time at which the next body started."""
    with listener() as ear:
        ear.settimeout(deadline)
        while True:
            mark, at = ear.recv(200).decode().rsplit(" ", 1)
            if mark == "body":
                return float(at)


def send_hold(name, seconds):
    arm.send_hold(name, seconds)


def groups(name):
    """Return how many domain rows have that name."""
    return Group.objects.filter(name__startswith=name).count()


def due_pass(rows, due, passes):
    return arm.due_pass(rows, due, passes)


def statement_plans(rows, unfinished):
    return arm.statement_plans(rows, unfinished)


def left():
    return arm.left()


def listener():
    path = Path(os.environ["BENCH_SOCKET"])
    with suppress(FileNotFoundError):
        path.unlink()
    ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ear.bind(str(path))
    ear.settimeout(SAMPLE_DEADLINE)
    return ear


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"is": globals()[request.pop("do")](**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
