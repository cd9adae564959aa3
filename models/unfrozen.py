"""MDFNet with the image encoder before it: stored pictures in, and gradients down to the encoder's first layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.errors import CxrayError
from models.encoders.base import ImageEncoder
from models.mdfnet import MDFNet


class Unfrozen(nn.Module):
    """Sees what `cxray features` would store of a picture, tokens pooled to grid x grid and the embedding, but for their eight bits."""

    def __init__(self, encoder: ImageEncoder, fusion: MDFNet, grid: int) -> None:
        """grid: 0 where the encoder has no tokens. Raises CxrayError for an encoder whose weights are not here."""
        super().__init__()
        self.seen = encoder  # no module: what `encoder` below is to be run by
        self.encoder, self.fusion, self.grid = encoder.module, fusion, grid

    def forward(self, *, picture: Tensor | None = None, **given: Any) -> Tensor | dict[str, Tensor]:
        """picture: the stored pictures, uint8 [B, 518, 518]; without them `given` has `image` and `embedding`. The rest as MDFNet."""
        if picture is not None:
            given |= self.see(picture)
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

    def freeze_unused(self) -> None:
        """What no output rests on (a mask token, another task's pooling) does not train: it would have no gradient on any rank."""
        trained = [p for p in self.encoder.parameters() if p.requires_grad]
        device, side = trained[0].device, self.seen.size
        with torch.enable_grad():
            seen = self.see(torch.zeros(1, side, side, dtype=torch.uint8, device=device))
            gradients = torch.autograd.grad([v.sum() for v in seen.values()], trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def gradient_checkpointing_enable(self) -> None:
        """The encoder keeps no activations within its blocks, and computes them again; MDFNet's are few."""
        encoder: Any = self.encoder
        if hasattr(encoder, "activation_checkpointing_enable"):  # transformers
            encoder.activation_checkpointing_enable({"use_reentrant": False})
        elif hasattr(encoder, "set_grad_checkpointing"):  # open_clip
            encoder.set_grad_checkpointing(True)
        else:
            raise CxrayError(f"activation_checkpointing: {self.seen.name} cannot; set it to false")
