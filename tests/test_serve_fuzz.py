"""Whatever comes in over HTTP is answered as the OpenAPI says, and never by a fault: generated requests, and damaged images."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx2
import numpy as np
import planted
import pytest
import schemathesis
from fake_backends import quick, reading_images
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import replicas
from test_fuzz import mutated, seeds

from serve.backends import Backends
from serve.gateway import create
from serve.messages import ProblemDetails
from serve.security import new_key
from serve.settings import GatewaySettings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def made(folder: Path, backends: Backends) -> tuple[FastAPI, str]:
    """(the gateway, a key)"""
    key = new_key(folder / "keys.json", "fuzz")
    return create(backends, GatewaySettings(keys=str(folder / "keys.json"), rate_per_minute=10**6)), key


def requests_answered(schema: Any, key: str, cases: int) -> Counter[int]:
    """Generated requests, half of them of a form that is not allowed; each answer is held against the OpenAPI. So many of those that have a
    body, where most can go wrong, and some of the others."""
    operations = [found.ok() for found in schema.get_all_operations()]
    bodies = [operation for operation in operations if operation.method == "post"]
    answered: Counter[int] = Counter()
    for operation in operations:

        @seed(0)
        @settings(
            max_examples=-(-cases // len(bodies)) if operation in bodies else max(10, cases // 50),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in MODES]))
        def each(case: schemathesis.Case) -> None:
            case.headers.pop("Authorization", None)
            case.headers["X-API-Key"] = key  # a wrong one would be the end of the request
            response = case.call()
            answered[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        each()
    return answered


def images_answered(api: httpx2.Client, numbers: Iterable[int]) -> Counter[str]:
    """Damaged images and DICOMs through /v1/classify: what became of each, by the problem's type or 'read'."""
    whole = seeds()
    kinds = list(whole)
    came: Counter[str] = Counter()
    for number in numbers:
        rng = np.random.default_rng(number)
        mine, other = whole[kinds[number % len(kinds)]], whole[kinds[rng.integers(len(kinds))]]
        data = mutated(mine[rng.integers(len(mine))], other[rng.integers(len(other))], rng)
        if number % 2:
            answer = api.post("/v1/classify", content=data, headers={"Content-Type": "application/dicom"})
        else:
            answer = api.post("/v1/classify", files={"image": (planted.FILE, data)})
        if answer.status_code == 200:
            came["read"] += 1
            continue
        assert answer.status_code in (413, 415, 422), f"mutation {number}: {answer.text}"
        came[ProblemDetails.model_validate_json(answer.content).type] += 1
    assert api.get("/readyz").status_code == 200
    return came


def check_requests(answered: Counter[int], cases: int) -> None:
    assert sum(answered.values()) >= cases and min(answered[200], answered[422]) > cases // 20
    assert set(answered) <= {200, 404, 413, 415, 422}


def check_images(came: Counter[str], files: int) -> None:
    assert sum(came.values()) == files and came["read"] > files // 20
    assert {"urn:cxray:truncated", "urn:cxray:corrupt", "urn:cxray:not-an-image"} <= set(came)


def test_300_generated_requests(tmp_path):
    app, key = made(tmp_path, quick())
    check_requests(requests_answered(schemathesis.openapi.from_asgi("/openapi.json", app), key, 300), 300)


def test_300_damaged_images(tmp_path):
    app, key = made(tmp_path, quick(image=reading_images()))
    with TestClient(app, headers={"X-API-Key": key}) as api:
        check_images(images_answered(cast(Any, api), range(300)), 300)


@pytest.mark.soak
def test_5000_generated_requests_to_the_service(service):
    before = replicas()
    check_requests(requests_answered(schemathesis.openapi.from_url(f"{service.address}/openapi.json"), service.key, 5_000), 5_000)
    assert set(before) <= set(replicas())


@pytest.mark.soak
def test_5000_damaged_images_to_the_service(service):
    """From eight clients at once, so that they stand in batches with each other."""
    before = replicas()

    def client(number: int) -> Counter[str]:
        with service.client() as api:
            return images_answered(api, range(number, 5_000, 8))

    with ThreadPoolExecutor(8) as pool:
        check_images(sum(pool.map(client, range(8)), Counter()), 5_000)
    assert set(before) <= set(replicas())


def test_no_operation_forgets_its_key(tmp_path):
    app, _ = made(tmp_path, quick())
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        operation = found.ok()
        answer = operation.Case(path_parameters={"id": "e1"} if "{id}" in operation.path else {}).call()
        assert (answer.status_code == 401) == operation.path.startswith("/v1/"), operation.label
