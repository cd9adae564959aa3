"""A text encoder, and what stands for it in another deployment."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import serve

from contracts.errors import CxrayError
from models.encoders.base import TextEncoder, TextOutput
from serve.settings import Batched
from serve.worker import Worker, answer

TEXTS = 8  # that count as one request, so that a batch is as much work whether its requests have one text or many


@dataclass(frozen=True)
class TextSource:
    """Which encoder, by name. fingerprint: None where nothing was made with it before (the text side of an image encoder)."""

    name: str
    fingerprint: str | None

    def load(self) -> TextEncoder:
        """Raises CxrayError where it cannot be loaded, or has other weights now."""
        from models.encoders import load_known, load_text

        if self.fingerprint is None:
            return load_text(self.name)
        return load_known("text", {"name": self.name, "fingerprint": self.fingerprint}, "when the model or index was made")


def size(requests: Sequence[list[str]]) -> int:
    """Of a batch, in requests. One by itself is always 1: Ray Serve refuses what would fill more than a batch."""
    return max(len(requests), -(-sum(map(len, requests)) // TEXTS)) if len(requests) > 1 else 1


class TextDeployment:
    """Requests of several texts each, encoded together. An answer does not depend on its company."""

    def __init__(self, settings: Batched, source: TextSource) -> None:
        from pipelines.pool import one_thread_on_cpu

        one_thread_on_cpu()
        self.encoder = source.load()
        self._worker = Worker(settings.timeout_s)
        self._batched.set_max_batch_size(settings.batch)
        self._batched.set_batch_wait_timeout_s(settings.wait_s)
        self._said = self.encoder(["health"]).embedding

    async def encode(self, texts: list[str]) -> TextOutput:
        await self._worker.free()
        return await self._batched(texts)

    async def count(self, texts: list[str]) -> np.ndarray:
        """int64 [texts], in tokens."""
        return await self._worker.run(self.encoder.count_tokens, texts)

    async def about(self) -> dict[str, Any]:
        e = self.encoder
        return {"name": e.name, "fingerprint": e.fingerprint, "dim": e.dim, "context": e.context, "joint": e.joint}

    async def check_health(self) -> None:
        said = await self._worker.probe(self.encoder, ["health"])
        if said is not None and not np.allclose(said.embedding, self._said, atol=1e-3):
            raise RuntimeError("the text encoder does not say any more what it said at its start")

    def together(self, requests: Sequence[list[str]]) -> list[TextOutput]:
        """Each request's own answer."""
        ends = np.cumsum([len(texts) for texts in requests])
        out = self.encoder([text for texts in requests for text in texts])
        parts = [(end - len(texts), end) for end, texts in zip(ends, requests, strict=True)]
        return [TextOutput(out.embedding[a:b], out.tokens[a:b], out.truncated[a:b]) for a, b in parts]

    @serve.batch(batch_size_fn=size)
    async def _batched(self, requests: list[list[str]]) -> list[TextOutput]:
        return await self._worker.run(self.together, requests)


class RemoteText(TextEncoder):
    """A text encoder that computes elsewhere, for code that is given one: called in a thread, it asks through the replica's event loop.

    Raises TimeoutError where there is no answer within `timeout_s`.
    """

    def __init__(self, handle: Any, about: dict[str, Any], loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self.handle, self.loop, self.timeout_s = handle, loop, timeout_s
        self.name, self.fingerprint, self.dim = about["name"], about["fingerprint"], about["dim"]
        self.context, self.joint, self.token_dim = about["context"], about["joint"], 0

    def __call__(self, texts: list[str]) -> TextOutput:
        if not texts:
            return TextOutput(np.zeros((0, self.dim), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
        return self._ask(self.handle.encode, texts)

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        return self._ask(self.handle.count, texts) if texts else np.zeros(0, np.int64)

    def embed(self, texts: list[str]) -> np.ndarray:
        return self(texts).embedding

    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        raise CxrayError("token states are not sent between processes")

    def _ask(self, method: Any, texts: list[str]) -> Any:
        async def asked() -> Any:
            return await answer(method.remote(texts))

        job = asyncio.run_coroutine_threadsafe(asked(), self.loop)
        try:
            return job.result(self.timeout_s)
        except TimeoutError:
            job.cancel()
            raise
