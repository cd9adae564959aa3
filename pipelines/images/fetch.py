"""Files of a store, in the order they are asked for, fetched ahead of whoever decodes them.

Retrying is the library's: gcsfs asks six times, and waits longer each time, where a store is busy (408, 429, 5xx), hangs up, falls
silent, or sends less than it announced. What stands here is the rest: as many requests at once as the store bears, an end to all
waiting, and a second look at bytes that a proxy may have cut.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import fsspec
from fsspec.asyn import get_loop

from contracts.errors import RowError
from contracts.storage import Place, StorageOptions, place, told_of_row

TRIES = 6  # of gcsfs, for one request
BACKOFF_S = 36.0  # that it waits between them at most: 1 + 2 + 4 + 8 + 16, and each time up to a second of jitter
LOOKS = 3  # at a file whose bytes came short
AHEAD_BYTES = 256 << 20  # of files held or under way in one task: of MIMIC's JPEGs all, of 20 MB DICOMs a dozen


class Pace:
    """How many files may be under way at once: half as many after a 429, and one more for each round of good answers.

    Additive increase and multiplicative decrease lead clients that know nothing of each other to equal shares of a store that is not
    overloaded (Chiu and Jain, Analysis of the increase and decrease algorithms for congestion avoidance, 1989); TCP does the same. All
    of it happens on one event loop, so there are no locks.
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.under_way = most, float(most), 0
        self._freed = asyncio.Event()
        self._slowed = 0.0

    async def __aenter__(self) -> None:
        while self.under_way >= int(self.limit):
            self._freed.clear()
            await self._freed.wait()
        self.under_way += 1

    async def __aexit__(self, *_: object) -> None:
        self.under_way -= 1
        self._freed.set()

    def slower(self, sent: float) -> None:
        """A request sent at that time was one too many. Of those that were under way together only the first counts."""
        if sent > self._slowed:
            self.limit, self._slowed = max(1.0, self.limit / 2), time.monotonic()

    def faster(self) -> None:
        """A request was answered well. As many of them as may be under way make room for one more."""
        self.limit = min(float(self.most), self.limit + 1 / self.limit)


class Fetcher:
    """Reads files of any store: on fsspec's event loop where the store's client is asynchronous, in threads where it is not."""

    def __init__(self, options: StorageOptions, most: int, max_bytes: int) -> None:
        """most: files under way at once. max_bytes: a larger file is not read at all."""
        self.pace = Pace(most)
        self._options, self._most, self._max_bytes = options, most, max_bytes
        self._deadline_s = TRIES * options.timeout_s + BACKOFF_S  # also for a store that is never silent and never done
        self._loop, self._threads = get_loop(), ThreadPoolExecutor(most, "fetch")
        self._stores: dict[str, Any] = {}
        self._sizes = deque([max_bytes], maxlen=2 * most)  # of the last files; before the first came, the worst is expected

    def each(self, uris: Iterable[str]) -> Iterator[bytes | RowError]:
        """The bytes of each file, or why there are none. Twice `most` files are held at most, the consumer's own included, and fewer where
        they are large: each that is under way counts as large as the largest of the last ones.

        A RowError is lasting where the file is not there or too large, passing where the store is busy or does not answer. Raises
        CxrayError where the store refuses.
        """
        rest, ahead = iter(uris), deque[Future[bytes]]()
        try:
            while True:
                while self._has_room(ahead) and (uri := next(rest, None)) is not None:
                    ahead.append(self._begin(uri, self._body))
                if not ahead:
                    return
                found = _outcome(ahead.popleft())
                if isinstance(found, bytes):
                    self._sizes.append(len(found))
                yield found
        finally:  # also where the consumer stops early
            for one in ahead:
                one.cancel()

    def _has_room(self, ahead: deque[Future[bytes]]) -> bool:
        return not ahead or (len(ahead) < 2 * self._most and (len(ahead) + 1) * max(self._sizes) <= AHEAD_BYTES)

    def mended(self, uri: str, data: bytes) -> bytes | None:
        """The whole file, where `data` is only a part of it; None where there is no more to be had. To ask of bytes that are no picture.

        A connection that ends before its Content-Length is noticed and tried again by itself; a proxy that cuts a body, and announces
        what is left of it, is not. Raises RowError: short_body, passing, where it does so every time.
        """
        size = self._begin(uri, self._size).result()
        if len(data) >= size:
            return None
        for _ in range(LOOKS):
            data = self._begin(uri, self._body).result()
            if len(data) >= size:
                return data
        raise RowError("short_body", f"{len(data)} of {size} bytes, {LOOKS + 1} times", lasting=False)

    def _begin(self, uri: str, ask: Callable[[Any, str], Awaitable[Any]]) -> Future[Any]:
        where = place(uri, self._options)
        if where.scheme not in self._stores:
            self._stores[where.scheme] = self._open(where)
        return asyncio.run_coroutine_threadsafe(self._paced(where, ask), self._loop)

    def _open(self, where: Place) -> Any:
        fs = where.fs
        if "gs" not in fs.protocol:
            return fs
        # A client of its own, because that of a `Place` is pickled, and this one holds what cannot be: it sees each answer, also those
        # after which gcsfs tries again.
        return type(fs)(**fs.storage_options, session_kwargs={"trace_configs": [self._trace()]}, skip_instance_cache=True)

    def _trace(self) -> Any:
        import aiohttp  # here, so that a local run need not wait for it

        async def started(_session: Any, context: Any, _params: Any) -> None:
            context.sent = time.monotonic()

        async def ended(_session: Any, context: Any, params: aiohttp.TraceRequestEndParams) -> None:
            if params.response.status == 429:
                self.pace.slower(context.sent)
            elif params.response.ok:
                self.pace.faster()
            if (params.response.content_length or 0) > self._max_bytes:
                raise RowError("too_many_bytes")

        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(started)
        trace.on_request_end.append(ended)
        return trace

    async def _paced(self, where: Place, ask: Callable[[Any, str], Awaitable[Any]]) -> Any:
        async with self.pace:
            with told_of_row(where):
                try:
                    async with asyncio.timeout(self._deadline_s) as deadline:
                        return await ask(self._stores[where.scheme], where.path)
                except TimeoutError:
                    if not deadline.expired():
                        raise
                    waited = f"a file of {where.scheme}:// did not come within {self._deadline_s:.0f} s"
                    raise RowError("store_timeout", waited, lasting=False) from None

    async def _body(self, fs: Any, path: str) -> bytes:
        return await (fs._cat_file(path) if fs.async_impl else self._loop.run_in_executor(self._threads, self._read, fs, path))

    async def _size(self, fs: Any, path: str) -> int:
        info = await (fs._info(path) if fs.async_impl else self._loop.run_in_executor(self._threads, fs.info, path))
        return info["size"] or 0

    def _read(self, fs: fsspec.AbstractFileSystem, path: str) -> Any:
        if (fs.size(path) or 0) > self._max_bytes:
            raise RowError("too_many_bytes")
        return fs.cat_file(path)


def _outcome(future: Future[bytes]) -> bytes | RowError:
    try:
        return future.result()
    except RowError as error:
        return error


@lru_cache(maxsize=1)
def fetcher(options: StorageOptions, most: int, max_bytes: int) -> Fetcher:
    """This process's fetcher: its connections, its credentials and the pace it has found outlive a block of rows."""
    return Fetcher(options, most, max_bytes)
