"""Replicas that die and a service that is deployed anew under load: no good request is answered wrong, and who waits as told is served."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import count

import numpy as np
import planted
import pytest
from chaos import descendants
from serve_client import Request, Seen, load
from served import replicas
from test_predict import chart, jpeg

from pipelines.speed import resident

WITHIN = 10.0  # seconds, within which who honours Retry-After has an answer
EVERY = 8  # requests, of which one is a bad image: in every batch of sixteen there are some
KINDS = ("gateway", "image", "text", "fusion")
BATCHES = count(15, -1)  # another for each redeploy


@pytest.fixture(scope="module")
def requests(service) -> Callable[[int], Request]:
    studies = [(jpeg(n), chart(n) | {"chief_complaint": f"Dyspnea, {planted.NOTE}"}) for n in range(8)]
    expected = [service.predictor.predict(*study).probabilities for study in studies]

    def request(number: int) -> Request:
        if number % EVERY == EVERY - 1:
            return Request([("image", (planted.FILE, jpeg(number % 8)[:900]))], None)
        which = number % 7
        image, told = studies[which]

        def check(answer: dict) -> str | None:
            said = {f["name"]: f["probability"] for f in answer["findings"]}
            same = said.keys() == expected[which].keys() and np.allclose(list(said.values()), list(expected[which].values()), atol=1e-4)
            return None if same else f"study {which} was answered with another's probabilities, or none's"

        return Request([("image", (planted.FILE, image)), ("chart", (None, json.dumps(told)))], check)

    return request


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
    done = threading.Event()

    def chaos(seen: Seen) -> None:
        try:
            until(seen, 50)
            kill("image")
            print(f"killed at {time.monotonic():.1f}")  # shown where the test fails, beside the slow ones
            until(seen, 150)
            print(f"redeployed from {time.monotonic():.1f}")
            service.deploy(batch=next(BATCHES))
            print(f"till {time.monotonic():.1f}")
        finally:
            done.set()

    seen = load(service.address, service.key, requests, 16, lambda seen: len(seen.good) < 300 or not done.is_set(), chaos)
    judge(seen, 300)


@pytest.mark.soak
def test_two_minutes_of_kills_and_a_redeploy_under_64_clients(service, requests):
    """Memory: the mean of the service's processes (there are more of them while it is deployed anew), in the last quarter of the samples at
    most a tenth above the first's."""
    done, held = threading.Event(), []

    def chaos(seen: Seen) -> None:
        try:
            until(seen, 200)
            begun = time.monotonic()
            for turn in range(12):
                if turn == 6:
                    service.deploy(batch=next(BATCHES))
                elif len(replicas(KINDS[turn % 4])) >= 2:
                    kill(KINDS[turn % 4])
                while time.monotonic() < begun + 10 * (turn + 1) and not seen.wrong:
                    time.sleep(0.5)
                    held.append(np.mean([resident(pid)[0] for pid in processes()]))
        finally:
            done.set()

    seen = load(service.address, service.key, requests, 64, lambda _: not done.is_set(), chaos)
    print(f"{len(seen.good)} good answers, the slowest after {max(seen.good, default=0):.1f} s; refused {seen.refused}, bad {seen.bad}")
    judge(seen, 500)
    quarter = len(held) // 4
    assert np.median(held[-quarter:]) <= 1.1 * np.median(held[:quarter]), (held[:3], held[-3:])
