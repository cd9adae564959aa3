"""Which rows make which step: known beforehand, so that a run can be resumed anywhere and on any number of workers.

An epoch is a seeded permutation of row numbers, cut into global batches; a rank takes every world-th row of each. So a global
batch holds the same rows whatever the world size, each row stands in at most one of an epoch, and (epoch, step) is all that has to be
remembered. The rows left over after the last whole batch sit out; others do in the next epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainers.engine.settings import micros

Index = tuple[int, int]  # (epoch, row number)


@dataclass(frozen=True)
class Order:
    rows: int
    batch: int  # rows an optimiser step, over all ranks
    micro_batch: int
    seed: int
    weights: np.ndarray | None = None  # [rows]: draw with replacement, so often

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch."""
        return self.rows // self.batch

    def epoch(self, epoch: int) -> np.ndarray:
        """Row numbers [steps, batch]."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            order = rng.permutation(self.rows)
        else:
            order = rng.choice(self.rows, size=self.rows, p=self.weights / self.weights.sum())
        return order[: self.steps * self.batch].reshape(self.steps, self.batch)

    def share(self, batch: np.ndarray, rank: int, world: int) -> list[np.ndarray]:
        """A global batch -> this rank's micro-batches; as many on every rank, and none empty."""
        return np.array_split(batch[rank::world], micros(self.batch, self.micro_batch, world))

    def stream(self, rank: int, world: int, start: tuple[int, int], epochs: int) -> Iterator[list[Index]]:
        """This rank's micro-batches from (epoch, step) to the end of training."""
        first, skip = start
        for epoch in range(first, epochs):
            for batch in self.epoch(epoch)[skip if epoch == first else 0 :]:
                for part in self.share(batch, rank, world):
                    yield [(epoch, int(number)) for number in part]


@dataclass(frozen=True)
class Stream:
    """An order as a PyTorch batch sampler."""

    order: Order
    rank: int
    world: int
    start: tuple[int, int]
    epochs: int

    def __iter__(self) -> Iterator[list[Index]]:
        return self.order.stream(self.rank, self.world, self.start, self.epochs)
