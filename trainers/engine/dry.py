"""`dry_run`: one batch through data, model, loss, step, checkpoint and export, in this process, and what it saw on the way."""

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import torch

from contracts.dataset import Dataset
from contracts.storage import Place, told
from trainers.engine.context import Context, into, moved
from trainers.engine.data import Data, Rows
from trainers.engine.loop import (
    Position,
    check_device,
    check_norms,
    checkpoint,
    known,
    last,
    one_step,
    resume,
    start,
    within_memory,
)
from trainers.engine.order import Order
from trainers.engine.settings import TrainerConfig, check_rows, micros
from trainers.engine.task import Task
from trainers.engine.validate import predictions


@dataclass
class Seen:
    """What a dry run saw. seconds: of each stage. parameters: (all, those that train) of each part of the model, and in total."""

    shapes: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint_bytes: int = 0
    exported: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0

    def __str__(self) -> str:
        lines = ["dry run: one batch through everything, on this machine, without Ray and DeepSpeed"]
        lines += [f"  batch   {name}: {shape}" for name, shape in self.shapes.items()]
        lines += [f"  model   {'component':<20} {'parameters':>14} {'trained':>14}"]
        lines += [f"  model   {name:<20} {all_:>14,} {trained:>14,}" for name, (all_, trained) in self.parameters.items()]
        lines += [f"  loss    {self.loss:.6g}", f"  metrics {', '.join(f'{k} {v:.4g}' for k, v in self.metrics.items())} (few rows)"]
        lines += [f"  written checkpoint {self.checkpoint_bytes / 1e6:.1f} MB; model/ {', '.join(self.exported)}"]
        lines += ["  seconds " + ", ".join(f"{name} {s:.2f}" for name, s in self.seconds.items())]
        return "\n".join([*lines, f"  memory  {self.memory_bytes / 1e9:.2f} GB at most"])


def dry_run(task: Task, cfg: TrainerConfig, data: Data) -> Seen:
    """Raises CxrayError as training would."""
    seen = Seen()
    check_rows(cfg, len(data.split("train")), len(data.split("validate")))
    alone = cfg.model_copy(
        update={"zero_stage": 0, "offload": False, "deepspeed": False, "epochs": 1,
                "resources": cfg.resources.model_copy(update={"workers": 1, "min_workers": None, "loaders": 0})}
    )  # fmt: skip
    device = torch.device("cuda" if cfg.resources.gpus and torch.cuda.is_available() else "cpu")
    check_device(device, cfg)
    with within_memory(cfg), tempfile.TemporaryDirectory() as there:
        folder = Path(there)
        ctx = Context(0, 1, device, into(folder / "checkpoint"))
        with _timed(seen, "fit"):
            table = data.small_columns("train", task.columns)
            task.fit(table)
            if cfg.sampling == "balanced":
                task.balance(table)
        with _timed(seen, "data"):
            few = _few(data, cfg, task, folder)
            rows, held_out = (Rows(task, few, split, cfg.seed, str(folder / "rows")) for split in ("train", "validate"))
            order = Order(len(rows), cfg.batch, cfg.micro_batch, cfg.seed)
            batches = [task.collate([rows[i] for i in part]) for part in order.stream(0, 1, (0, 0), 1)]
            batches = [moved(b, device) for b in batches[: micros(cfg.batch, cfg.micro_batch, 1)]]
        seen.shapes = {k: _shape(v) for k, v in batches[0].items()}
        with _timed(seen, "model"):
            motor = start(task, alone, ctx, sharded=False)
            check_norms(motor.module, cfg)
        seen.parameters = {n: _count(part) for n, part in {**task.parts(motor.module), "total": motor.module}.items()}
        at = Position()
        with _timed(seen, "step"):
            motor.model.train()
            seen.loss = one_step(task, motor, batches, alone, at)["loss"]
        with _timed(seen, "validation"):
            seen.metrics = task.metrics(predictions(task, motor.model, held_out, alone, ctx) or {})
            known(cfg, seen.metrics)
        with _timed(seen, "checkpoint"):
            checkpoint(ctx, motor, alone, at, seen.metrics, with_weights=True)
            ctx.resume = folder / "checkpoint"
            resume(motor, last(alone, ctx) or {}, ctx.resume)
        seen.checkpoint_bytes = sum(f.stat().st_size for f in ctx.resume.rglob("*") if f.is_file())
        with _timed(seen, "export"):
            (folder / "model").mkdir()
            task.export(motor.module.eval(), folder / "model")
        seen.exported = sorted(str(f.relative_to(folder / "model")) for f in (folder / "model").rglob("*") if f.is_file())
    cuda = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seen.memory_bytes = max(cuda, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return seen


def _few(data: Data, cfg: TrainerConfig, task: Task, folder: Path) -> Data:
    """One batch of train and one micro-batch of validate: rows that lie close together, so that little of a large data set is read."""
    split = dict(zip(data.keys["row_id"].to_pylist(), data.keys["split"].to_pylist()))
    wanted, room = [], {"train": cfg.batch, "validate": cfg.micro_batch}
    for row_id in _ids(data.large[0]) if data.large else split:
        if room.get(split.get(row_id, ""), 0):
            room[split[row_id]] -= 1
            wanted.append(row_id)
        if not any(room.values()):
            break
    keys = data.keys.filter(pc.field("row_id").isin(wanted))
    large = [
        _cut(d, [*columns, "row_id"], wanted, folder / str(i)) for i, (d, columns) in enumerate(zip(data.large, data.plan(task.columns)[0]))
    ]
    return Data(keys, tuple(large), data.small)


def _pieces(source: Dataset) -> Iterator[Any]:
    """Row groups, one at a time."""
    fs, _ = source.place.arrow()
    with told(source.place):
        for fragment in pyarrow.dataset.dataset(source.paths(), filesystem=fs, format="parquet").get_fragments():
            yield from fragment.split_by_row_group()


def _ids(source: Dataset) -> Iterator[str]:
    for piece in _pieces(source):
        yield from piece.to_table(columns=["row_id"])["row_id"].to_pylist()


def _cut(source: Dataset, columns: list[str], wanted: list[str], folder: Path) -> Dataset:
    """The wanted rows of a data set as one of their own."""
    value_set, found = pa.array(wanted, pa.string()), []
    for piece in _pieces(source):
        if sum(t.num_rows for t in found) == len(wanted):
            break
        if pc.any(pc.is_in(piece.to_table(columns=["row_id"])["row_id"], value_set=value_set)).as_py():
            found.append(piece.to_table(columns=columns, filter=pc.field("row_id").isin(wanted)))
    folder.mkdir()
    pq.write_table(pa.concat_tables(found), folder / "rows.parquet")
    return Dataset(Place(str(folder)), {"files": [{"path": "rows.parquet", "outcome": "row"}]})


@contextmanager
def _timed(seen: Seen, name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seen.seconds[name] = time.perf_counter() - began


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__


def _count(module: torch.nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
