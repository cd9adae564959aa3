"""The models behind the gateway, and how one is asked: what Ray throws becomes a refusal that a client can act on."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
from ray.exceptions import ObjectLostError, RayActorError, RayError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, ReplicaUnavailableError

from contracts.errors import RowError, causes
from serve.problems import Problem, of_row

# The replica that had the request is gone, or is going.
GONE = (
    RayActorError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
    TaskCancelledError,
    ObjectLostError,
    WorkerCrashedError,
    grpc.RpcError,
)
SOON = 1  # seconds after which to come again: a queue of this service is worked off, or a replica replaced, in about as many


class Backends:
    """Handles of deployments by name; anything will do whose `METHOD.remote(...)` can be awaited. Those that are None are not there."""

    def __init__(self, **handles: Any) -> None:
        self._handles = {name: handle for name, handle in handles.items() if handle is not None}

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    async def ask(self, name: str, method: str, *args: Any) -> Any:
        """The answer of the deployment `name`. All methods only read, so a request whose replica died under it is made again, once.

        Raises Problem: 404 where nothing of that name is loaded, 503 where there is no room or no replica, 504 where the model took too
        long; anything else that a deployment raised is a fault.
        """
        if name not in self._handles:
            loaded = ", ".join(self._handles) or "nothing"
            raise Problem(404, "not_loaded", f"no `{name}` is loaded here; loaded: {loaded}")
        try:
            return await self._once(name, method, *args)
        except Problem as problem:
            if problem.kind != "unavailable":
                raise
        return await self._once(name, method, *args)

    async def _once(self, name: str, method: str, *args: Any) -> Any:
        response = None
        try:
            response = getattr(self._handles[name], method).remote(*args)
            return await response
        except asyncio.CancelledError:  # the deadline, or the client is gone: what the replica does for it is of no use any more
            if hasattr(response, "cancel"):
                response.cancel()
            raise
        except (RayError, RayServeException, grpc.RpcError, TimeoutError) as error:
            problem = _refusal([error, *causes(error)])
            if problem is None:
                raise
        raise problem

    async def image(self, data: bytes, what: str) -> Any:
        """An upload, encoded. Raises Problem as `ask`, and where it cannot be read; what: its name in a sentence, 'image 2'."""
        encoded = await self.ask("image", "encode", data)
        if isinstance(encoded, RowError):
            raise of_row(encoded, what)
        return encoded

    async def images(self, uploads: list[bytes]) -> list[Any]:
        """Uploads, encoded at once."""
        return await asyncio.gather(*(self.image(data, f"image {n}") for n, data in enumerate(uploads, 1)))


def _refusal(errors: list[BaseException]) -> Problem | None:
    if any(isinstance(error, BackPressureError) for error in errors):
        return Problem(503, "overloaded", "more is waiting than can be answered soon; come again", retry_after=SOON)
    if any(isinstance(error, TimeoutError) for error in errors):
        return Problem(504, "too_slow", "the model did not answer in time")
    if any(isinstance(error, GONE) for error in errors):
        return Problem(503, "unavailable", "the model is being started again; come again", retry_after=SOON)
    return None
