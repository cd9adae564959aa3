"""Does the network look at passages, and does what it looks at matter to what it says?

Attention alone shows where a network looks, not what moves it (Jain & Wallace 2019, arXiv:1902.10186). So the passage that it looks at
most is taken away, and beside it, for the same study, another one by chance: if attention points at what an answer rests on, the first
loss lowers the score of the findings that are there by more than the second (a deletion test, DeYoung et al. 2020, arXiv:1911.03429).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from evaluation.intervals import interval, resample
from models.mdfnet import KINDS
from trainers.engine import Data
from trainers.engine.context import moved
from trainers.engine.data import Rows
from trainers.fusion import Fusion

PASSAGE = KINDS.index("passage")
MEASURES = ("mass", "share", "most", "chance")


def looked_at(task: Fusion, module: nn.Module, data: Data, seed: int, split: str = "test") -> dict[str, np.ndarray]:
    """By row, in the order of row_id: group; NaN where there is nothing to measure of
    mass (of the image's attention over segments, the part on passages), share (of the segments, those that are passages), most and
    chance (by how much the mean score of the findings that are there falls without the passage looked at most, and without another).
    """
    rows = Rows(task, data, split, seed, task.cfg.training.resources.cache)
    device = next(module.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    size, found = task.cfg.training.micro_batch, []
    with torch.inference_mode():
        for start in range(0, len(rows), size):
            batch = moved(task.collate([rows[0, i] for i in range(start, min(start + size, len(rows)))]), device)
            found.append(_of_batch(task, module, batch, rng))
    return {"group": rows.keys["group_id"].to_numpy(), **{name: np.concatenate([f[name] for f in found]) for name in MEASURES}}


def _of_batch(task: Fusion, module: nn.Module, batch: dict[str, Any], rng: torch.Generator) -> dict[str, np.ndarray]:
    out = task.forward(module, batch, attention=True)
    passage = (batch["kinds"] == PASSAGE) & batch["text_mask"]
    weights = out["segments"].float()
    most = torch.where(passage, weights, -1).argmax(1)
    others = passage.clone()
    others[torch.arange(len(most)), most] = False
    chance = torch.where(others, torch.rand(others.shape, generator=rng).to(others.device), -1).argmax(1)
    whole = out["logits"].sigmoid()
    there = (batch["target"] == 1) & batch["mask"]

    def loss(which: torch.Tensor) -> torch.Tensor:
        mask = batch["text_mask"].clone()
        mask[torch.arange(len(which)), which] = False
        without = task.forward(module, {**batch, "text_mask": mask}).sigmoid()
        fallen = ((whole - without) * there).sum(1) / there.sum(1)
        return torch.where(others.any(1) & there.any(1), fallen, torch.nan)

    some = passage.any(1)
    values = {
        "mass": torch.where(some, (weights * passage).sum(1), torch.nan),
        "share": torch.where(some, passage.sum(1) / batch["text_mask"].sum(1), torch.nan),
        "most": loss(most),
        "chance": loss(chance),
    }
    return {name: value.double().cpu().numpy() for name, value in values.items()}


def evidence(looks: Sequence[Mapping[str, np.ndarray]], resamples: int) -> dict[str, Any]:
    """What `looked_at` saw of each seed's network, averaged over seeds -> each measure as an Interval, their 'difference', 'words'."""
    seen = {name: np.mean([look[name] for look in looks], axis=0) for name in MEASURES}
    seen["difference"] = seen["most"] - seen["chance"]
    groups = looks[0]["group"]
    told = {name: _mean(values, groups, resamples) for name, values in seen.items()}
    d = told["difference"]
    verdict = (
        "attention points at what the scores rest on"
        if d.low > 0
        else "attention points away from it"
        if d.high < 0
        else "no difference shown: attention does not say what the scores rest on"
    )
    words = (
        f"Of the image's attention over note and passages, {told['mass']} falls on passages, which are {told['share'].value:.3f} of "
        f"what it may read. Without the passage it looks at most, the score of the findings that are there falls by {told['most']}, "
        f"without another one drawn by chance by {told['chance']}; the difference is {d.value:+.4f} ({d.low:+.4f} to {d.high:+.4f}): "
        f"{verdict}. 95 % intervals over patients, of the mean over seeds."
    )
    rows = int(np.isfinite(seen["difference"]).sum())
    return {**{name: asdict(one) for name, one in told.items()}, "rows": rows, "words": words}


def _mean(values: np.ndarray, groups: np.ndarray, resamples: int) -> Any:
    told = np.isfinite(values)
    if not told.any():
        return interval(np.nan, np.full(1, np.nan))
    values, groups = values[told], groups[told]
    drawn = resample(groups, lambda weights: (values @ weights) / weights.sum(axis=0), resamples, 0)
    return interval(float(values.mean()), drawn)
