"""Replicas that die and a service that is deployed anew under load: no good request is answered wrong, and who waits as told is served."""

# ruff: noqa: F811 - fixtures that come from another file are arguments here

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from chaos import descendants
from serve_client import Request, Seen, load
from served import config, run, settings  # noqa: F401 - a fixture among them
from test_predict import chart, jpeg, out, predictor  # noqa: F401 - fixtures among them

from pipelines.speed import resident
from serve import app
from serve import run as command
from serve.security import new_key

WITHIN = 10.0  # seconds, within which who honours Retry-After has an answer
EVERY = 8  # requests, of which one is a bad image: in every batch of sixteen there are some
KINDS = ("gateway", "image", "text", "fusion")
TWO = {"replicas": 2}  # where one dies, another is there


def two(out, **fusion) -> dict:
    """Everything twice. fusion: what a redeploy changes."""
    made = settings(out, image=TWO, text=TWO, models={"fusion": TWO | fusion})
    return made | {"gateway": made["gateway"] | TWO}


@pytest.fixture(scope="module")
def service(local_ray, out, run):
    """(address, key, what deploys it anew)"""
    from ray import serve

    served = command.read(config(out / "chaos.yaml", two(out)))
    key, batch = new_key(out / "keys.json", "chaos"), iter(range(15, 0, -1))
    command.start(app.graph(served.settings), served)

    def redeploy() -> None:
        command.start(app.app(two(out, batch=next(batch))), served)

    yield served.address, key, redeploy
    serve.shutdown()


@pytest.fixture(scope="module")
def requests(predictor) -> Callable[[int], Request]:
    studies = [(jpeg(n), chart(n)) for n in range(8)]
    expected = [predictor.predict(*study).probabilities for study in studies]

    def request(number: int) -> Request:
        if number % EVERY == EVERY - 1:
            return Request([("image", ("x", jpeg(number % 8)[:900]))], None)
        which = number % 7
        image, told = studies[which]

        def check(answer: dict) -> str | None:
            said = {f["name"]: f["probability"] for f in answer["findings"]}
            same = said.keys() == expected[which].keys() and np.allclose(list(said.values()), list(expected[which].values()), atol=1e-4)
            return None if same else f"study {which} was answered with another's probabilities, or none's"

        return Request([("image", ("x", image)), ("chart", (None, json.dumps(told)))], check)

    return request


def replicas(kind: str = "") -> list[int]:
    """Process ids of the service's replicas."""
    return [pid for pid, name in descendants(os.getpid()) if name.startswith(f"ray::ServeReplica:cxray:{kind}")]


def processes() -> list[int]:
    """The replicas, the proxy and the controller."""
    names = ("ray::ServeReplica:cxray:", "ray::ProxyActor", "ray::ServeController")
    return [pid for pid, name in descendants(os.getpid()) if name.startswith(names)]


def kill(kind: str) -> None:
    os.kill(random.choice(replicas(kind)), signal.SIGKILL)


def until(seen: Seen, count: int) -> None:
    """So many good answers were given, or something went wrong."""
    while len(seen.good) < count and not seen.wrong:
        time.sleep(0.05)


def judge(seen: Seen, good: int) -> None:
    assert not seen.wrong, (seen.wrong[:5], seen.refused)
    assert len(seen.good) >= good and sum(seen.bad.values()) > good // (2 * EVERY)
    assert max(seen.good) <= WITHIN, (seen.slow, seen.refused)


@pytest.mark.fault
def test_a_kill_and_a_redeploy_under_300_requests(service, requests):
    address, key, redeploy = service
    done = threading.Event()

    def chaos(seen: Seen) -> None:
        try:
            until(seen, 50)
            kill("image")
            print(f"killed at {time.monotonic():.1f}")  # shown where the test fails, beside the slow ones
            until(seen, 150)
            print(f"redeployed from {time.monotonic():.1f}")
            redeploy()
            print(f"till {time.monotonic():.1f}")
        finally:
            done.set()

    seen = load(address, key, requests, 16, lambda seen: len(seen.good) < 300 or not done.is_set(), chaos)
    judge(seen, 300)


@pytest.mark.soak
def test_two_minutes_of_kills_and_a_redeploy_under_64_clients(service, requests):
    """Memory: the mean of the service's processes (there are more of them while it is deployed anew), in the last quarter of the samples at
    most a tenth above the first's."""
    address, key, redeploy = service
    done, held = threading.Event(), []

    def chaos(seen: Seen) -> None:
        try:
            until(seen, 200)
            begun = time.monotonic()
            for turn in range(12):
                if turn == 6:
                    redeploy()
                elif len(replicas(KINDS[turn % 4])) >= 2:
                    kill(KINDS[turn % 4])
                while time.monotonic() < begun + 10 * (turn + 1) and not seen.wrong:
                    time.sleep(0.5)
                    held.append(np.mean([resident(pid)[0] for pid in processes()]))
        finally:
            done.set()

    seen = load(address, key, requests, 64, lambda _: not done.is_set(), chaos)
    print(f"{len(seen.good)} good answers, the slowest after {max(seen.good, default=0):.1f} s; refused {seen.refused}, bad {seen.bad}")
    judge(seen, 500)
    quarter = len(held) // 4
    assert np.median(held[-quarter:]) <= 1.1 * np.median(held[:quarter]), (held[:3], held[-3:])
