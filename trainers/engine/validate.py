"""Predictions over a whole split: shared out over the ranks, each row once, gathered by rank 0."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from trainers.engine.context import Context, moved
from trainers.engine.data import Rows
from trainers.engine.settings import TrainerConfig
from trainers.engine.task import Task


def predictions(
    task: Task, model: Any, rows: Rows, cfg: TrainerConfig, ctx: Context, limit: int | None = None
) -> dict[str, np.ndarray] | None:
    """name -> array with an entry a row, in the order of row_id; None on all ranks but 0. limit: of the first so many rows."""
    count = min(len(rows), limit or len(rows))
    mine = np.arange(count)[ctx.rank :: ctx.world]
    turns = -(-count // ctx.world)
    # Under ZeRO-3 every rank must go forward as often as the others: who has a row less takes the first one again, and drops it.
    padded = np.concatenate([mine, np.zeros(turns - len(mine), np.int64)])
    which = [[(0, int(n)) for n in part] for part in np.split(padded, range(cfg.micro_batch, turns, cfg.micro_batch))]
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    with torch.no_grad():
        for batch in DataLoader(rows, batch_sampler=which, collate_fn=task.collate):  # pyright: ignore[reportArgumentType]
            said = task.predict(model, moved(batch, ctx.device))
            parts.append({name: array(v) for name, v in said.items()})
    own = {name: np.concatenate([p[name] for p in parts])[: len(mine)] for name in parts[0]}
    if ctx.world == 1:
        return own
    everyone: list[Any] | None = [None] * ctx.world if ctx.rank == 0 else None
    torch.distributed.gather_object(own, everyone)
    return None if everyone is None else {name: dealt([e[name] for e in everyone], count) for name in own}


def array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value  # NumPy has none
    return np.asarray(value)


def dealt(shares: list[np.ndarray], rows: int) -> np.ndarray:
    """Rank r's k-th row is row r + k * ranks."""
    whole = np.empty((rows, *shares[0].shape[1:]), np.result_type(*shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole
