"""A token grid made small enough to store: fewer tokens, then eight bits each."""

import numpy as np


def pool_grid(tokens: np.ndarray, n: int, g: int) -> np.ndarray:
    """Averages an n x n grid to g x g as adaptive average pooling does: cell i covers floor(i n/g) .. ceil((i+1) n/g).

    tokens: float [B, n * n, T], row-major. Returns float32 [B, g * g, T], row-major.
    Raises ValueError if the tokens are not n x n or g is not within 1 .. n.
    """
    batch, count, width = tokens.shape
    if count != n * n or not 1 <= g <= n:
        raise ValueError(f"cannot pool {count} tokens as a {n} x {n} grid to {g} x {g}")
    share = np.zeros((g, n), np.float32)
    for cell in range(g):
        start, stop = cell * n // g, -(-(cell + 1) * n // g)
        share[cell, start:stop] = 1 / (stop - start)
    grid = tokens.astype(np.float32, copy=False).reshape(batch, n, n, width)
    rows = np.tensordot(share, grid, axes=(1, 1))  # [g, B, n, T]
    cells = np.tensordot(share, rows, axes=(1, 2))  # [g(column), g(row), B, T]
    return np.ascontiguousarray(cells.transpose(2, 1, 0, 3)).reshape(batch, g * g, width)


def quantise(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight bits with one scale a token (its largest absolute value / 127).

    tokens: float [B, G, T]. Returns int8 [B, G, T] and float16 [B, G]. The error of a value is at most half its token's
    scale. A token of zeros has scale 0 and comes back as zeros.
    Raises ValueError on values that are not finite or whose scale float16 cannot hold.
    """
    tokens = tokens.astype(np.float32, copy=False)
    exact = np.abs(tokens).max(axis=-1, initial=0) / 127
    if not np.all(exact < np.finfo(np.float16).max):  # NaN fails this too
        raise ValueError("tokens hold values that are not finite, or too large for eight bits and a float16 scale")
    # The scale is rounded to float16 upwards, and before the division: no value is clipped, and what is stored is what
    # the values were divided by.
    scale = exact.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
    return np.round(tokens / divisor[..., None]).astype(np.int8), scale


def dequantise(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int8 [B, G, T] and float16 [B, G] back to float32 [B, G, T]."""
    return values.astype(np.float32) * scale.astype(np.float32)[..., None]
