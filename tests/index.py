"""A package index that offers impostors of our five packages, and remembers who asked for what."""

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

from tests.conftest import PACKAGES

VERSION = "99.0"


class Index:
    """Pages as PEP 503 has them; a name that is none of ours is answered with 404."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = folder / "an impostor was imported"
        self.asked: list[str] = []
        self.url = ""
        for package, module in PACKAGES.items():
            self._offer(package, module)

    def _offer(self, package: str, module: str) -> None:
        """Build a wheel, newer than any of ours, that writes the marker when it is imported."""
        name = package.replace("-", "_")
        info = f"{name}-{VERSION}.dist-info"
        files = {
            f"{module}/__init__.py": f"open({str(self.marker)!r}, 'a').write({module!r})\n",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{path},{digest(text)},{len(text)}\n" for path, text in files.items())
        with ZipFile(self.folder / f"{name}-{VERSION}-py3-none-any.whl", "w") as wheel:
            for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
                wheel.writestr(path, text)

    def answer(self, path: str) -> bytes | None:
        """Return a page or a wheel."""
        self.asked.append(path)
        if page := re.fullmatch(r"/simple/([\w.-]+)/", path):
            wheels = self.folder.glob(f"{page[1].replace('-', '_')}-{VERSION}-*.whl")
            links = [f'<a href="/{wheel.name}">{wheel.name}</a>' for wheel in wheels]
            return (
                "<!DOCTYPE html><html><body>{}</body></html>".format("".join(links)).encode()
                if links
                else None
            )
        file = self.folder / path.lstrip("/")
        return file.read_bytes() if file.suffix == ".whl" and file.parent == self.folder else None

    def asked_for_ours(self) -> list[str]:
        """Return the requests for one of our names, of whatever spelling."""
        ours = {re.sub(r"[-_.]+", "-", name) for name in (*PACKAGES, *PACKAGES.values())}
        parts = [(path, re.sub(r"[-_.]+", "-", path).split("/")) for path in self.asked]
        return [
            path
            for path, names in parts
            if any(part == name or part.startswith(f"{name}-99") for part in names for name in ours)
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Return what makes uv ask this index first, and pip take the newest of all indexes."""
        return {"UV_INDEX": self.url, "PIP_EXTRA_INDEX_URL": self.url}


def digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@contextmanager
def impostors(folder: Path) -> Iterator[Index]:
    """Serve impostors for the length of a `with` block."""
    index = Index(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = index.answer(self.path)
            self.send_response(404 if body is None else 200)
            kind = "text/html" if self.path.endswith("/") else "application/octet-stream"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body or b"")

        do_HEAD = do_GET  # noqa: N815 - the name the server looks for

        def log_message(self, *_: object) -> None:
            """Say nothing: what was asked is remembered."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.url = f"http://127.0.0.1:{server.server_port}/simple"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield index
        finally:
            server.shutdown()
            thread.join()
