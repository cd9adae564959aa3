"""What every encoder is: images or texts in, unit vectors and token states out.

Every embedding in cxray is L2-normalised, so that an inner product is a cosine whichever encoder made it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.errors import CxrayError

if TYPE_CHECKING:
    from torch import Tensor, device, nn

BATCH_TEXTS = 64
PAD = 16  # tokens: texts are padded to multiples of it, and share a batch only with their like
BATCH_TOKENS = 16_384  # two texts of ModernBERT's 8,192 tokens, or 64 ordinary segments


@dataclass(frozen=True)
class ImageOutput:
    """embedding: float32 [B, dim], unit length. tokens: float32 [B, grid * grid, token_dim], row-major, or None."""

    embedding: np.ndarray
    tokens: np.ndarray | None


@dataclass(frozen=True)
class TextOutput:
    """embedding: float32 [B, dim], unit length. tokens: int64 [B], each text's length in tokens (special ones counted)
    before any cut. truncated: bool [B], whether the text was longer than the encoder's context."""

    embedding: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray


class ImageEncoder(ABC):
    """One image encoder.

    name: the string that loads it again. dim: width of the embedding. size: pixels a side that the model sees.
    grid: n of the n x n token grid, 0 where there is none. token_dim: width of a token, 0 where there is none.
    joint: whether the text encoder of the same name shares its space. fingerprint: changes when a vector would.
    """

    name: str = ""
    dim: int
    size: int
    grid: int
    token_dim: int
    joint: bool
    fingerprint: str

    def __call__(self, images: np.ndarray) -> ImageOutput:
        """images: the stored pictures, uint8 grey [B, H, H]. Raises ValueError on anything else."""
        if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1] != images.shape[2]:
            raise ValueError(f"images must be uint8 [B, H, H], not {images.dtype} {list(images.shape)}")
        if not len(images):
            tokens = np.zeros((0, self.grid * self.grid, self.token_dim), np.float32) if self.grid else None
            return ImageOutput(np.zeros((0, self.dim), np.float32), tokens)
        return self.encode(images)

    @abstractmethod
    def encode(self, images: np.ndarray) -> ImageOutput:
        """One checked batch, at least one image."""

    @property
    def module(self) -> "nn.Module":
        """What `forward` runs, for training. Raises CxrayError where there are no weights here to train."""
        raise CxrayError(f"{self.name}: has no weights here that could be trained; an encoder hf: or open_clip: has")

    def forward(self, images: "Tensor") -> "tuple[Tensor, Tensor | None]":
        """As `encode`, in torch and with gradients, on the images' device. images: uint8 [B, H, H].

        -> embedding [B, dim], not yet of unit length, and tokens [B, grid * grid, token_dim] or None, in the precision computed in.
        """
        raise NotImplementedError


class TextEncoder(ABC):
    """One text encoder; a scheme fills in the three abstract methods, the rest is the same for all.

    name, dim, joint, fingerprint: as for images. token_dim: width of a token state, 0 where there is none.
    context: the most tokens that the model reads, special ones counted; 0 where the service does not say.
    tokenise: texts (at least one) -> what `forward` takes, on the CPU, cut at `context`; where the weights are here. It holds none of
    them, so that it can be sent to where batches are made.
    """

    name: str = ""
    dim: int
    token_dim: int
    context: int
    joint: bool
    fingerprint: str
    tokenise: "Callable[[list[str]], dict[str, Tensor]]"
    device: "device"
    together: int | None = None  # where it computes in bfloat16: how many texts `embed` is given at a time, no more and no fewer

    def __call__(self, texts: list[str]) -> TextOutput:
        """Embeds each distinct text once; an empty text is allowed. A text's vector does not depend on its company.

        How a matrix product is cut into pieces depends on its size, and in bfloat16 that decides digits by which a note fetches one of
        two near passages. So there all batches of texts of a length are of one size, the last filled up.
        """
        distinct, where = _distinct(texts)
        lengths = self.count_tokens(distinct)
        embedding = np.zeros((len(distinct), self.dim), np.float32)
        with self._precision():
            for rows, batch in self._batches(distinct, lengths):
                embedding[rows] = unit(self.embed(batch)[: len(rows)])
        truncated = lengths > self.context if self.context else np.zeros(len(lengths), bool)
        return TextOutput(embedding[where], lengths[where], truncated[where])

    def states(self, texts: list[str]) -> list[np.ndarray]:
        """The last layer's states, one float32 [L, token_dim] a text, L = min(its tokens, context), special ones kept.

        Raises CxrayError where the model does not give any.
        """
        distinct, where = _distinct(texts)
        states: list[np.ndarray] = [np.zeros(0)] * len(distinct)
        with self._precision():
            for rows, batch in self._batches(distinct, self.count_tokens(distinct)):
                for row, state in zip(rows, self.embed_tokens(batch)):
                    states[row] = state
        return [states[row] for row in where]

    def _precision(self) -> AbstractContextManager[Any]:
        # Around all batches: within one context the weights are rounded once.
        if self.together is None:
            return nullcontext()
        from models.encoders.device import autocast

        return autocast(self.device)

    def _batches(self, texts: list[str], lengths: np.ndarray) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Rows and their texts, of one padded length each, the longest first: memory that is too small shows at once.

        How far a text is padded decides the last bits of its vector too. Here that is up to the text alone, and a served chart reads as it
        did in training.
        """
        padded = -(-(np.minimum(lengths, self.context) if self.context else lengths) // PAD) * PAD
        order = np.argsort(-padded, kind="stable")
        start = 0
        while start < len(order):
            length = padded[order[start]]
            size = min(max(BATCH_TOKENS // max(int(length), 1), 1), self.together or BATCH_TEXTS)
            rows = order[start : min(start + size, int(np.searchsorted(-padded[order], -length, side="right")))]
            batch = [texts[row] for row in rows]
            yield rows, batch + batch[:1] * (size - len(batch) if self.together else 0)
            start += len(rows)

    @abstractmethod
    def count_tokens(self, texts: list[str]) -> np.ndarray:
        """int64 [B]: each text's whole length in tokens, special ones counted, before any cut."""

    @abstractmethod
    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [B, dim] of one batch, of any length (the caller normalises)."""

    @abstractmethod
    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        """One float32 [L, token_dim] a text of one batch, padding removed."""

    @property
    def module(self) -> "nn.Module":
        """What `forward` runs, for training. Raises CxrayError where there are no weights here to train."""
        raise CxrayError(f"{self.name}: has no weights here that could be trained; a text encoder hf:, st: or open_clip: has")

    def forward(self, tokens: "dict[str, Tensor]") -> "Tensor":
        """As `embed`, in torch and with gradients, on the tokens' device -> [B, dim], in the precision computed in."""
        raise NotImplementedError


def unit(vectors: np.ndarray) -> np.ndarray:
    """float32 [B, D] scaled to length 1; a vector of zeros stays zero."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def padding(context: int) -> int | None:
    """What a tokeniser pads to multiples of: nothing where that might be more than the model reads."""
    return PAD if context and context % PAD == 0 else None


def _distinct(texts: list[str]) -> tuple[list[str], np.ndarray]:
    first: dict[str, int] = {}
    where = np.array([first.setdefault(text, len(first)) for text in texts], np.int64)
    return list(first), where
