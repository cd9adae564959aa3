"""`hog:` — histograms of oriented gradients: no weights, so that image search means something before any training.

Dalal and Triggs (CVPR 2005): unsigned gradients in 9 bins, cells of 8 px, blocks of 2 x 2 cells, L2-Hys normalised.
Written out here because OpenCV 5 no longer has cv2.HOGDescriptor. The blocks do not overlap: each is one token.
"""

import cv2
import numpy as np
import torch

from contracts.errors import CxrayError
from models.encoders.base import ImageEncoder, ImageOutput, unit

SIDE, CELL, BINS = 112, 8, 9
GRID = SIDE // (2 * CELL)
CLIP = 0.2


class HogEncoder(ImageEncoder):
    """7 x 7 tokens of 4 cells x 9 bins; the embedding is all of them in a row, at length 1."""

    size, grid, token_dim = SIDE, GRID, 4 * BINS
    dim = GRID * GRID * 4 * BINS
    joint = False
    fingerprint = f"hog/1 side={SIDE} cell={CELL} bins={BINS} clip={CLIP}"

    def encode(self, images: np.ndarray) -> ImageOutput:
        small = np.stack([cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for image in images])
        tokens = _blocks(_cells(small.astype(np.float32)))
        return ImageOutput(unit(tokens.reshape(len(images), -1)), tokens)


def load_image(source: str, device: torch.device) -> HogEncoder:
    """`hog:` takes no name and always runs on the CPU."""
    if source:
        raise CxrayError(f"hog: takes nothing after the colon, not '{source}'")
    return HogEncoder()


def _cells(grey: np.ndarray) -> np.ndarray:
    """float32 [B, side, side] -> [B, cells, cells, bins]: gradient strength, shared by the two nearest orientations."""
    dy, dx = np.zeros_like(grey), np.zeros_like(grey)
    dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    strength = np.hypot(dx, dy)
    angle = np.arctan2(dy, dx) % np.pi * (BINS / np.pi) - 0.5  # in bins; a bin's centre is a whole number
    n = SIDE // CELL
    cells = np.empty((len(grey), n, n, BINS), np.float32)
    for bin_ in range(BINS):
        away = np.abs((angle - bin_ + BINS / 2) % BINS - BINS / 2)
        share = strength * np.maximum(1 - away, 0)
        cells[..., bin_] = share.reshape(-1, n, CELL, n, CELL).sum(axis=(2, 4))
    return cells


def _blocks(cells: np.ndarray) -> np.ndarray:
    """[B, cells, cells, bins] -> [B, grid * grid, 4 * bins], row-major; normalised, clipped, normalised again."""
    blocks = cells.reshape(-1, GRID, 2, GRID, 2, BINS).transpose(0, 1, 3, 2, 4, 5).reshape(-1, GRID * GRID, 4 * BINS)
    # The constant keeps a flat block (black border, burnt-out air) near zero instead of blowing its noise up.
    length = np.sqrt(np.square(blocks).sum(axis=-1, keepdims=True) + (4.0 * CELL * CELL) ** 2)
    clipped = np.minimum(blocks / length, CLIP)
    return clipped / np.sqrt(np.square(clipped).sum(axis=-1, keepdims=True) + 1e-2)  # 1e-2: faint blocks stay faint
