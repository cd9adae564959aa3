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
from serve.worker import Worker


@dataclass(frozen=True)
class TextSource:
    """Which encoder, by name. fingerprint: None where nothing was made with it before (the text side of an image encoder)."""

    name: str
    fingerprint: str | None

    def load(self) -> TextEncoder:
        """Raises CxrayError where it cannot be loaded, or has other weights now."""
        from models.encoders import load_text

        encoder = load_text(self.name)
        if self.fingerprint not in (None, encoder.fingerprint):
            raise CxrayError(f"`{self.name}` has other weights now than when the model or index was made; put those back, or make it again")
        return encoder


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
        said = (await self._worker.run(self.encoder, ["health"])).embedding
        if not np.allclose(said, self._said, atol=1e-3):
            raise RuntimeError("the text encoder does not say any more what it said at its start")

    def together(self, requests: Sequence[list[str]]) -> list[TextOutput]:
        """Each request's own answer."""
        ends = np.cumsum([len(texts) for texts in requests])
        out = self.encoder([text for texts in requests for text in texts])
        parts = [(end - len(texts), end) for end, texts in zip(ends, requests, strict=True)]
        return [TextOutput(out.embedding[a:b], out.tokens[a:b], out.truncated[a:b]) for a, b in parts]

    @serve.batch
    async def _batched(self, requests: list[list[str]]) -> list[TextOutput]:
        return await self._worker.run(self.together, requests)


class RemoteText(TextEncoder):
    """A text encoder that computes elsewhere, for code that is given one: called in a thread, it asks through the replica's event loop.

    Notes are counted first and encoded then, most of them unchanged: their vectors come with the count, and are kept until they are asked
    for, so that a batch goes there and back once.
    """

    def __init__(self, handle: Any, about: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self.handle, self.loop = handle, loop
        self.name, self.fingerprint, self.dim = about["name"], about["fingerprint"], about["dim"]
        self.context, self.joint, self.token_dim = about["context"], about["joint"], 0
        self._kept: dict[str, tuple[np.ndarray, int]] = {}

    def __call__(self, texts: list[str]) -> TextOutput:
        kept = self._kept if all(text in self._kept for text in texts) else self._kept | self._ask(set(texts) - self._kept.keys())
        self._kept = {}
        embedding = np.stack([kept[text][0] for text in texts]) if texts else np.zeros((0, self.dim), np.float32)
        tokens = np.array([kept[text][1] for text in texts], np.int64)
        return TextOutput(embedding, tokens, tokens > self.context if self.context else np.zeros(len(texts), bool))

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        self._kept |= self._ask(set(texts) - self._kept.keys())
        return np.array([self._kept[text][1] for text in texts], np.int64)

    def embed(self, texts: list[str]) -> np.ndarray:
        return self(texts).embedding

    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        raise CxrayError("token states are not sent between processes")

    def _ask(self, texts: set[str]) -> dict[str, tuple[np.ndarray, int]]:
        if not texts:
            return {}
        ordered = sorted(texts)
        out = asyncio.run_coroutine_threadsafe(self._answer(ordered), self.loop).result()
        return {text: (vector, int(tokens)) for text, vector, tokens in zip(ordered, out.embedding, out.tokens, strict=True)}

    async def _answer(self, texts: list[str]) -> TextOutput:
        return await self.handle.encode.remote(texts)
