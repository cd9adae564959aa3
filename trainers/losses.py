"""Multi-label losses on logits: weighted cross-entropy, focal loss, and their sum.

Each is given per element, [B, F], and not averaged: sum and weight stay apart, so that the engine can divide by the weight of the
global batch, and one rank equals many. A masked element has no loss and no gradient, whatever its target or logit. All in
float32, from log-sigmoids: nothing overflows and no logarithm is taken of a probability.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from contracts.config import Config
from contracts.errors import CxrayError


class LossConfig(Config):
    bce: float = Field(default=0.7, ge=0, description="the share of weighted cross-entropy")
    focal: float = Field(default=0.3, ge=0, description="the share of the focal loss")
    gamma: float = Field(default=2.0, ge=0, description="how much the focal loss leaves out what is easy")
    alpha: float | None = Field(default=0.25, ge=0, le=1, description="the focal weight of positives; negatives get the rest; null: both 1")
    pos_weight_cap: float = Field(default=20.0, gt=0, description="the most that positives may weigh in the cross-entropy")

    @model_validator(mode="after")
    def _something_is_left(self) -> "LossConfig":
        if self.bce + self.focal == 0:
            raise ValueError("bce and focal are both 0: there is no loss to train on")
        return self


def combined(cfg: LossConfig, logits: Tensor, target: Tensor, mask: Tensor, pos_weight: Tensor) -> Tensor:
    """`cfg.bce` times `weighted_bce` plus `cfg.focal` times `focal`, float32 [B, F]."""
    return cfg.bce * weighted_bce(logits, target, mask, pos_weight) + cfg.focal * focal(logits, target, mask, cfg.gamma, cfg.alpha)


def weighted_bce(logits: Tensor, target: Tensor, mask: Tensor, pos_weight: Tensor) -> Tensor:
    """Cross-entropy with positives weighted by finding: -(w t log p + (1 - t) log(1 - p)), float32 [B, F].

    logits: [B, F] of any float type; target: [B, F] in 0 to 1, anything where masked; mask: bool [B, F]; pos_weight: [F].
    """
    logits, target, mask = _unmasked(logits, target, mask)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=pos_weight.float(), reduction="none")
    return loss * mask


def focal(logits: Tensor, target: Tensor, mask: Tensor, gamma: float = 2.0, alpha: float | None = 0.25) -> Tensor:
    """Focal loss (Lin et al. 2017, arXiv:1708.02002, equation 5): -a_t (1 - p_t)^gamma log(p_t), float32 [B, F].

    A soft target t gives t times the loss of a positive plus 1 - t times that of a negative: the expected loss. Shapes as `weighted_bce`.
    """
    logits, target, mask = _unmasked(logits, target, mask)
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    # (1 - p)^gamma as an exponential: a power of 0 would have no gradient where gamma is below 1.
    positive, negative = -torch.exp(gamma * log_q) * log_p, -torch.exp(gamma * log_p) * log_q
    a, b = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return (a * target * positive + b * (1 - target) * negative) * mask


def _unmasked(logits: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in float32, with harmless numbers where masked: NaN times 0 would be NaN."""
    mask = mask.bool()
    return torch.where(mask, logits.float(), 0.0), torch.where(mask, target.float(), 0.0), mask.float()


def pos_weight(target: np.ndarray, mask: np.ndarray, findings: Sequence[str], cap: float, drawn: np.ndarray | None = None) -> np.ndarray:
    """Negatives by positives of each finding, at most `cap`; float32 [F]. To be taken of the train split alone.

    target: float [n, F], a soft one counting by its share; mask: bool [n, F]; findings: the names of the F columns; drawn: [n], how
    often each row is, in any unit, where not all are alike: what the sampling has evened out is not to be weighted again.
    Raises CxrayError where a finding has no positives, or no negatives.
    """
    known = np.where(mask, target, 0)
    often = np.ones(len(mask)) if drawn is None else drawn
    positives, total = often @ known, often @ mask
    for kind, there in (("positives", mask & (known > 0.5)), ("negatives", mask & (known < 0.5))):
        if lacking := [name for name, n in zip(findings, there.sum(axis=0), strict=True) if n == 0]:
            raise CxrayError(
                f"no {kind} in train for {', '.join(lacking)}: there is nothing to learn; leave {'it' if len(lacking) == 1 else 'them'} "
                f"out by `findings:`, or choose another policy for uncertain and blank labels"
            )
    return np.minimum((total - positives) / positives, cap).astype(np.float32)
