"""A client that behaves: refused, it comes again when it was told to. What it saw is kept, to be judged."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import httpx2

REFUSALS = (429, 503)
SLOW = 5.0  # seconds


@dataclass
class Seen:
    """good: seconds that each good request took till its answer, refusals and waiting included; slow: of those that took over SLOW, when
    they were sent (time.monotonic) and how long they took. wrong: sentences, one a broken promise."""

    good: list[float] = field(default_factory=list)
    slow: list[tuple[float, float]] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    bad: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """check: of a good one's answer, what is wrong with it, or nothing. A bad one is to be refused for what it is, as 415 or 422."""

    files: list[Any]
    check: Callable[[dict[str, Any]], str | None] | None


def ask(api: httpx2.Client, request: Request, seen: Seen, lock: Lock) -> None:
    begun = time.monotonic()
    while True:
        try:
            answer = api.post("/v1/classify", files=request.files)
        except httpx2.HTTPError as error:
            with lock:
                seen.wrong.append(f"no answer: {type(error).__name__}")
            return
        if answer.status_code not in REFUSALS:
            break
        with lock:
            seen.refused[answer.status_code] += 1
            if not answer.headers.get("retry-after", "").isdigit():
                seen.wrong.append(f"{answer.status_code} without Retry-After")
                return
        time.sleep(int(answer.headers["retry-after"]))  # what the service asked for
    with lock:
        if request.check is None:
            seen.bad[answer.status_code] += 1
            if answer.status_code not in (415, 422):
                seen.wrong.append(f"a bad image was answered {answer.status_code}")
        elif answer.status_code != 200:
            seen.wrong.append(f"a good request was answered {answer.status_code}: {answer.text[:200]}")
        else:
            seen.good.append(time.monotonic() - begun)
            if seen.good[-1] > SLOW:
                seen.slow.append((begun, seen.good[-1]))
            if complaint := request.check(answer.json()):
                seen.wrong.append(complaint)


def load(
    address: str, key: str, requests: Callable[[int], Request], clients: int, more: Callable[[Seen], bool], watch: Callable[[Seen], None]
) -> Seen:
    """`clients` at once ask one `requests(n)` after another while `more`; `watch` runs beside them, once, and may break things."""
    seen, lock, numbers = Seen(), Lock(), iter(range(10**9))

    def client() -> None:
        with httpx2.Client(base_url=address, headers={"X-API-Key": key}, timeout=60) as api:
            while more(seen) and not seen.wrong:
                with lock:
                    number = next(numbers)
                ask(api, requests(number), seen, lock)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        watch(seen)
        for one in running:
            one.result()
    return seen
