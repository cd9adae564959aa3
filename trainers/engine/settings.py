"""What a training run can be told, whatever the task."""

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from contracts.config import Config
from contracts.errors import CxrayError


class Resources(Config):
    """Where and how fast; never what is learnt."""

    workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)  # elastic: go on with so many where there are no more (ZeRO stage 0)
    cpus: float = Field(default=1.0, gt=0)  # a worker
    gpus: float = Field(default=0.0, ge=0)  # a worker; 0 trains on CPUs, with gloo
    loaders: int = Field(default=0, ge=0)  # processes a worker that prepare rows ahead; 0 prepares in the worker itself
    failures: int = Field(default=3, ge=0)  # workers' deaths to get over; the loss of a spot node, where announced, is not counted
    cache: str | None = None  # where on each node's own disk the rows are copied to; by default in its temporary folder

    @property
    def counts(self) -> range:
        """How many workers there may be."""
        return range(self.min_workers or self.workers, self.workers + 1)


class TrainerConfig(Config):
    """One training run."""

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=256, ge=1)  # rows an optimiser step, over all workers
    micro_batch: int = Field(default=64, ge=1)  # at most so many rows a forward pass of a worker; the rest is accumulated
    sampling: Literal["natural", "balanced"] = "natural"  # balanced: drawn with replacement, as the task weighs its classes
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)  # share of all steps over which the rate rises; then a cosine down to 0
    clip: float = Field(default=1.0, ge=0)  # largest norm of the gradient; 0 does not clip
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the computation; weights and optimiser stay float32
    zero_stage: Literal[0, 1, 2, 3] = 0  # what DeepSpeed shares out: 1 optimiser states, 2 gradients too, 3 weights too
    offload: bool = False  # optimiser states in the node's memory, not the GPU's
    deepspeed: bool = False  # several workers, or a ZeRO stage, use DeepSpeed anyhow; one worker needs none
    activation_checkpointing: bool = False  # compute activations again instead of keeping them
    metric: str = "loss"  # of the task's own metrics: decides which weights are best
    mode: Literal["max", "min"] = "min"
    patience: int | None = Field(default=None, ge=1)  # stop after so many epochs without a better one
    keep_best: int = Field(default=1, ge=1)  # checkpoints kept besides the last
    checkpoint_steps: int | None = Field(default=None, ge=1)  # also within an epoch
    seed: int = 0
    resources: Resources = Field(default_factory=lambda: Resources.model_validate({}))

    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"resources"})

    @property
    def sharded(self) -> bool:
        """DeepSpeed takes the steps."""
        return self.deepspeed or self.zero_stage > 0 or self.resources.workers > 1

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainerConfig":
        r = self.resources
        fewest = r.min_workers or r.workers
        if fewest > r.workers:
            raise ValueError(f"resources.min_workers {fewest} is more than resources.workers {r.workers}")
        if fewest < r.workers and self.zero_stage:
            raise ValueError(
                f"elastic training (resources.min_workers) needs zero_stage 0: a checkpoint of stage {self.zero_stage} goes on only with "
                "as many workers as wrote it"
            )
        if self.offload and not self.zero_stage:
            raise ValueError("offload needs zero_stage 1, 2 or 3")
        for workers in r.counts:
            if self.micro_batch * workers > self.batch and self.micro_batch > 1:
                raise ValueError(
                    f"micro_batch {self.micro_batch} on {workers} workers is more than batch {self.batch}: lower micro_batch or raise batch"
                )
            if smallest_micro(self.batch, self.micro_batch, workers) < 1:
                raise ValueError(f"batch {self.batch} cannot be shared out to {workers} workers: make it a multiple of them")
        return self


def micros(batch: int, micro_batch: int, workers: int) -> int:
    """Forward passes an optimiser step, the same on every worker."""
    return math.ceil(math.ceil(batch / workers) / micro_batch)


def smallest_micro(batch: int, micro_batch: int, workers: int) -> int:
    """Rows of the smallest micro-batch that any worker sees."""
    return (batch // workers) // micros(batch, micro_batch, workers)


def check_rows(cfg: TrainerConfig, train: int, validate: int) -> None:
    """Raises CxrayError where there are too few rows to train on."""
    if train < cfg.batch:
        raise CxrayError(f"the train split has {train:,} rows, fewer than one batch of {cfg.batch}: lower batch, or add rows")
    if not validate:
        raise CxrayError("the validate split has no rows, so there is nothing to choose the best weights by")
