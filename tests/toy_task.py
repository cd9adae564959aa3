"""A small task for the engine's tests: a network with batch norm in eval, a masked multi-label loss, rows in two data sets and a table."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from contracts.dataset import Dataset, publish
from contracts.schema import Schema
from contracts.storage import Place
from models.mdfnet import MDFNet, MDFNetConfig
from trainers.engine import Batch, Data, Task, TrainerConfig
from trainers.engine.context import Context, into
from trainers.engine.loop import train

WIDTH, LABELS = 6, 3


class Net(nn.Module):
    def __init__(self, frozen_norm: bool = True, wide: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH + 4, wide), nn.BatchNorm1d(wide), nn.ReLU())
        self.head = nn.Linear(wide, LABELS)
        self.frozen_norm = frozen_norm

    def train(self, mode: bool = True) -> "Net":
        super().train(mode)
        if self.frozen_norm:
            self.body[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Fused(nn.Module):
    """MDFNet on the same ten numbers, of which some rows lack the text; no dropout, batch norm in eval."""

    def __init__(self) -> None:
        super().__init__()
        still = {name: 0.0 for name in MDFNetConfig.model_fields if name.startswith("drop")}
        sizes = {"vision_dim": 2, "text_dim": 2, "clinical_dim": 2, "dim": 8, "heads": 2, "hidden": (12, 6), "findings": LABELS}
        self.network = MDFNet(MDFNetConfig.model_validate(sizes | still))

    def train(self, mode: bool = True) -> "Fused":
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        image, text, chart = x[:, :4].unflatten(1, (2, 2)), x[:, 4:8].unflatten(1, (2, 2)), x[:, 8:]
        kinds = torch.tensor([1, 2]).expand(len(x), 2)
        return self.network(image=image, text=text, text_mask=text[..., 0] > 0, kinds=kinds, clinical=chart, known=torch.ones_like(chart))


class Toy(Task):
    """Predict three masked labels from a vector and four bytes."""

    columns = ("vector", "tokens", "labels")

    def __init__(
        self,
        frozen_norm: bool = True,
        wide: int = 16,
        noise: float = 0.0,
        fused: bool = False,
        loud: float = 1.0,
        poison: int | None = None,
        run: str | None = None,
        ends: Sequence[tuple[int, Literal["die", "be lost", "nan"]]] = (),
    ) -> None:
        """noise: augmentation. fused: MDFNet is the network. loud: the loss is so many times too large. poison: at this step it is NaN.
        ends: of each life in the folder `run` the step that is its last, and what happens there once the checkpoints before are safe:
        rank 1 dies, or says on which node it is and waits for its end, or the loss is NaN. One more life has no end."""
        self.frozen_norm, self.wide, self.noise, self.poison, self.run, self.ends = frozen_norm, wide, noise, poison, run, ends
        self.fused, self.loud, self.steps, self.life = fused, loud, 0, 0

    def fit(self, train: pa.Table) -> dict[str, Any]:
        assert set(train["split"].to_pylist()) == {"train"}
        labels = np.array(train["labels"].to_pylist(), np.float32)
        positive = (labels == 1).sum(0)
        self.pos_weight = torch.tensor((labels == 0).sum(0) / np.maximum(positive, 1), dtype=torch.float32)
        return {"pos_weight": self.pos_weight.tolist()}

    def build(self) -> nn.Module:
        return Fused() if self.fused else Net(self.frozen_norm, self.wide)

    def prepare(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        tokens = np.frombuffer(row["tokens"], np.int8).astype(np.float32) / 127
        x = np.concatenate([row["vector"], tokens]) + self.noise * rng.standard_normal(WIDTH + 4)
        return {"x": x.astype(np.float32), "y": np.asarray(row["labels"], np.float32), "id": row["row_id"]}

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        y = torch.from_numpy(np.stack([r["y"] for r in rows]))
        return {
            "x": torch.from_numpy(np.stack([r["x"] for r in rows])),
            "y": y.clamp(min=0),
            "mask": (y >= 0).float(),
            "id": [r["id"] for r in rows],
        }

    def weight(self, batch: Batch) -> Tensor:
        return batch["mask"].sum()

    def loss(self, model: Any, batch: Batch) -> Tensor:
        each = F.binary_cross_entropy_with_logits(model(batch["x"]).float(), batch["y"], pos_weight=self.pos_weight, reduction="none")
        return self.loud * (each * batch["mask"]).sum()

    def step(self, model: Any, micros: Sequence[Batch], backward: Any) -> dict[str, float]:
        self.steps += 1
        if self.steps == self.poison or (self.run and self.ended(Path(self.run))):
            return {"loss": float("nan")}
        return super().step(model, micros, backward)

    def ended(self, out: Path) -> bool:
        """Keeps a trace of the steps of each rank; True where the loss is to be NaN."""
        import ray

        rank = torch.distributed.get_rank()
        with (out.with_name(f"steps of rank {rank}")).open("a") as trace:
            trace.write(f"{self.steps}\n")
        if self.steps == 1:  # no rank is further than its first step, at whose end they wait for each other
            self.life = len(list(out.parent.glob("ended ?")))
        step, how = self.ends[self.life] if self.life < len(self.ends) else (0, "")
        if self.steps != step or (rank != 1 and how != "nan"):
            return False
        passed = sum(step - 1 for step, _ in self.ends[: self.life + 1])
        while reports_stored(out / "checkpoints" / "checkpoint_manager_snapshot.json") < passed:
            time.sleep(0.01)
        part = out.with_name(f"part of rank {rank}")
        part.write_text(ray.get_runtime_context().get_node_id())
        part.replace(out.with_name(f"ended {self.life}"))
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while how == "be lost":
            time.sleep(0.1)
        return True

    def predict(self, model: Any, batch: Batch) -> dict[str, Any]:
        return {"score": model(batch["x"]).float().sigmoid(), "y": batch["y"], "mask": batch["mask"], "id": batch["id"]}

    def metrics(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        wrong = np.square(predictions["score"] - predictions["y"]) * predictions["mask"]
        return {"brier": float(wrong.sum() / predictions["mask"].sum()), "rows": float(len(predictions["id"]))}

    def export(self, model: nn.Module, folder: Path) -> None:
        save_model(model, str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps({"width": WIDTH}))


def reports_stored(snapshot: Path) -> int:
    """Up to which report the checkpoints are safe, by Ray Train's own account, which is not written in one go."""
    try:
        return json.loads(snapshot.read_text())["current_report_index"]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def toy_data(folder: Path, train: int = 50, validate: int = 13, files: int = 3, spoil: bool = False) -> Data:
    """Two large data sets (in different orders) and a table of labels with -1 for what is masked; `test` rows that nobody may read."""
    rng = np.random.default_rng(0)
    rows = train + validate + 4
    keys = pa.table(
        {
            "row_id": [f"r{i:03d}" for i in rng.permutation(rows)],
            "group_id": [f"g{i // 2}" for i in range(rows)],
            "split": ["train"] * train + ["validate"] * validate + ["test"] * 4,
        }
    )
    vectors = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    tokens = rng.integers(-127, 128, (rows, 4)).astype(np.int8)
    truth = (vectors[:, :LABELS] + tokens[:, :LABELS] / 127 > 0).astype(np.int8)
    labels = np.where(rng.random(truth.shape) < 0.3, -1, truth)
    labels[:5] = -1
    if spoil:
        vectors[7, 2] = np.nan
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
    first = keys.append_column("vector", flat)
    second = keys.append_column("tokens", pa.array([t.tobytes() for t in tokens], pa.binary(4))).take(rng.permutation(rows))
    table = pa.table({"row_id": keys["row_id"], "labels": labels.tolist()}).take(rng.permutation(rows))
    return Data(keys, (stored(folder / "vectors", first, files), stored(folder / "tokens", second, 1)), (table,))


def stored(folder: Path, table: pa.Table, files: int) -> Dataset:
    """A data set of so many files."""
    (folder / "data").mkdir(parents=True)
    size = -(-table.num_rows // files)
    listed = []
    for i in range(files):
        part = table.slice(i * size, size)
        pq.write_table(part, folder / "data" / f"{i}.parquet", row_group_size=16)
        listed.append({"path": f"data/{i}.parquet", "outcome": "row", "rows": part.num_rows, "bytes": 1})
    return publish(Place(str(folder)), Schema("toy", 1, table.schema), "made by a test", listed)


def toy_config(folder: Path, **settings: Any) -> TrainerConfig:
    resources = {"cache": str(folder / "cache"), "cpus": 0.5, **settings.pop("resources", {})}
    defaults = {"epochs": 2, "batch": 16, "micro_batch": 4, "lr": 0.02, "metric": "brier", "seed": 3, "clip": 0.1}
    return TrainerConfig(**{**defaults, **settings, "resources": resources})  # pyright: ignore[reportArgumentType]


CPU = torch.device("cpu")


class Cut(Exception):
    """A run is cut short here."""


def run(
    folder: Path, task: Toy, cfg: TrainerConfig, data: Data, rank: int = 0, world: int = 1, cut_after: int | None = None, **more: Any
) -> dict[str, Any]:
    """Train; the checkpoint lies in folder/checkpoint. cut_after: so many checkpoints."""
    task.fit(data.small_columns("train", task.columns))
    keep, seen = into(folder / "checkpoint"), []

    def report(metrics: dict[str, Any], part: Path | None) -> None:
        keep(metrics, part)
        seen.append(metrics)
        if world > 1:
            torch.distributed.barrier()
        if len(seen) == cut_after:
            raise Cut

    return train(Context(rank, world, CPU, report, **more), task, cfg, data) | {"reported": seen}


def losses(at: dict[str, Any]) -> list[float]:
    return [s["loss"] for s in at["steps"]]
