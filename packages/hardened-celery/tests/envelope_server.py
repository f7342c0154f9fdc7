"""A Sentry that never leaves this machine: it takes envelopes over HTTP and keeps them."""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Take one envelope."""

    server: "EnvelopeServer"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append((time.monotonic(), body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Be quiet."""


class EnvelopeServer(ThreadingHTTPServer):
    """Keeps the time and the bytes of each envelope, as it came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[tuple[float, bytes]] = []

    @property
    def dsn(self) -> str:
        return f"http://public@127.0.0.1:{self.server_port}/1"

    @property
    def raw(self) -> bytes:
        """Everything that was received."""
        return b"\n".join(body for _, body in self.received)

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Return the payloads of a kind: "event", "transaction", "check_in"."""
        return [
            payload
            for _, body in list(self.received)
            for header, payload in parse(body)
            if header["type"] == kind
        ]

    def events(self, **tags: str) -> list[dict[str, Any]]:
        """Return the events that have all these tags."""
        return [
            event for event in self.items("event") if tags.items() <= event.get("tags", {}).items()
        ]

    def check_ins(self, slug: str) -> list[dict[str, Any]]:
        """Return what a monitor was told."""
        return [item for item in self.items("check_in") if item["monitor_slug"] == slug]


def parse(body: bytes) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield header and payload of each item of an envelope; all the SDK sends here is JSON."""
    lines = iter(body.splitlines()[1:])
    for header in lines:
        if header:
            yield json.loads(header), json.loads(next(lines))


@contextmanager
def running() -> Iterator[EnvelopeServer]:
    """Run a server in a thread."""
    with EnvelopeServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
