"""Around each request: its id, its deadline, its line in the log, its place in the metrics, and what a fault looks like from outside.

Nothing that a client sent is logged or counted: not a path, a query, a body, an address or a file's name. An id of a request is taken over
only if it is a UUID, with or without dashes, so that it can carry nothing else.
"""

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.serve import get_replica_context
from ray.serve.exceptions import RayServeException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracts.errors import causes
from serve.problems import DESCRIPTIONS, Problem

access = logging.getLogger("cxray.access")
log = logging.getLogger("cxray.gateway")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
ROOT = Path(__file__).resolve().parents[1]
_UUID = re.compile(r"[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}")


def log_with_serve() -> None:
    """Our lines go where Ray Serve's of this process go, a replica's own file, whatever level of its own lines is asked for.

    At once: where Serve is set for throughput it keeps a thousand lines back, and a replica that is killed takes them along.
    """
    ours = logging.getLogger("cxray")
    ours.setLevel(logging.INFO)
    serves = logging.getLogger("ray.serve").handlers
    ours.handlers[:] = [one.target if isinstance(one, MemoryHandler) and one.target else one for one in serves]


def an_id(given: str) -> str:
    """A request's id: the one that was given, where it can be nothing else, or a new one."""
    return given if _UUID.fullmatch(given.lower()) else str(uuid.uuid4())


@dataclass
class Exchange:
    """One request, as telemetry knows it; `request.state.exchange`. key: the name of the caller's; refused: a problem's kind."""

    id: str
    key: str = "-"
    refused: str | None = None
    status: int = 0


class Metrics:
    """Of one gateway; each of its replicas counts for itself. Labels are routes, methods, statuses and kinds of problems: all ours."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self.requests = Counter("cxray_requests", "Requests answered", labels, registry=self.registry)
        self.seconds = Histogram(
            "cxray_request_seconds", "From the first byte to the answer", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("cxray_requests_in_flight", "Requests under way", registry=self.registry)
        self.refused = Counter("cxray_refused", "Requests refused, by the problem's kind", ("reason",), registry=self.registry)


class Telemetry:
    """ASGI middleware. deadline_s: of a whole request; body_s: by when its body has to be here."""

    def __init__(self, app: ASGIApp, metrics: Metrics, deadline_s: float, body_s: float) -> None:
        self.app, self.metrics, self.deadline_s, self.body_s = app, metrics, deadline_s, body_s
        try:
            get_replica_context()
            self.behind_serve = True
        except RayServeException:
            self.behind_serve = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        exchange = Exchange(an_id(given))
        said = self.behind_serve and exchange.id == given  # Ray Serve's proxy gives each request an id, and tells it
        scope["state"] = {**scope.get("state", {}), "exchange": exchange}

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                if not said:
                    headers["X-Request-ID"] = exchange.id
                headers["Cache-Control"] = "no-store"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        begun = time.perf_counter()
        with self.metrics.in_flight.track_inprogress():
            try:
                await self._answer(exchange, scope, receive, stamped)
            finally:
                self._note(exchange, scope, time.perf_counter() - begun)

    async def _answer(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.deadline_s):
                await self.app(scope, _in_time(receive, self.body_s), send)
            return
        except ClientDisconnect:
            return
        except TimeoutError:
            problem = Problem(504, "too_slow", f"not answered within {self.deadline_s:g} s")
        except Exception as error:  # the outermost place: let through, the server would log its text, which may hold what was sent
            log.error("fault in request %s: %s", exchange.id, _place(error))
            problem = Problem(500, "fault", DESCRIPTIONS[500])
        if not exchange.status:
            exchange.refused = problem.kind
            await problem.response(exchange.id)(scope, receive, send)

    def _note(self, exchange: Exchange, scope: Scope, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "none"
        method = scope["method"] if scope["method"] in METHODS else "other"
        status = exchange.status or 499  # the client went away
        self.metrics.requests.labels(route, method, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if exchange.refused:
            self.metrics.refused.labels(exchange.refused).inc()
        access.info("%s %s %d %.3f s key=%s request=%s", method, route, status, seconds, exchange.key, exchange.id)


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Raises Problem 504 in the route that waits for a body: who sends slowly does not keep a place for as long as models may take."""
    until, whole = asyncio.get_running_loop().time() + seconds, False

    async def received() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise Problem(504, "too_slow", f"the body was not here within {seconds:g} s") from None
        whole = message["type"] != "http.request" or not message.get("more_body")
        return message

    return received


def _place(error: BaseException) -> str:
    """'ValueError at serve/routes/classify.py:42': an exception's class, and the last place in our own files; never its text."""
    kinds = "/".join(dict.fromkeys(type(cause).__name__ for cause in [error, *causes(error)]))
    place, trace = "an unknown place", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and ".venv" not in file.parts:
            place = f"{file.relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{kinds} at {place}"
