"""The training of one worker, wherever it runs: Ray Train or a test gives it a `Context`, and nothing here asks which."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from contracts.errors import CxrayError
from evaluation.metrics import plain
from pipelines.pool import keep_memory
from trainers.engine.board import Board
from trainers.engine.context import Context, from_first, moved
from trainers.engine.data import Data, Rows
from trainers.engine.order import Order, Stream
from trainers.engine.plain import Plain, outline
from trainers.engine.settings import TrainerConfig, check_rows, micros, smallest_micro
from trainers.engine.sharded import Sharded
from trainers.engine.task import Batch, Task
from trainers.engine.validate import predictions
from trainers.engine.watch import Watch

POSITION, WEIGHTS = "position.json", "weights.safetensors"


@dataclass
class Position:
    """How far a run is; with weights and optimiser states all that a checkpoint has to hold."""

    epoch: int = 0
    step: int = 0  # of the epoch, the next one to take
    best_epoch: int | None = None
    best: dict[str, float] = field(default_factory=dict)  # its metrics
    waited: int = 0  # epochs since
    over: bool = False
    steps: list[dict[str, float]] = field(default_factory=list)  # loss, lr, grad_norm of each step
    epochs: list[dict[str, float]] = field(default_factory=list)  # metrics on the validate split


def train(ctx: Context, task: Task, cfg: TrainerConfig, data: Data, weights: np.ndarray | None = None) -> dict[str, Any]:
    """Train to the end, or from `ctx.resume` on. Returns what `Position` says there, as plain values.

    weights: how often to draw each row of the train split, where that is not once an epoch.
    """
    check_device(ctx.device, cfg)
    keep_memory()
    said = last(cfg, ctx)
    motor = start(task, cfg, ctx, sharded=cfg.sharded or (said is not None and said["sharded"]))
    rows, held_out = (Rows(task, data, split, cfg.seed, cfg.resources.cache) for split in ("train", "validate"))
    check_rows(cfg, len(rows), len(held_out))
    order = Order(len(rows), cfg.batch, cfg.micro_batch, cfg.seed, weights)
    rates = [group["lr"] for group in motor.optimizer.param_groups]
    at = resume(motor, said, ctx.resume) if said and ctx.resume else Position()
    if not said:  # a wrong name is said now, not after an epoch
        few = cfg.micro_batch * ctx.world
        known(cfg, agreed(task.metrics, predictions(task, motor.model, held_out, cfg, ctx, few), ctx))
    batches = load(rows, task, cfg, Stream(order, ctx.rank, ctx.world, (at.epoch, at.step), cfg.epochs))
    parts = micros(cfg.batch, cfg.micro_batch, ctx.world)
    board, watch = Board(ctx.board if ctx.rank == 0 else None), Watch(ctx)
    while not at.over:
        motor.model.train()
        while at.step < order.steps:
            number = at.epoch * order.steps + at.step
            set_rate(motor, rates, schedule(number, order.steps * cfg.epochs, cfg.warmup))
            torch.manual_seed(int(np.random.SeedSequence([cfg.seed, at.epoch, at.step, ctx.rank]).generate_state(1)[0]))
            began = time.perf_counter()
            fetched = [moved(next(batches), ctx.device) for _ in range(parts)]
            ready = time.perf_counter()
            done = one_step(task, motor, fetched, cfg, at)
            done |= {"lr": motor.optimizer.param_groups[0]["lr"], "wait_s": ready - began, "seconds": time.perf_counter() - began}
            at.steps.append(done)
            at.step += 1
            board.write("train", number, done)
            leaving = watch.announced(done["seconds"])
            if at.step < order.steps and (leaving or (cfg.checkpoint_steps and at.step % cfg.checkpoint_steps == 0)):
                checkpoint(ctx, motor, cfg, at, {"loss": done["loss"]})
        one_mind(motor.module, ctx)
        judge(cfg, at, agreed(task.metrics, predictions(task, motor.model, held_out, cfg, ctx), ctx), order.steps)
        board.write("validate", at.epoch * order.steps, at.epochs[-1])
        board.flush()
        checkpoint(ctx, motor, cfg, at, at.epochs[-1], with_weights=at.waited == 0)
    return asdict(at)


def start(task: Task, cfg: TrainerConfig, ctx: Context, sharded: bool) -> Plain | Sharded:
    """The model, the same on every rank, and what takes its steps. sharded: by DeepSpeed."""

    def build() -> nn.Module:
        torch.manual_seed(cfg.seed)
        module = task.build()
        if cfg.activation_checkpointing:
            enable = getattr(module, "gradient_checkpointing_enable", None)
            if enable is None:
                raise CxrayError(f"activation_checkpointing: {type(module).__name__} cannot; set it to false")
            enable()
        module.train()
        check_norms(module, cfg)
        return module

    if sharded:
        return Sharded(build, task.groups, cfg, ctx.device, micros(cfg.batch, cfg.micro_batch, ctx.world))
    return Plain(build, task.groups, cfg, ctx.device)


def last(cfg: TrainerConfig, ctx: Context) -> dict[str, Any] | None:
    """What the last checkpoint says of itself. Raises CxrayError where this run's settings or workers cannot go on from it."""
    if ctx.resume is None:
        return None
    said = json.loads((ctx.resume / POSITION).read_text())
    if said["zero_stage"] != cfg.zero_stage:
        raise CxrayError(f"the last checkpoint was written with zero_stage {said['zero_stage']}: set it back, or start a new run")
    if cfg.zero_stage and said["world"] != ctx.world:
        raise CxrayError(
            f"the last checkpoint was written by {said['world']} workers at ZeRO stage {cfg.zero_stage}, and only as many can go on from "
            f"it; now there are {ctx.world}: set resources.workers to {said['world']}, or start a new run with zero_stage 0"
        )
    return said


def resume(motor: Plain | Sharded, said: dict[str, Any], folder: Path) -> Position:
    """Go on where the last checkpoint stands. Raises CxrayError where it is of another model."""
    if said["outline"] != outline(motor.module):
        raise CxrayError("the last checkpoint is of another model: name another folder for this run, or delete its checkpoints")
    motor.load(folder)
    at = Position(**said["position"])
    at.best, at.steps, at.epochs = numbers(at.best), [numbers(s) for s in at.steps], [numbers(e) for e in at.epochs]
    return at


def numbers(said: Mapping[str, float | None]) -> dict[str, float]:
    """As they were before JSON, which has no NaN."""
    return {name: math.nan if value is None else value for name, value in said.items()}


def load(rows: Rows, task: Task, cfg: TrainerConfig, which: Any) -> Iterator[Batch]:
    """Prepared batches, ahead of time where `loaders` are there to prepare them."""
    ahead: dict[str, Any] = {"num_workers": cfg.resources.loaders, "pin_memory": cfg.resources.gpus > 0}
    if cfg.resources.loaders:
        ahead |= {"multiprocessing_context": "forkserver", "prefetch_factor": 4}  # a fork would copy the threads' locks of gloo and Arrow
    return iter(DataLoader(rows, batch_sampler=which, collate_fn=task.collate, **ahead))


def one_step(task: Task, motor: Plain | Sharded, batches: list[Batch], cfg: TrainerConfig, at: Position) -> dict[str, float]:
    """Forward, backward, update. Raises CxrayError where the loss or the gradient is no number; no rank goes on then."""
    done = {name: float(value) for name, value in task.step(motor.model, batches, motor.backward).items()}
    where = f"at step {at.step} of epoch {at.epoch}"
    if not math.isfinite(done["loss"]):
        raise CxrayError(f"the loss is {done['loss']} {where}: lower lr, raise warmup, or look for extreme numbers in the inputs")
    if cfg.precision == "fp16":
        done["scale"] = motor.scale
    done["grad_norm"] = motor.step()
    if not math.isfinite(done["grad_norm"]) and done.get("scale", 1) <= 1:  # above it the step was left out, and the scale is lower now
        raise CxrayError(f"the gradient is {done['grad_norm']} {where}: lower lr, raise warmup, or look for extreme numbers in the inputs")
    return done


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the full rate: up in a line over the first `warmup` of all steps, then down to 0 in half a cosine."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def set_rate(motor: Plain | Sharded, rates: list[float], share: float) -> None:
    for group, rate in zip(motor.optimizer.param_groups, rates):
        group["lr"] = rate * share


def one_mind(module: nn.Module, ctx: Context) -> None:
    """Buffers (batch norm's running statistics) averaged over ranks, which saw different rows."""
    if ctx.world > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer /= ctx.world


def agreed(metrics: Callable[[dict[str, Any]], Mapping[str, float]], found: dict[str, Any] | None, ctx: Context) -> dict[str, float]:
    """Rank 0 computes, all ranks know."""
    return from_first({name: float(value) for name, value in metrics(found).items()} if found is not None else {}, ctx)


def known(cfg: TrainerConfig, metrics: Mapping[str, float]) -> None:
    """Raises CxrayError where the metric that decides is none of the task's."""
    if cfg.metric not in metrics:
        raise CxrayError(f"metric {cfg.metric!r} is none of this task's: {', '.join(sorted(metrics))}")


def judge(cfg: TrainerConfig, at: Position, metrics: dict[str, float], steps: int) -> None:
    """Close an epoch: is it the best, is it the last? Raises CxrayError where there is nothing yet to tell a better one by."""
    if at.best_epoch is None and math.isnan(metrics[cfg.metric]):
        raise CxrayError(
            f"metric {cfg.metric} is undefined on the validate split, so that no epoch would be the best: add rows there (a finding needs "
            "both positives and negatives), or choose another metric"
        )
    loss = float(np.mean([s["loss"] for s in at.steps[-steps:]]))
    at.epochs.append({"epoch": at.epoch, "train_loss": loss, **metrics})
    better = at.best_epoch is None or score(metrics[cfg.metric], cfg) > score(at.best[cfg.metric], cfg)
    if better:
        at.best_epoch, at.best, at.waited = at.epoch, metrics, 0
    else:
        at.waited += 1
    at.epoch, at.step = at.epoch + 1, 0
    at.over = at.epoch == cfg.epochs or (cfg.patience is not None and at.waited >= cfg.patience)


def score(value: float, cfg: TrainerConfig) -> float:
    """Higher is better; what is no number is worst."""
    return -1e30 if math.isnan(value) else value if cfg.mode == "max" else -value


def checkpoint(
    ctx: Context, motor: Plain | Sharded, cfg: TrainerConfig, at: Position, metrics: dict[str, float], with_weights: bool = False
) -> None:
    """Every rank saves its part into a folder of its own and reports it.

    with_weights: of the best epoch so far, the weights by themselves too, as safetensors, for export.
    """
    one_mind(motor.module, ctx)
    folder = Path(tempfile.mkdtemp(prefix="cxray-checkpoint-"))
    motor.save(folder)
    weights = motor.weights() if with_weights else {}
    if ctx.rank == 0:
        if with_weights:
            save_file(weights, folder / WEIGHTS)
        about = {"world": ctx.world, "zero_stage": cfg.zero_stage, "sharded": isinstance(motor, Sharded), "outline": outline(motor.module)}
        (folder / POSITION).write_text(json.dumps(plain({**about, "position": asdict(at)}), allow_nan=False))
    worth = -2e30  # within an epoch: worth nothing but being the last
    if at.step == 0:
        worth = score(metrics[cfg.metric], cfg)
        worth = worth if with_weights else math.nextafter(worth, -math.inf)  # no better than the best: of equals Ray keeps the later
    ctx.report({**metrics, "epoch": at.epoch, "step": at.step, "score": worth}, folder)


def check_device(device: torch.device, cfg: TrainerConfig) -> None:
    """Raises CxrayError where the worker has not what the settings need."""
    if cfg.resources.gpus and device.type != "cuda":
        raise CxrayError("resources.gpus asks for a GPU, and PyTorch finds none on this node: set resources.gpus to 0, or mend its driver")
    if cfg.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CxrayError(f"precision bf16: a {torch.cuda.get_device_name(device)} cannot compute in it; set precision fp16 or fp32")


def check_norms(module: nn.Module, cfg: TrainerConfig) -> None:
    """Raises CxrayError where batch norm would train on a single row, on any number of workers that there may be."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules()):
        for workers in cfg.resources.counts:
            if smallest_micro(cfg.batch, cfg.micro_batch, workers) < 2:
                raise CxrayError(
                    f"batch norm needs at least two rows: batch {cfg.batch} on {workers} workers in micro-batches of {cfg.micro_batch} "
                    "leaves one; raise batch or micro_batch"
                )


@contextmanager
def within_memory(cfg: TrainerConfig) -> Iterator[None]:
    """Raises CxrayError where the GPU's memory does not suffice, which another try would not mend."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise CxrayError(
            f"the GPU's memory is full: lower micro_batch ({cfg.micro_batch}), set activation_checkpointing, or raise zero_stage"
        ) from None
