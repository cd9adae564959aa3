"""What stands in Ray's proxy: what a client may not tell it, and its own answers in the service's words."""

import asyncio
import json
import uuid
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.front import Front


def asked(
    app: Any, headers: dict[str, bytes] | None = None, most: int | None = None, body: tuple[bytes, ...] = (b"",)
) -> tuple[int, dict, Any]:
    """One POST through the front to `app`: (status, headers, body)."""
    said: list[Message] = []
    left = list(body)

    async def receive() -> Message:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Message) -> None:
        said.append(message)

    raw = [(name.lower().encode(), value) for name, value in (headers or {}).items()]
    asyncio.run(Front(app, most)({"type": "http", "method": "POST", "path": "/v1/classify", "headers": raw}, receive, send))
    names = [name.lower() for name, _ in said[0]["headers"]]
    assert len(names) == len(set(names)), "a header was said twice"
    told = {name.decode().lower(): value.decode() for name, value in said[0]["headers"]}
    return said[0]["status"], told, b"".join(m.get("body", b"") for m in said[1:])


def answering(status: int, kind: str, body: bytes = b"text", **headers: str) -> Any:
    """As Ray's proxy and its middleware do: the id is taken as it comes, and added to what the gateway has said."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"])[b"x-request-id"]
        more = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        start = [(b"content-type", kind.encode()), (b"x-request-id", given), (b"x-request-id", given), *more]
        await send({"type": "http.response.start", "status": status, "headers": start})
        await send({"type": "http.response.body", "body": body})

    return app


@pytest.mark.parametrize(
    ("theirs", "ours", "wait"),
    [((408, {}), 504, None), ((503, {}), 503, "1"), ((503, {"retry_after": "7"}), 503, "7"), ((500, {}), 503, "1"), ((404, {}), 404, None)],
)
def test_the_proxys_own_refusals_are_problems(theirs, ours, wait):
    status, headers, body = asked(answering(theirs[0], "text/plain; charset=utf-8", b"Request of Jane timed out", **theirs[1]))
    problem = json.loads(body)
    assert (status, headers.get("retry-after"), headers["content-type"]) == (ours, wait, "application/problem+json")
    assert problem["status"] == ours and problem["instance"] == f"urn:uuid:{headers['x-request-id']}" and b"Jane" not in body


def test_the_gateways_answers_pass_as_they_are():
    for status, kind in (
        (200, "text/plain"),
        (200, "application/json"),
        (422, "application/problem+json"),
        (500, "application/problem+json"),
    ):
        assert asked(answering(status, kind, b"said"))[::2] == (status, b"said")


def test_an_unanswered_request_is_503_and_says_when_to_come_again():
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    status, headers, _ = asked(dies)
    assert (status, headers["retry-after"]) == (503, "1") and uuid.UUID(headers["x-request-id"])


def test_ids_are_uuids_and_what_the_proxy_obeys_is_for_its_operators():
    seen: list[dict[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))
        await answering(200, "application/json")(scope, receive, send)

    sent = {"X-API-Key": b"k", "X-Request-Timeout-Seconds": b"9999", "x_request_disconnect_disabled": b"1", "X-Session-Id": b"\xff"}
    sent |= {"serve_multiplexed_model_id": b"\xff", "X-Request-ID": b"Jane\xff"}
    _, headers, _ = asked(app, sent)
    assert set(seen[0]) == {b"x-api-key", b"x-request-id"} and uuid.UUID(seen[0][b"x-request-id"].decode())
    assert headers["x-request-id"].encode() == seen[0][b"x-request-id"]
    mine = str(uuid.uuid4())
    assert asked(app, {"X-Request-ID": mine.encode()})[1]["x-request-id"] == mine


def test_a_body_that_is_too_long_is_not_kept():
    reached: list[int] = []

    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(0)
        while (message := await receive())["type"] == "http.request":
            reached[-1] += len(message["body"])
            if not message["more_body"]:
                await answering(200, "application/json")(scope, receive, send)
                return

    for length in (b"101", b"9" * 30):
        assert asked(reads, {"Content-Length": length}, 100)[0] == 413
    assert not reached
    assert asked(reads, {}, 100, (b"x" * 60,) * 5)[0] == 413 and reached == [60]
    assert asked(reads, {"Content-Length": b"100"}, 100, (b"x" * 60, b"x" * 40))[0] == 200
    assert asked(reads, {}, None, (b"x" * 60,) * 5)[0] == 200
