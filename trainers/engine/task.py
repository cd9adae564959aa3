"""What a task tells the engine. The task owns its step; the engine owns everything around it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from contracts.errors import CxrayError

Batch = dict[str, Any]  # tensors are moved to the worker's device; anything else passes as it is


class Task(Protocol):
    """Inherit from it and fill in what has no default. It is sent to the workers as it stands after `fit`."""

    columns: Sequence[str]  # all that `prepare` and `fit` read, besides row_id, group_id and split
    limits: str = ""  # what the model is not to be trusted with, for its card

    @abstractmethod
    def fit(self, train: pa.Table) -> dict[str, Any]:
        """Learn scalers, pos_weight, vocabulary; keep them, and return them in plain values for the record.

        train: the train split's keys and those columns that stand in small tables, in the order of row_id.
        """
        ...

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, in float32. Seeded before; under ZeRO-3 called where parameters are cut up as they are made."""
        ...

    @abstractmethod
    def prepare(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One row, on the CPU: decode, augment, tokenise. rng depends on seed, epoch and row alone, whoever asks."""
        ...

    @abstractmethod
    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Prepared rows -> a batch: stack, pad, lengths."""
        ...

    @abstractmethod
    def weight(self, batch: Batch) -> Tensor:
        """How many labels or tokens of the batch the loss is averaged over (a scalar)."""
        ...

    @abstractmethod
    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss *summed* over what `weight` counts (a scalar). What the model returns is in the precision computed in: `.float()` it."""
        ...

    @abstractmethod
    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Any]:
        """Tensors, arrays or lists with an entry a row: scores, and the truth that `metrics` compares them with."""
        ...

    @abstractmethod
    def metrics(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of the whole validate split, in the order of row_id."""
        ...

    @abstractmethod
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write all that is needed to predict: safetensors, config, order of features and labels, scalers."""
        ...

    # ---- what most tasks leave as it is ----

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for AdamW, each with a `lr` or `weight_decay` of its own if it wants. Here: no decay on biases and norms."""
        trained = [p for p in model.parameters() if p.requires_grad]
        flat = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]  # ds_shape: the whole one, where ZeRO-3 cut it up
        deep = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
        return [g for g in ({"params": deep}, {"params": flat, "weight_decay": 0.0}) if g["params"]]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """What the model is made of, by the names that a person is to read."""
        return dict(model.named_children())

    def step(self, model: Callable[..., Any], micros: Sequence[Batch], backward: Callable[[Tensor], None]) -> dict[str, float]:
        """One optimiser step's forward and backward; `backward` must be called once a micro-batch. Returns at least the loss.

        Gradients are averaged over ranks, so backward(loss_sum * ranks / global_weight) makes their mean the gradient of the loss
        over all labels of the global batch, however these fell on ranks and micro-batches, and whatever was masked.
        """
        weight = float(total(torch.stack([self.weight(batch).detach().double() for batch in micros]).sum()))
        scale = ranks() / weight if weight else 0.0
        sums = []
        for batch in micros:
            loss = self.loss(model, batch)
            backward(loss * scale)
            sums.append(loss.detach().double())
        return {"loss": float(total(torch.stack(sums).sum())) / (weight or 1.0)}

    def balance(self, train: pa.Table) -> np.ndarray:
        """For `sampling: balanced`: how often to draw each row of the table that `fit` saw, in any unit."""
        raise CxrayError("sampling: balanced: this task has no classes to balance; set sampling: natural")


def ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if ranks() > 1:
        torch.distributed.all_reduce(value)
    return value
