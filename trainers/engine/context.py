"""Where a worker stands: what Ray Train, or a test without it, gives the loop."""

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contracts.storage import Place


@dataclass
class Context:
    """Where a worker stands. report: metrics of rank 0, and this rank's part of a checkpoint (a folder, which becomes the reporter's);
    every rank calls it equally often. leaving: the nodes that are about to be taken away, the same on all ranks, which all ask."""

    rank: int
    world: int
    device: torch.device
    report: Callable[[dict[str, Any], Path | None], None]
    resume: Path | None = None  # the last checkpoint, of all ranks
    leaving: Callable[[], Collection[str]] = tuple
    board: Place | None = None  # a folder for TensorBoard


def into(folder: Path) -> Callable[[dict[str, Any], Path | None], None]:
    """A `report` that lays the ranks' parts of the last checkpoint together in one folder, for runs without Ray."""

    def report(metrics: dict[str, Any], part: Path | None) -> None:
        if part is not None:
            shutil.copytree(part, folder, dirs_exist_ok=True)
            shutil.rmtree(part)

    return report


def from_first(value: Any, ctx: Context) -> Any:
    """Rank 0's value, on all ranks."""
    said = [value]
    if ctx.world > 1:
        torch.distributed.broadcast_object_list(said, device=ctx.device)
    return said[0]


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    return batch
