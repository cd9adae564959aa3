"""Processes that stand ready: what the service is compared with, and who asks it."""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from serving.clients import Load, Told, ask


class Bare:
    """The model without a service, with one thread, as a replica has."""

    def __init__(self, out: str, images: Sequence[bytes]) -> None:
        import cv2

        from pipelines.pool import one_thread_on_cpu
        from trainers.predictor import load

        one_thread_on_cpu()
        cv2.setNumThreads(1)
        self.model, self.images = load(Path(out) / "fusion", "cpu"), images

    def together(self, count: int, batch: int) -> float:
        """Seconds of `count` images in batches."""
        items = [(self.images[n % len(self.images)], None) for n in range(count)]
        begun = time.perf_counter()
        for at in range(0, count, batch):
            self.model.predict_batch(items[at : at + batch])
        return time.perf_counter() - begun

    def alone(self, count: int) -> list[float]:
        """Seconds of each of `count` images, one call after another."""
        taken = []
        for n in range(count):
            begun = time.perf_counter()
            self.model.predict(self.images[n % len(self.images)])
            taken.append(time.perf_counter() - begun)
        return taken


class Handle:
    """A driver that asks the search deployment as the gateway does."""

    def __init__(self, cluster: str) -> None:
        import ray

        ray.init(address=cluster, namespace="serve", log_to_driver=False)
        self.loop = asyncio.new_event_loop()  # which goes on between the rounds: the handle hears of the replicas there
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def search(self, questions: Sequence[str], clients: int, requests: int) -> Told:
        return asyncio.run_coroutine_threadsafe(self._search(questions, clients, requests), self.loop).result()

    async def _search(self, questions: Sequence[str], clients: int, requests: int) -> Told:
        from ray import serve

        from serve.messages import Question

        handle, numbers, seconds = serve.get_deployment_handle("search", "cxray"), iter(range(requests)), []

        async def one() -> None:
            for number in numbers:
                sent = time.perf_counter()
                await handle.search.remote(Question(questions[number % len(questions)], None, None, None, 10, False))
                seconds.append(time.perf_counter() - sent)

        await handle.search.remote(Question("edema", None, None, None, 10, False))
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one() for _ in range(clients)))
        return Told(seconds, time.perf_counter() - wall, time.process_time() - cpu, {200: requests})


class Http:
    """Clients of the service."""

    def __init__(self, loads: dict[str, Load]) -> None:
        self.loads = loads

    def ask(self, what: str, clients: int, requests: int) -> Told:
        return ask(self.loads[what], clients, requests)


class Apart:
    """Objects of one kind, each in a process of its own; a call goes to all of them, and comes back when all have answered."""

    def __init__(self, ends: list[Connection]) -> None:
        self.ends = ends

    def __call__(self, method: str, *args: Any) -> list[Any]:
        for end in self.ends:
            end.send((method, args))
        return [end.recv() for end in self.ends]


@contextmanager
def apart(count: int, kind: type, *args: Any) -> Iterator[Apart]:
    context, ends, processes = multiprocessing.get_context("spawn"), [], []
    for _ in range(count):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=_attend, args=(theirs, kind, args), daemon=True))
        processes[-1].start()
        theirs.close()
        ends.append(mine)
    try:
        for end in ends:
            end.recv()
        yield Apart(ends)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _attend(end: Connection, kind: type, args: tuple[Any, ...]) -> None:
    made = kind(*args)
    end.send("ready")
    while True:
        method, given = end.recv()
        end.send(getattr(made, method)(*given))
