"""`manage.py reconcile`: one pass; with `--loop` a service that needs neither beat nor broker."""

import math
import signal
import threading
import time
from argparse import ArgumentParser
from typing import Any

from celery import current_app
from django.core.management.base import BaseCommand
from django.db import Error, connections

from durable_jobs.conf import conf
from durable_jobs.publisher import publisher
from durable_jobs.reconcile import loop as passes


class Command(BaseCommand):
    help = "Act on every job whose timer fired. Safe to run many times at once."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--loop", action="store_true", help="Go on until stopped.")
        each, end = "Seconds between passes.", "End the loop after so many."
        parser.add_argument("--interval", type=float, default=conf.TICK, help=each)
        parser.add_argument("--seconds", type=float, default=math.inf, help=end)

    def handle(
        self, *args: Any, loop: bool, interval: float, seconds: float, **options: Any
    ) -> None:
        # Reconcilers are registered where tasks are, which only workers import by themselves.
        current_app.loader.import_default_modules()
        if not loop:
            self.stdout.write(str(passes.run_once()))
            publisher.flush()
            return
        # With a handler of its own it also ends as the first process of a container; but only when
        # the pass has ended, which would else have moved jobs and told no worker of them.
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        end = time.monotonic() + seconds
        while not stop.is_set() and (begin := time.monotonic()) < end:
            try:
                done = passes.run_once()
                if done.moved or done.inserted or done.pruned:
                    self.stdout.write(str(done))
            except Error as error:  # a database that restarts must not end the service
                self.stderr.write(f"pass failed: {error}")
                connections[conf.DATABASE].close()
            stop.wait(max(0.0, interval - (time.monotonic() - begin)))
