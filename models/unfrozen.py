"""MDFNet with its encoders before it: stored pictures and tokenised texts in, and gradients down to the encoders' first layers."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.errors import CxrayError
from models.encoders.base import ImageEncoder, TextEncoder
from models.encoders.device import on
from models.mdfnet import MDFNet


class Unfrozen(nn.Module):
    """Sees what `cxray features` would store of a picture, tokens pooled to grid x grid and the embedding, but for their eight bits; and
    with a text encoder reads of a text the vector that `cxray texts` would store."""

    def __init__(self, encoder: ImageEncoder, fusion: MDFNet, grid: int, text: TextEncoder | None = None) -> None:
        """grid: 0 where the encoder has no tokens. text: None where vectors are given. Raises CxrayError for an encoder whose weights are
        not here."""
        super().__init__()
        self.seen, self.told = encoder, text  # no modules: what the two below are to be run by
        self.encoder, self.fusion, self.grid = encoder.module, fusion, grid
        self.text_encoder = text.module if text else None

    def forward(
        self, *, picture: Tensor | None = None, tokens: dict[str, Tensor] | None = None, which: Tensor | None = None, **given: Any
    ) -> Tensor | dict[str, Tensor]:
        """picture: the stored pictures, uint8 [B, 518, 518]; without them `given` has `image` and `embedding`.
        tokens: of the batch's U distinct texts, at least one; which: int [B, S], the text of each segment (where there is none, any);
        without them `given` has `text`. The rest as MDFNet.

        A batch without any segment still reads its one text, so that every parameter has a gradient on every rank.
        """
        if picture is not None:
            given |= self.see(picture)
        if tokens is not None and which is not None:
            given["text"] = self.read(tokens)[which]
        return self.fusion(**given)

    def see(self, picture: Tensor) -> dict[str, Tensor]:
        """-> MDFNet's `image` [B, grid * grid, token_dim] and `embedding` [B, dim], float32; without tokens `image` [B, 1, dim] alone."""
        embedding, tokens = self.seen.forward(picture)
        embedding = F.normalize(embedding.float(), dim=1, eps=1e-12)
        if tokens is None:
            return {"image": embedding[:, None]}
        n = self.seen.grid
        cells = F.adaptive_avg_pool2d(tokens.float().unflatten(1, (n, n)).permute(0, 3, 1, 2), self.grid)
        return {"image": cells.flatten(2).transpose(1, 2), "embedding": embedding}

    def read(self, tokens: dict[str, Tensor]) -> Tensor:
        """-> float32 [U, text_dim], unit length."""
        assert self.told is not None
        return F.normalize(self.told.forward(tokens).float(), dim=1, eps=1e-12)

    def freeze_unused(self) -> None:
        """What no output rests on (a mask token, another task's pooling) does not train: it would have no gradient on any rank."""
        device, side = next(self.parameters()).device, self.seen.size
        with torch.enable_grad():
            freeze_unused(self.encoder, self.see(torch.zeros(1, side, side, dtype=torch.uint8, device=device)).values())
            if self.told is not None and self.text_encoder is not None:
                freeze_unused(self.text_encoder, [self.read(on(device, self.told.tokenise([""])))])

    def gradient_checkpointing_enable(self) -> None:
        """The encoders keep no activations within their blocks, and compute them again; MDFNet's are few."""
        for one in (self.seen, self.told):
            if one is not None:
                checkpointing(one.module, one.name)


def freeze_unused(tower: nn.Module, outputs: Iterable[Tensor]) -> None:
    trained = [p for p in tower.parameters() if p.requires_grad]
    gradients = torch.autograd.grad([one.sum() for one in outputs], trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def checkpointing(tower: Any, name: str) -> None:
    """Raises CxrayError where the tower's library cannot."""
    tower = getattr(tower, "transformers_model", tower)  # of sentence-transformers
    if not hasattr(tower, "activation_checkpointing_enable"):
        tower = getattr(getattr(tower, "text", tower), "transformer", tower)  # of open_clip
    if hasattr(tower, "activation_checkpointing_enable"):  # transformers
        tower.activation_checkpointing_enable({"use_reentrant": False})
    elif hasattr(tower, "set_grad_checkpointing"):  # timm, ResNets of open_clip
        tower.set_grad_checkpointing(True)
    elif hasattr(tower, "grad_checkpointing"):
        tower.grad_checkpointing = True
    else:
        raise CxrayError(f"activation_checkpointing: {name} cannot; set it to false")
