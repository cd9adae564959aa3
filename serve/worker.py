"""Where a replica computes: not on its event loop, which has to answer Ray Serve and to take in the next requests meanwhile."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Worker:
    """A thread, which computes one batch after another; where no batches are formed, several.

    Ray Serve forms the next batch while the one before is computed, and where it does not wait for more, of one request each. So a
    request first waits till the thread is `free`: all that came meanwhile are one batch, and who comes alone does not wait.
    """

    def __init__(self, timeout_s: float, threads: int = 1) -> None:
        self.timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(threads)
        self._free = asyncio.Event()
        self._free.set()

    async def free(self) -> None:
        await self._free.wait()

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """What `work(*args)` returns. Raises TimeoutError after `timeout_s`; a thread that hangs then fails the health check too."""
        self._free.clear()
        try:
            async with asyncio.timeout(self.timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        finally:
            self._free.set()
