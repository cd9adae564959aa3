"""The stored picture as a model's input: what the model's own preprocessing does, on the model's device."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from contracts.errors import CxrayError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pixels:
    """Resize (antialiased), cut out the centre, scale, normalise; grey becomes the model's three channels.

    resize: pixels a side after resizing. size: pixels a side after the cut. scale: what a grey level is multiplied by.
    """

    resize: int
    size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise CxrayError(f"its preprocessing resizes by '{self.interpolation}'; cxray knows bicubic and bilinear")
        if self.size > self.resize:
            raise CxrayError(f"its preprocessing pads {self.resize} px to {self.size} px; cxray only cuts")

    def __call__(self, images: np.ndarray, device: torch.device) -> torch.Tensor:
        """uint8 [B, H, H] -> float32 [B, 3, size, size] on the device."""
        return self.of(torch.tensor(images).to(device))

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """The same of a tensor, on its device."""
        grey = images[:, None].float()
        if grey.shape[-1] != self.resize:
            shape = (self.resize, self.resize)
            # The libraries resize bytes to bytes: bicubic overshoots are clipped, and levels rounded.
            grey = F.interpolate(grey, shape, mode=self.interpolation, antialias=True).clamp(0, 255).round()
        edge = (self.resize - self.size) // 2
        grey = grey[..., edge : edge + self.size, edge : edge + self.size]
        mean, std = (torch.tensor(v, device=grey.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (grey * self.scale - mean) / std
