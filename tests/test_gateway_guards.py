"""The guards of the gateway: keys, rates, limits, deadlines; and that nothing which was sent is ever found where it does not belong."""

import asyncio
import base64
import hmac
import json
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_backends import Fake, looks_like_an_image, quick
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from test_gateway import JPEG, client, form, refused

from contracts.errors import CxrayError
from serve.gateway import create
from serve.security import Keys, new_key
from serve.settings import GatewaySettings

Receive = Callable[[], Awaitable[dict[str, Any]]]


@pytest.fixture
def keys(tmp_path) -> tuple[str, str]:
    return str(tmp_path / "keys.json"), new_key(tmp_path / "keys.json", "page")


def asked(app: Any, path: str, headers: dict[str, str], receive: Receive) -> tuple[int, dict[str, Any]]:
    """One POST without a client between: (status, body)."""
    said: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": raw, "server": ("x", 80), "client": ("x", 1)}
    asyncio.run(app(scope, receive, send))
    return said[0]["status"], json.loads(b"".join(message.get("body", b"") for message in said[1:]))


# ---- keys and rates ----


def test_no_key_and_a_wrong_one_are_answered_alike(keys):
    with client(keys, quick()) as api:
        right = api.headers.pop("X-API-Key")
        wrong = ["", "x", right[:-1], right + "x", right.swapcase(), "é" * 43, "x" * 5_000]
        headers = [{}, *({"X-API-Key": w.encode()} for w in wrong), *({"Authorization": f"Bearer {w}".encode()} for w in wrong)]
        headers += [{"Authorization": f"Basic {right}"}, {"Authorization": right}, {"Authorization": "Bearer"}]
        answers = [api.get("/v1/models", headers=h) for h in headers]
        assert len({refused(answer, 401, "no-key") for answer in answers}) == 1
        assert all(answer.headers["www-authenticate"].startswith("Bearer") for answer in answers)
        for good in ({"Authorization": f"Bearer {right}"}, {"X-API-Key": right}):
            assert api.get("/v1/models", headers=good).status_code == 200


def test_a_key_is_256_bits_hashed_at_rest_and_for_its_owner_only(tmp_path):
    file = tmp_path / "below" / "keys.json"
    made = [new_key(file, name) for name in ("page", "ward-2")]
    assert len(set(made)) == 2 and all(len(base64.urlsafe_b64decode(key + "=")) == 32 for key in made)
    assert file.stat().st_mode & 0o777 == 0o600 and [f.name for f in file.parent.iterdir()] == ["keys.json"]
    entries = json.loads(file.read_text())
    assert [set(entry) for entry in entries] == [{"name", "sha256", "created"}] * 2 and not [key for key in made if key in file.read_text()]
    assert [Keys(file).name_of(key) for key in made] == ["page", "ward-2"]
    for name in ("page", "", "Jane Doe", "a" * 33, "-x", "a\n"):
        with pytest.raises(CxrayError):
            new_key(file, name)


def test_every_hash_is_compared_wherever_the_right_one_stands(keys, monkeypatch):
    file = Path(keys[0])
    others = [new_key(file, f"key{n}") for n in range(4)]
    compared: list[tuple] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for key, name in ((keys[1], "page"), (others[-1], "key3"), ("wrong", None)):
        compared.clear()
        assert Keys(file).name_of(key) == name and len(compared) == 5


def test_a_key_that_was_taken_out_is_no_key(keys, caplog):
    file = Path(keys[0])
    with client(keys, quick()) as api:
        assert api.get("/v1/models").status_code == 200
        other = new_key(file, "other")
        assert api.get("/v1/models", headers={"X-API-Key": other}).status_code == 200
        file.write_text(json.dumps([entry for entry in json.loads(file.read_text()) if entry["name"] == "other"]))
        refused(api.get("/v1/models"), 401, "no-key")
        assert api.get("/v1/models", headers={"X-API-Key": other}).status_code == 200
        for spoilt in ("[{", "{}", '[{"name": "other"}]', "\xff"):
            file.write_text(spoilt, encoding="latin-1")
            refused(api.get("/v1/models", headers={"X-API-Key": other}), 401, "no-key")
        file.unlink()
        refused(api.get("/v1/models", headers={"X-API-Key": other}), 401, "no-key")
    assert "cannot be read as a file of keys" in caplog.text


def test_a_rate_is_a_keys_own_and_ends_when_retry_after_says(keys, monkeypatch):
    other = new_key(Path(keys[0]), "other")
    with client(keys, quick(), rate_per_minute=3) as api:
        assert [api.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
        answer = api.get("/v1/models")
        refused(answer, 429, "too-many-requests")
        assert api.get("/v1/models", headers={"X-API-Key": other}).status_code == 200
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + int(answer.headers["retry-after"]))
        assert api.get("/v1/models").status_code == 200


# ---- sizes ----


async def _unread() -> dict[str, Any]:
    raise AssertionError("the body was read")


def test_without_a_key_no_body_is_read(keys):
    app = create(quick(), GatewaySettings(keys=keys[0]))
    for path in ("/v1/classify", "/v1/search", "/v1/embed"):
        assert asked(app, path, {"Content-Type": "application/json", "Content-Length": "10"}, _unread)[0] == 401


def test_a_body_is_refused_by_what_it_says_or_where_it_passes_the_limit(keys):
    app = create(quick(), GatewaySettings(keys=keys[0], max_body_bytes=1_000_000))
    sent = 0

    async def endless() -> dict[str, Any]:
        nonlocal sent
        sent += 100_000
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    kinds = ("image/png", "multipart/form-data; boundary=x", "application/json")
    for path, kind in (*(("/v1/classify", kind) for kind in kinds), ("/v1/search", "application/json"), ("/v1/embed", "application/json")):
        headers = {"X-API-Key": keys[1], "Content-Type": kind}
        for said in ("2000000", "9" * 30):
            assert asked(app, path, headers | {"Content-Length": said}, _unread)[0] == 413
        for lie in ({}, {"Content-Length": "5"}, {"Content-Length": "-1"}, {"Content-Length": "²"}):
            sent = 0
            status, problem = asked(app, path, headers | lie, endless)
            assert (status, problem["status"]) in ((413, 413), (422, 422)) and sent <= 1_200_000
            assert status == 413 or "multipart" in kind  # what is no form is refused for that, and sooner


def test_a_chart_and_the_number_of_parts_are_bounded(keys):
    with client(keys, quick()) as api:
        refused(api.post("/v1/classify", **form(chart='"' + "a" * (1 << 20) + '"')), 413, "too-large")
        as_a_file = {"files": [("chart", ("c.json", b" " * ((1 << 20) + 1)))]}
        refused(api.post("/v1/classify", **as_a_file), 413, "too-large")
        for chart in ({"chief_complaint": "a" * 4_001}, {"history": [{"code": "I10", "version": 10, "title": "b" * 4_001}]}):
            refused(api.post("/v1/classify", json=chart), 422, "bad-chart")
        refused(api.post("/v1/classify", json={"medicines": [{"name": "aspirin"}] * 501}), 422, "bad-chart")
        assert api.post("/v1/classify", json={"medicines": [{"name": "aspirin"}] * 500, "indication": "a" * 4_000}).is_success
        many = {"files": [("image", (f"{n}", JPEG)) for n in range(2_000)]}
        refused(api.post("/v1/classify", **many), 422, "bad-form")
        heads = b"".join(b"X-%d: y\r\n" % n for n in range(5_000))
        body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n' + heads + b"\r\nx\r\n--b--\r\n"
        refused(api.post("/v1/classify", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}), 422, "bad-form")


def test_uploads_never_touch_the_disk(keys, monkeypatch):
    def no(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was written to the disk")

    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp", "mkdtemp", "_TemporaryFileWrapper"):
        monkeypatch.setattr(tempfile, name, no)
    large = JPEG + bytes(3 << 20)
    got: list[bytes] = []
    image = Fake(encode=lambda data: got.append(data) or looks_like_an_image(data), about=dict)
    with client(keys, quick(image=image)) as api:
        assert api.post("/v1/classify", **form(large, large, chart={"medicines": [{"name": "x" * 4_000}] * 30})).status_code == 200
        assert api.post("/v1/classify", content=large, headers={"Content-Type": "image/jpeg"}).status_code == 200
        assert api.post("/v1/search", json={"image": base64.b64encode(large).decode()}).status_code == 200
    assert got == [large] * 4

    async def plain() -> None:
        async def parts() -> Any:
            yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + large + b"\r\n--b--\r\n"

        await MultiPartParser(Headers({"Content-Type": "multipart/form-data; boundary=b"}), parts()).parse()

    with pytest.raises(AssertionError, match="written to the disk"):  # the trap catches what the framework does by itself
        asyncio.run(plain())


# ---- time ----


def test_a_slow_model_is_504_and_is_told_to_stop(keys):
    async def never(*args: Any) -> None:
        await asyncio.Event().wait()

    image, fusion = Fake(encode=never), Fake(classify=never)
    with client(keys, quick(image=image), deadline_s=0.05) as api:
        refused(api.post("/v1/classify", **form(JPEG, JPEG)), 504, "too-slow")
    with client(keys, quick(fusion=fusion), deadline_s=0.05) as api:
        refused(api.post("/v1/classify", **form(JPEG)), 504, "too-slow")
    assert (image.encode.cancelled, fusion.classify.cancelled) == (2, 1)


def test_a_handles_request_is_cancelled_as_ray_wants_it(keys):
    given_up: list[str] = []

    class Response:
        def __await__(self) -> Any:
            return asyncio.Event().wait().__await__()

        def cancel(self) -> None:
            given_up.append("cancel")

    class Remote:
        def remote(self, *args: Any) -> Response:
            return Response()

    image = Fake()
    image.encode = Remote()
    with client(keys, quick(image=image), deadline_s=0.05) as api:
        refused(api.post("/v1/classify", **form(JPEG)), 504, "too-slow")
    assert given_up == ["cancel"]


def test_a_body_that_does_not_come_is_504(keys):
    app = create(quick(), GatewaySettings(keys=keys[0], deadline_s=0.05))

    async def stalled() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    assert asked(app, "/v1/classify", {"X-API-Key": keys[1], "Content-Type": "image/png"}, stalled)[0] == 504


def test_a_client_that_goes_away_is_no_fault(keys, caplog):
    app = create(quick(), GatewaySettings(keys=keys[0]))

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(IndexError):  # there is nobody to answer
        asked(app, "/v1/classify", {"X-API-Key": keys[1], "Content-Type": "image/png"}, gone)
    with TestClient(app) as api:
        text = api.get("/metrics").text
    assert "cxray_requests_in_flight 1.0" in text and 'route="/v1/classify",status="499"} 1.0' in text and "fault" not in caplog.text


# ---- what is told of a request ----


def test_a_fault_is_500_and_the_log_has_its_place_but_not_its_text(keys, caplog):
    def fault(*args: Any) -> None:
        raise KeyError("Jane Doe, study 50000001")

    with client(keys, quick(fusion=Fake(classify=fault))) as api:
        answer = api.post("/v1/classify", **form(JPEG))
    refused(answer, 500, "fault")
    (line,) = {r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR}
    assert line.startswith(f"fault in request {answer.headers['x-request-id']}: KeyError at ") and ".py:" in line
    assert "Jane" not in answer.text + caplog.text and "Traceback" not in caplog.text


def test_the_access_log_stands_beside_serves_own_lines(keys):
    """Which a config may well keep to warnings."""
    lines: list[str] = []
    handler, serves = logging.Handler(), logging.getLogger("ray.serve")
    handler.emit = lambda record: lines.append(record.getMessage())
    serves.addHandler(handler)
    level = serves.level
    try:
        serves.setLevel(logging.WARNING)
        with client(keys, quick()) as api:
            said = api.get("/v1/examples/e1").headers["x-request-id"]
    finally:
        serves.setLevel(level)
        for logger in (serves, logging.getLogger("cxray")):
            logger.removeHandler(handler)
    assert [line for line in lines if line.startswith("GET /v1/examples/{id} 200 ") and line.endswith(f" s key=page request={said}")]


def test_the_metrics_count_by_route_status_and_reason(keys):
    with client(keys, quick(), rate_per_minute=4) as api:
        for path in ("e1", "e1", "e2", "e3", "e4"):
            api.get(f"/v1/examples/{path}")
        api.request("JANE", "/v1/examples/e1")
        api.get("/Jane/Doe")
        families = {f.name: f for f in text_string_to_metric_families(api.get("/metrics").text)}
    counted = {tuple(s.labels.values()): s.value for s in families["cxray_requests"].samples if s.name.endswith("_total")}
    route = "/v1/examples/{id}"
    assert {labels: n for labels, n in counted.items() if route in labels} == {
        ("GET", route, "200"): 2, ("GET", route, "404"): 2, ("GET", route, "429"): 1, ("other", route, "405"): 1,
    }  # fmt: skip
    assert counted[("GET", "none", "404")] == 1
    refused_for = {s.labels["reason"]: s.value for s in families["cxray_refused"].samples if s.name.endswith("_total")}
    assert refused_for == {"no_such_example": 2, "too_many_requests": 1, "method_not_allowed": 1, "not_found": 1}


PLANTED = ("Hildegard", "Quuxworthy", "50417283", "crushing-retrosternal", "sekrit")


def planted_requests(api: TestClient) -> list[Any]:
    """Requests with the planted words wherever a client can put one; most are refused."""
    name, family, study, note, key = PLANTED
    chart = {"chief_complaint": note, "race": family, "age": 67}
    image = (f"{family}_{study}.jpg", JPEG)
    odd = {"User-Agent": family, "Referer": f"http://x/{study}", "X-Request-ID": study, "Cookie": name, "X-Forwarded-For": name}
    return [
        api.post("/v1/classify", files=[("image", image), ("chart", (f"{name}.json", json.dumps(chart)))], headers=odd),
        api.post("/v1/classify", files=[("image", (image[0], f"{name} {study}".encode()))]),
        api.post("/v1/classify", files={family: image}),
        api.post("/v1/classify", params={"evidence": family, name: note}, files={"image": image}),
        *(
            api.post("/v1/classify", **form(chart=wrong))
            for wrong in (
                {name: 1},
                {"sex": name},
                {"age": [note]},
                {"triage": note},
                {"labs": [{family: note}]},
                {"medicines": [note]},
                note,
            )
        ),
        api.post("/v1/classify", content=name, headers={"Content-Type": f"multipart/form-data; boundary={family}"}),
        api.post("/v1/classify", content=name, headers={"Content-Type": f"image/{family}"}),
        api.post("/v1/search", json={"text": note, "filter": {"view": [family], "findings": {name: 1}}}),
        api.post("/v1/search", json={"text": note, "filter": {"view": [f"{family}\n"], family: study}, "via": name, "k": study}),
        api.post("/v1/search", json={"image": base64.b64encode(name.encode()).decode()}),
        api.post("/v1/search", content=f'{{"text": "{note}', headers={"Content-Type": "application/json"}),
        api.post("/v1/embed", json={"texts": [note, 5], name: family}),
        api.get(f"/v1/examples/{study}"),
        api.get(f"/v1/examples/{study * 20}"),
        api.get(f"/{family}/{study}", params={"name": name}),
        api.get("/v1/models", headers={"X-API-Key": key}),
        api.get("/v1/models", headers={"Authorization": f"Bearer {key}-{name}"}),
        api.request(name.upper(), "/v1/models"),
        api.get("/healthz", headers={"X-Request-ID": f"{study}-{name}"}),
    ]


def test_no_word_that_was_sent_is_in_logs_metrics_errors_or_addresses(keys, caplog):
    """With models that fail and put the words in what they raise, too."""
    caplog.set_level(logging.DEBUG)

    def fault(*args: Any) -> None:
        raise RuntimeError(f"{PLANTED[0]}: {args}")

    told = ""
    broken = {"fusion": Fake(classify=fault), "search": Fake(search=fault), "text": Fake(encode=fault)}
    for backends in (quick(), quick(**broken)):
        with client(keys, backends) as api:
            answers = planted_requests(api)
            assert {200, 401, 404, 405, 415, 422} <= {a.status_code for a in answers} | {200}
            told += api.get("/metrics").text + "".join(a.text + str(dict(a.headers)) for a in answers)
    # The client of this test logs the addresses that it asks; what the service logs is all else.
    logged = "\n".join(r.getMessage() + (r.exc_text or "") for r in caplog.records if not r.name.startswith("httpx"))
    assert "POST /v1/classify 200" in logged and "500" in logged and "key=page" in logged
    for word in (*PLANTED, keys[1]):
        assert word.lower() not in (logged + told).lower()
