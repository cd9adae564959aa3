"""The models behind the gateway, and how one is asked: what Ray throws becomes a refusal that a client can act on."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from typing import Any

import grpc
from ray.exceptions import ObjectLostError, RayActorError, RayError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from contracts.errors import RowError, causes
from serve.problems import Problem, of_row
from serve.worker import answer, together

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
STRIKES = 3  # replicas that may die under one upload before it is taken for the cause
SUSPECTS = 1_000  # uploads that are remembered so, by their hashes
READY_WITHIN, READY_FOR = 5.0, 1.0  # seconds: till a deployment has to answer; how long its answer is good


class Backends:
    """Handles of deployments by name; anything will do whose `METHOD.remote(...)` can be awaited. Those that are None are not there."""

    def __init__(self, **handles: Any) -> None:
        self._handles = {name: by_value(handle) for name, handle in handles.items() if handle is not None}
        self._killers: dict[bytes, set[str]] = {}  # of an upload, the replicas that died under it

    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    async def ask(self, name: str, method: str, *args: Any) -> Any:
        """The answer of the deployment `name`. All methods only read, so a request whose replica died under it is made again, once.

        Replicas die for many reasons, and most have nothing to do with what they were just asked; but a file may be made to kill whoever
        decodes it. So it is remembered under which uploads replicas died, until one of them is answered: the second time there is no other
        try, and after three replicas no more. (Only uploads: what else a replica is asked was made or checked here.)

        Raises Problem: 404 where nothing of that name is loaded, 422 for such an upload, 503 where there is no room or no replica, 504
        where the model took too long; anything else that a deployment raised is a fault.
        """
        if name not in self._handles:
            loaded = ", ".join(self._handles) or "nothing"
            raise Problem(404, "not_loaded", f"no `{name}` is loaded here; loaded: {loaded}")
        if self._killed(args) >= STRIKES:
            raise Problem(422, "corrupt", "this file ended what was to read it, several times; it is not tried again")
        try:
            return await self._once(name, method, *args)
        except Problem as problem:
            if problem.kind != "unavailable" or self._killed(args) > 1:
                raise
        return await self._once(name, method, *args)

    def _killed(self, args: tuple[Any, ...]) -> int:
        return len(self._killers.get(_hash(args), ())) if self._killers else 0

    def _suspect(self, args: tuple[Any, ...], errors: list[BaseException]) -> None:
        died = {str(error.actor_id) for error in errors if isinstance(error, RayActorError) and error.actor_id}
        if died and (upload := _hash(args)):
            if len(self._killers) >= SUSPECTS:
                self._killers.pop(next(iter(self._killers)))
            self._killers.setdefault(upload, set()).update(died)

    async def _once(self, name: str, method: str, *args: Any) -> Any:
        try:
            # The deadline, or a client that is gone: what the replica does for it is of no use any more, and is taken back.
            said = await answer(getattr(self._handles[name], method).remote(*args))
            if self._killers:
                self._killers.pop(_hash(args), None)
            return said
        except (RayError, RayServeException, grpc.RpcError, TimeoutError) as error:
            why = [error, *causes(error)]
            problem = _refusal(why)
            if problem is None:
                raise
            self._suspect(args, why)
        raise problem

    async def image(self, data: bytes, what: str) -> Any:
        """An upload, encoded. Raises Problem as `ask`, and where it cannot be read; what: its name in a sentence, 'image 2'."""
        encoded = await self.ask("image", "encode", data)
        if isinstance(encoded, RowError):
            raise of_row(encoded, what)
        return encoded

    async def images(self, uploads: list[bytes]) -> list[Any]:
        """Uploads, encoded at once."""
        return await together(self.image(data, f"image {n}") for n, data in enumerate(uploads, 1))


class Ready:
    """Whether all deployments answer. Who asks often is told what was found a second ago: anybody may ask, and models have other work."""

    def __init__(self, backends: Backends) -> None:
        self.backends = backends
        self._asking = asyncio.Lock()
        self._said, self._until = False, 0.0

    async def now(self) -> bool:
        async with self._asking:
            if time.monotonic() >= self._until:
                self._said = await self._answers()
                self._until = time.monotonic() + READY_FOR
        return self._said

    async def _answers(self) -> bool:
        """One that is too busy to say so is there."""

        async def ask(name: str) -> None:
            try:
                await self.backends.ask(name, "about")
            except Problem as problem:
                if problem.kind != "overloaded":
                    raise

        try:
            async with asyncio.timeout(READY_WITHIN):
                await together(ask(name) for name in self.backends)
        except (Problem, TimeoutError):
            return False
        return True


def by_value(handle: Any) -> Any:
    """A handle that sends what it is given straight to a replica, whatever Ray Serve's environment says: through Ray's object store, what
    is larger than 100 KB could be spilled to a disk, and a patient's image has no business there."""
    return handle.options(_by_reference=False) if isinstance(handle, DeploymentHandle) else handle


def _hash(args: tuple[Any, ...]) -> bytes:
    """Of the upload among what a deployment is asked; b"" where there is none."""
    upload = next((arg for arg in args if isinstance(arg, bytes)), None)
    return b"" if upload is None else hashlib.sha256(upload).digest()


def _refusal(errors: list[BaseException]) -> Problem | None:
    if any(isinstance(error, BackPressureError) for error in errors):
        return Problem(503, "overloaded", "more is waiting than can be answered soon; come again", retry_after=SOON)
    if any(isinstance(error, TimeoutError) for error in errors):
        return Problem(504, "too_slow", "the model did not answer in time")
    if any(isinstance(error, GONE) for error in errors):
        return Problem(503, "unavailable", "the model is being started again; come again", retry_after=SOON)
    return None
