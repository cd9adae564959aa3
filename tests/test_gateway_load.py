"""The gateway under load and misfortune: stalled uploads, replicas that die, keys that are made at once."""

# ruff: noqa: F811 - fixtures that come from another file are arguments here

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from fake_backends import Fake, looks_like_an_image, quick
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from test_gateway import JPEG, client, refused
from test_gateway_guards import asked, keys  # noqa: F401 - a fixture among them

from serve.backends import by_value
from serve.gateway import create
from serve.security import Keys, drop_key, new_key
from serve.settings import GatewaySettings

Receive = Callable[[], Awaitable[dict[str, Any]]]


def test_a_key_has_so_many_requests_under_way_and_others_get_in(keys):
    """Uploads that do not come hold a place each, until the body's own deadline."""
    app: Any = create(quick(), GatewaySettings(keys=keys[0], ongoing_per_key=2, body_s=0.2))
    other = new_key(Path(keys[0]), "other")

    async def stalled() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def ask(key: str, receive: Receive) -> int:
        statuses: list[int] = []

        async def send(message: dict[str, Any]) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        head = [(b"x-api-key", key.encode()), (b"content-type", b"image/png")]
        scope = {"type": "http", "method": "POST", "path": "/v1/classify", "raw_path": b"", "query_string": b"", "headers": head}
        await app(scope, receive, send)
        return statuses[0]

    async def sent() -> dict[str, Any]:
        return {"type": "http.request", "body": JPEG, "more_body": False}

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(ask(keys[1], stalled) for _ in range(4)), ask(other, sent))

    for _ in range(2):  # places are given back
        assert sorted(asyncio.run(all_at_once())) == [200, 429, 429, 504, 504]
    assert asyncio.run(ask(keys[1], sent)) == 200


def test_a_slow_body_ends_sooner_than_a_slow_model_may(keys):
    app = create(quick(), GatewaySettings(keys=keys[0], body_s=0.05))

    async def stalled() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    status, problem = asked(app, "/v1/classify", {"X-API-Key": keys[1], "Content-Type": "image/png"}, stalled)
    assert status == 504 and "the body" in problem["detail"]


def test_a_good_upload_outlives_replicas_and_one_that_kills_them_is_not_tried_for_ever(keys):
    dead: list[str] = []

    def dies(data: bytes) -> Any:
        if data.endswith(b"poison") or (data.endswith(b"unlucky") and len(dead) % 2):
            dead.append(f"replica{len(dead)}")
            raise RayActorError(dead[-1])
        if data.endswith(b"unlucky"):
            dead.append("another's")
        return looks_like_an_image(data)

    image = Fake(encode=dies, about=dict)
    with client(keys, quick(image=image)) as api:
        for deaths, status in ((2, 503), (3, 503), (3, 422), (3, 422)):
            answer = api.post("/v1/classify", content=JPEG + b"poison", headers={"Content-Type": "image/jpeg"})
            assert (len(dead), answer.status_code) == (deaths, status)
        for _ in range(5):  # its replica dies under it each time, and each time the next one answers
            dead.append("x") if len(dead) % 2 == 0 else None
            assert api.post("/v1/classify", content=JPEG + b"unlucky", headers={"Content-Type": "image/jpeg"}).status_code == 200


def test_a_replica_that_was_shut_down_is_not_held_against_a_file(keys):
    def ends(data: bytes) -> None:
        raise ReplicaUnavailableError("image#1")

    with client(keys, quick(image=Fake(encode=ends))) as api:
        for _ in range(5):
            refused(api.post("/v1/classify", content=JPEG, headers={"Content-Type": "image/jpeg"}), 503, "unavailable")


def test_a_full_service_is_ready_and_models_are_not_asked_each_time(keys):
    def full() -> None:
        raise BackPressureError(1, 1)

    search = Fake(about=full)
    with client(keys, quick(search=search)) as api:
        assert [api.get("/readyz").status_code for _ in range(5)] == [200] * 5
    assert len(search.about.asked) == 1


def test_keys_that_are_made_at_once_are_all_kept(tmp_path):
    file = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: new_key(file, f"key{n}"), range(16)))
    assert {Keys(file).name_of(key) for key in made} == {f"key{n}" for n in range(16)}
    drop_key(file, "key3")
    assert Keys(file).name_of(made[3]) is None and Keys(file).name_of(made[4]) == "key4" and file.stat().st_mode & 0o777 == 0o600


def test_lines_are_written_at_once_where_serve_keeps_its_own_back(keys):
    """As it does when it is set for throughput."""
    lines: list[str] = []
    file, serves = logging.Handler(), logging.getLogger("ray.serve")
    file.emit = lambda record: lines.append(record.getMessage())
    back = MemoryHandler(1_000, target=file)
    serves.addHandler(back)
    try:
        with client(keys, quick()) as api:
            api.get("/healthz")
    finally:
        serves.removeHandler(back)
        logging.getLogger("cxray").removeHandler(file)
    assert [line for line in lines if line.startswith("GET /healthz 200 ")]


def test_images_go_past_rays_object_store_which_may_spill_to_disk(monkeypatch):
    class Handle:
        def options(self, **how: Any) -> dict[str, Any]:
            return how

    monkeypatch.setattr("serve.backends.DeploymentHandle", Handle)
    assert by_value(Handle()) == {"_by_reference": False} and by_value(None) is None
