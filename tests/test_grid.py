"""The token grid made small: pooled as torch pools, eight bits that lose at most half a step."""

import numpy as np
import pytest
import torch

from models.encoders.grid import dequantise, pool_grid, quantise

EXACT = 2e-5  # the same float32 sums in another order


@pytest.mark.parametrize(("n", "g"), [(37, 7), (16, 7), (14, 7), (7, 7), (4, 1)])
def test_pooling_is_torchs_adaptive_average(n, g):
    tokens = np.random.default_rng(n).normal(size=(2, n * n, 5)).astype(np.float32)
    grid = torch.tensor(tokens).reshape(2, n, n, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(grid, g).permute(0, 2, 3, 1).reshape(2, g * g, 5)
    np.testing.assert_allclose(pool_grid(tokens, n, g), expected, atol=EXACT)
    for wrong in ((n + 1, g), (n, n + 1), (n, 0)):
        with pytest.raises(ValueError, match="cannot pool"):
            pool_grid(tokens, *wrong)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-9, 1e4])
def test_eight_bits_lose_at_most_half_a_step(size):
    tokens = (np.random.default_rng(1).normal(size=(3, 49, 24)) * size).astype(np.float32)
    tokens[0, 0] = 0
    values, scale = quantise(tokens)
    assert values.dtype == np.int8 and scale.dtype == np.float16 and scale.shape == (3, 49)
    back, step = dequantise(values, scale), scale.astype(np.float32)[..., None]
    assert back.dtype == np.float32 and not back[0, 0].any() and (np.abs(back - tokens) <= step * 0.5001).all()
    if size >= 1:  # there a float16 scale is itself exact to a thousandth
        assert (step <= np.abs(tokens).max(-1, keepdims=True) / 127 * 1.002).all()
    for bad in (np.nan, np.inf, 1e8):
        with pytest.raises(ValueError, match="not finite"):
            quantise(np.full((1, 1, 2), bad, np.float32))
