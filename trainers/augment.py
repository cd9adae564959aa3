"""Chest X-rays as they might also have been taken: a patient who stands a little askew, a harder or softer exposure.

Never mirrored: the heart is on the left, and a picture of it on the right is another finding.
"""

import cv2
import numpy as np
from pydantic import Field

from contracts.config import Config


class Augment(Config):
    """How far each may go, either way. All are within what ConVIRT used on MIMIC-CXR (Zhang et al. 2020, arXiv:2010.00747: 20 degrees, 0.1,
    0.05, 0.4, 0.4; it mirrored too)."""

    rotate: float = Field(default=7.0, ge=0, le=45)  # degrees
    shift: float = Field(default=0.05, ge=0, le=0.5)  # of a side, along each axis
    scale: float = Field(default=0.05, ge=0, lt=1)
    brightness: float = Field(default=0.1, ge=0, lt=1)  # of the whole range of greys, added
    contrast: float = Field(default=0.2, ge=0, lt=1)  # around the middle grey

    def __call__(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, H] -> uint8 [H, H]. What moves in from outside is black, as the stored picture's margins are."""
        angle, across, down, larger, brighter, harder = rng.uniform(-1, 1, 6)
        side = picture.shape[0]
        move = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), self.rotate * angle, 1 + self.scale * larger)
        move[:, 2] += (self.shift * side * across, self.shift * side * down)
        greys = (np.arange(256) - 127.5) * (1 + self.contrast * harder) + 127.5 + 255 * self.brightness * brighter
        levels = np.clip(np.round(greys), 0, 255).astype(np.uint8)
        return cv2.warpAffine(levels[picture], move, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
