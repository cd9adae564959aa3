"""Clients of an HTTP service in one process: plain sockets on one event loop, so that asking costs next to nothing beside answering."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop


@dataclass(frozen=True)
class Load:
    """Requests of one kind; each client sends the next body of the list, over and over. path: with the query."""

    host: str
    port: int
    key: str
    path: str
    media: str
    bodies: Sequence[bytes]


@dataclass(frozen=True)
class Told:
    """seconds: of each request, in the order of the answers; wall: of all; cpu: of this process. statuses: how many of each."""

    seconds: list[float]
    wall: float
    cpu: float
    statuses: dict[int, int]

    @property
    def per_s(self) -> float:
        return len(self.seconds) / self.wall


def ask(load: Load, clients: int, requests: int) -> Told:
    """`requests` in all, of so many clients, each of which waits for its answer before it asks again, on a connection that stays."""
    return uvloop.run(_ask(load, clients, requests))


async def _ask(load: Load, clients: int, requests: int) -> Told:
    numbers, seconds, statuses = iter(range(requests)), [], Counter()
    heads = [_head(load, len(body)) for body in load.bodies]
    connections = [await asyncio.open_connection(load.host, load.port) for _ in range(clients)]

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in numbers:
            at = number % len(load.bodies)
            sent = time.perf_counter()
            writer.write(heads[at])
            writer.write(load.bodies[at])
            status = await _answer(reader)
            seconds.append(time.perf_counter() - sent)
            statuses[status] += 1

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*itertools.starmap(one, connections))
    told = Told(seconds, time.perf_counter() - wall, time.process_time() - cpu, dict(statuses))
    for _, writer in connections:
        writer.close()
    return told


def _head(load: Load, length: int) -> bytes:
    lines = [f"POST {load.path} HTTP/1.1", f"Host: {load.host}:{load.port}", f"X-API-Key: {load.key}"]
    return "\r\n".join([*lines, f"Content-Type: {load.media}", f"Content-Length: {length}", "", ""]).encode()


async def _answer(reader: asyncio.StreamReader) -> int:
    """The status. The body is read, and thrown away."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length:" in head:
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
    else:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
    return int(head.split(b" ", 2)[1])
