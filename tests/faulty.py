"""A bad day on the way to a store: an HTTP proxy that spoils the answers it is told to spoil, and keeps count."""

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

from contracts.storage import StorageOptions

KINDS = {
    "busy": "503",
    "crowded": "429",
    "stall": "no answer until the client hangs up",
    "reset": "the connection is reset",
    "broken": "half of the body, and the connection ends before the announced length",
    "short": "half of the body, announced as the whole",
    "drip": "a byte now and then, for ever",
}
# (path, how often it was asked for before, number of the request among all) -> one of KINDS, or None for the store's own answer.
Plan = Callable[[str, int, int], str | None]


def never(path: str, before: int, number: int) -> None:
    """No faults."""


def at_random(seed: int, shares: dict[str, float], every: int = 0, burst: int = 0) -> Plan:
    """Faults with these shares, the same for a path and its turn in whatever order requests come; and of each `every` requests the
    first `burst`, but the very first, are answered 429."""

    def plan(path: str, before: int, number: int) -> str | None:
        if every and number >= every and number % every < burst:
            return "crowded"
        drawn = random.Random(f"{seed} {path} {before}").random()
        for kind, share in shares.items():
            drawn -= share
            if drawn < 0:
                return kind
        return None

    return plan


@dataclass
class Faulty:
    """The proxy: what it is to do, and what it did."""

    upstream: str
    plan: Plan = never
    port: int = 0
    delay_s: float = 0.0  # a longer way to the store, so that requests overlap
    did: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)  # by path
    at_once: list[int] = field(default_factory=list)  # requests under way, itself included, as each came
    _under_way: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def options(self, **more: Any) -> StorageOptions:
        return StorageOptions(**{"anonymous": True, "endpoint_url": f"http://127.0.0.1:{self.port}", "timeout_s": 5, **more})

    @contextmanager
    def request(self, path: str) -> Iterator[str | None]:
        """What is to be done with this one."""
        with self._lock:
            fault = self.plan(path, self.asked[path], self.asked.total())
            self.did[fault or "fine"] += 1
            self.asked[path] += 1
            self._under_way += 1
            self.at_once.append(self._under_way)
        try:
            yield fault
        finally:
            with self._lock:
                self._under_way -= 1

    def answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """The store's own."""
        ask = HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        try:
            ask.request(method, path, body, headers)
            got = ask.getresponse()
            return got.status, dict(got.getheaders()), got.read()
        finally:
            ask.close()


@pytest.fixture
def faulty(store) -> Iterator[Faulty]:
    """A proxy before the emulator, without faults until it is given a plan."""
    proxy = Faulty(store.endpoint_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as a store's do

        def handle_one(self) -> None:
            with proxy.request(self.path) as fault:
                time.sleep(proxy.delay_s)
                asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if fault in ("busy", "crowded"):
                    return self.send(503 if fault == "busy" else 429, {}, b"try again later")
                if fault in ("stall", "reset"):
                    return self.hang_up(after=self.client_left if fault == "stall" else None)
                kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection", "accept-encoding")}
                status, headers, body = proxy.answer(self.command, self.path, asked, kept)
                half = body[: len(body) // 2]
                if fault == "broken":
                    self.send(status, headers, half, announced=len(body))
                    return self.hang_up()
                if fault == "drip":
                    return self.drip(status, headers)
                return self.send(status, headers, half if fault == "short" else body)

        do_GET = do_POST = do_PUT = do_DELETE = handle_one

        def send(self, status: int, headers: dict[str, str], body: bytes, announced: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if announced is None else announced))
            self.end_headers()
            self.wfile.write(body)

        def drip(self, status: int, headers: dict[str, str]) -> None:
            self.send(status, headers, b"", announced=1 << 20)
            while True:  # until the write fails
                time.sleep(0.02)
                self.wfile.write(b".")

        def client_left(self) -> None:
            self.connection.settimeout(60)
            self.connection.recv(1)

        def hang_up(self, after: Callable[[], None] | None = None) -> None:
            if after is None:  # closed with this, TCP sends a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                after()
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # a client may hang up
        proxy.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield proxy
        server.shutdown()
