"""Where a replica computes: not on its event loop, which has to answer Ray Serve and to take in the next requests meanwhile."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

HANGS = 2  # times the time-out: a thread that is at one job for longer will not come back


class Worker:
    """A thread, which computes one batch after another; where no batches are formed, several.

    Ray Serve forms the next batch while the one before is computed, and where it does not wait for more, of one request each. So a
    request first waits till a thread is `free`: all that came meanwhile are one batch, and who comes alone does not wait.

    A thread cannot be stopped. One whose job was given up stays taken till the job has ended, so that what comes next waits before its
    own time begins to count.
    """

    def __init__(self, timeout_s: float, threads: int = 1) -> None:
        self.timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(threads)
        self._places = asyncio.Semaphore(threads)
        self._free = asyncio.Event()
        self._free.set()
        self._begun: dict[Future[Any], float] = {}  # of the jobs under way
        self._ended = -float("inf")  # when a job last did

    async def free(self) -> None:
        """Raises TimeoutError where no thread is free within `timeout_s`."""
        async with asyncio.timeout(self.timeout_s):
            await self._free.wait()

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """What `work(*args)` returns. Raises TimeoutError where no thread is free within `timeout_s`, or it then computes for longer."""
        async with asyncio.timeout(self.timeout_s):
            await self._places.acquire()
        loop = asyncio.get_running_loop()
        job = self._threads.submit(work, *args)
        self._begun[job] = time.monotonic()
        if self._places.locked():
            self._free.clear()
        job.add_done_callback(lambda job: loop.call_soon_threadsafe(self._end, job))
        async with asyncio.timeout(self.timeout_s):
            return await asyncio.wrap_future(job)

    async def probe(self, work: Callable[..., Any], *args: Any) -> Any:
        """For a health check: what `work(*args)` returns, or None where all threads are busy and get on.

        Raises RuntimeError where a thread hangs, TimeoutError where none has ended anything within `timeout_s`.
        """
        now = time.monotonic()
        if any(now - begun > HANGS * self.timeout_s for begun in self._begun.values()):
            raise RuntimeError(f"a thread has been at one job for more than {HANGS * self.timeout_s:g} s")
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.run(work, *args)
        except TimeoutError:
            if time.monotonic() - self._ended < self.timeout_s:
                return None
            raise

    def _end(self, job: Future[Any]) -> None:
        del self._begun[job]
        self._ended = time.monotonic()
        self._places.release()
        self._free.set()


async def answer(response: Any) -> Any:
    """What another deployment answers. Whoever waits no more takes the request back, so that nothing computes for nobody."""
    try:
        return await response
    except asyncio.CancelledError:
        if hasattr(response, "cancel"):
            response.cancel()
        raise


async def together(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them at once, in their order. Where one fails, the first failure is raised as it is, and the others are given up."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in asked]
    except ExceptionGroup as failed:
        first = failed.exceptions[0]
    else:
        return [task.result() for task in tasks]
    raise first
