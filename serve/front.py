"""What stands in Ray Serve's proxy, before the gateway: `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front:middlewares`.

`cxray serve` says so to a Ray of its own; a cluster that is joined has to be started with it, and with the checkout on its PYTHONPATH.

A gateway that dies under a request leaves it without an answer, of which the proxy's server makes a 500. But coming again helps: another
replica answers at once. The proxy's own refusals are plain text, and it obeys headers by which a client changes its limits or writes into
its log: those are for its operators alone.
"""

import os

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import DESCRIPTIONS, Problem
from serve.telemetry import an_id

SOON = 1  # seconds
MAX_BODY = "CXRAY_MAX_BODY_BYTES"  # in the environment: the gateway's own limit
# What Ray's proxy obeys, or keeps: deadlines, routing, where its answers go.
FOR_OPERATORS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id", b"x-session-id"}


def middlewares() -> list[Middleware]:
    return [Middleware(Front, most=int(os.environ.get(MAX_BODY, "0")) or None)]


class Front:
    """ASGI middleware. most: bytes of a body; None: as many as the gateway takes."""

    def __init__(self, app: ASGIApp, most: int | None = None) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})  # nothing here speaks it
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = Headers(scope=scope)
        request_id = an_id(said.get("x-request-id", ""))
        scope = dict(scope) | {"headers": [*filter(_for_all, scope["headers"]), (b"x-request-id", request_id.encode())]}
        started, problem, seen = False, None, 0
        large = Problem(413, "too_large", f"a body may have {self.most or 0:,} bytes", headers={"Connection": "close"})

        async def noted(message: Message) -> None:
            nonlocal started, problem
            if message["type"] == "http.response.start" and problem is None:
                problem = _in_our_words(message)
                started = problem is None
                MutableHeaders(scope=message)["X-Request-ID"] = request_id  # once: the proxy adds what the gateway has said already
            if problem is None:
                await send(message)

        async def bounded() -> Message:
            nonlocal problem, seen
            message = await receive()
            seen += len(message.get("body", b""))
            if self.most is None or seen <= self.most or started:
                return message
            problem = large
            return {"type": "http.disconnect"}  # so that the proxy lets go of it

        length = said.get("content-length", "")
        if self.most is not None and length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self.most):
            problem = large
        else:
            await self.app(scope, bounded, noted)
        if not started:
            problem = problem or Problem(503, "unavailable", "the service is being started again; come again", retry_after=SOON)
            answer = problem.response(request_id)
            answer.headers.update({"X-Request-ID": request_id, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
            await answer(scope, receive, send)


def _for_all(header: tuple[bytes, bytes]) -> bool:
    """The proxy takes - for _."""
    name = header[0].lower().replace(b"_", b"-")
    return name not in FOR_OPERATORS and name != b"x-request-id" and not name.startswith(b"x-serve-router-")


def _in_our_words(start: Message) -> Problem | None:
    """A refusal of the proxy's own, which are plain text, as the gateway would say it; None for the gateway's answers."""
    status, headers = start["status"], Headers(raw=[tuple(pair) for pair in start.get("headers", [])])
    if status < 400 or not headers.get("content-type", "").startswith("text/plain"):
        return None
    if status == 404:
        return Problem(404, "not_found", DESCRIPTIONS[404])
    if status == 408:
        return Problem(504, "too_slow", "not answered within the deadline")
    wait = headers.get("retry-after", "")
    return Problem(503, "overloaded", DESCRIPTIONS[503], retry_after=max(SOON, int(wait) if wait.isdigit() else SOON))
