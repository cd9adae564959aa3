"""A Google Cloud Storage of the tests' own, on this machine: one that works, and one that answers as it is told."""

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from contracts.storage import Place, StorageOptions, place


@pytest.fixture(scope="session")
def store() -> Iterator[StorageOptions]:
    """How to open gs:// there."""
    from gcp_storage_emulator.server import create_server

    HTTPServer.request_queue_size = 128  # it answers one at a time, and several processes ask
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    http = server._api._httpd
    http.handle_error = lambda *_: None  # a client that has its answer may hang up
    yield StorageOptions(anonymous=True, endpoint_url=f"http://127.0.0.1:{http.server_port}", timeout_s=20)
    server.stop()


@pytest.fixture
def bucket(store: StorageOptions) -> Place:
    """A new, empty bucket."""
    new = place(f"gs://bucket-{uuid.uuid4().hex[:8]}", store)
    new.fs.mkdir(new.path)
    return new


def upload(folder: Path, to: Place) -> None:
    """Copy all files of a folder on disk below `to`."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            (to / file.relative_to(folder).as_posix()).write(file.read_bytes())


@dataclass
class Answering:
    """A store that gives every request the same answer, and remembers what it was asked."""

    status: int = 200
    message: str = ""
    reason: str = ""
    port: int = 0
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path with its query, headers (names in small letters)

    def says(self, status: int, message: str, reason: str = "") -> None:
        """From now on answer so, in the form of Google's JSON API; without a reason as bare text, as its downloads do."""
        self.status, self.message, self.reason = status, message, reason

    def body(self) -> bytes:
        if not self.reason:
            return self.message.encode()
        error = {"message": self.message, "domain": "global", "reason": self.reason}
        return json.dumps({"error": {"code": self.status, "message": self.message, "errors": [error]}}).encode()

    def options(self, **more: Any) -> StorageOptions:
        return StorageOptions(**{"anonymous": True, "endpoint_url": f"http://127.0.0.1:{self.port}", "timeout_s": 5, **more})


@pytest.fixture
def answering() -> Iterator[Answering]:
    answers = Answering()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            answers.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = answers.body()
            self.send_response(answers.status)
            self.send_header("Content-Type", "application/json" if answers.reason else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # a client may hang up
        answers.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield answers
        server.shutdown()
