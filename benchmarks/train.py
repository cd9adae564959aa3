"""What does the engine cost, what do cached features save, and how long do intervals take?

    .venv/bin/python benchmarks/train.py [--rows 2048] [--batch 32] [--steps 60] [--text-dim 384]      # about 4 minutes on two cores

The network is MDFNet at the shapes of ViT-B/16: 7 x 7 tokens of 768 in eight bits, an embedding of 768, 6 segments and 5 passages, 45
clinical numbers, 14 findings. The values are made up. Each contender is a process of its own with one thread (two that wait for each other
would measure what else the machine does), and its peak memory that process's; of `ray`, that of all processes together.

`bare`: a loop of PyTorch alone, as a user would write it who has arrays: the same values, laid out row by row in files that are mapped into
memory. Its steps take the engine's very rows (`Order`), so that the loss of the first one is the engine's, which is checked. In it: rows by
number, float32 from the eight bits, vectors of passages, forward, loss, backward, clipping, AdamW (the fused one, in both). Not in it, and
in the engine's: rows looked up by id in three data sets, `prepare` and `collate`, which make of each row what it is (kinds of segments,
missing numbers, a generator of its own), the rate's schedule, the looks at loss and gradient, the record; and that what a step frees is
kept for the next one (`pipelines.pool.keep_memory`). `engine`: `trainers.engine.loop.train` with a plain
`Context`. Both run `--rounds` times in turn, and the best of each counts. Samples a second are those of a step at the lower quartile of
their times, from the end of one to the end of the next: other work on the machine only ever lengthens a step. The first few steps,
start-up, validation and checkpoints are apart. `cpu_ms` is what a sample costs the processor, by the same rule; `to_bare_cpu` compares it.
`ray`: the same through Ray Train's `fit`, by its own account of all its steps; `ray_startup_s` is the rest of its time: Ray, the worker,
the rows' copy to disk, a validation, a checkpoint, the export.

`cached` and `end_to_end`: an epoch of stage 1 on features, and of stage 2 from the stored 518 px JPEGs, which are decoded, augmented, and
go through a ViT-B/16 at 224 px (transformers' ViTConfig as it comes, random weights) that trains along. Both by the engine, in bf16. An
epoch's time is that of its steps, so the ratio is that of the seconds a sample, of steps of `--batch` rows and of 8.

`bootstrap_s`: AUROC and six more of 3,000 studies x 14 findings on 1,000 resamples of patients. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

GRID, DIM, NOTES, PASSAGES, KNOWN = 7, 768, 6, 5, 200
HELD_OUT, WARM = 8, 4  # rows of validate; steps that are not timed
SLOW = (8, 5)  # batch and steps of the end-to-end contender
PICTURES = 64  # of the train split, for it
PLAIN = ("tokens", "scales", "embedding", "notes", "fetched")  # arrays [rows, ...] for `bare`


@dataclass(frozen=True)
class Sizes:
    rows: int
    batch: int
    steps: int
    text_dim: int


def make(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Features, texts and pictures of made-up studies, and a ViT-B/16 on disk."""
    import cv2
    import pyarrow as pa
    import transformers as hf

    from contracts.schema import IMAGES, features_schema, texts_schema
    from models.encoders import load_image
    from trainers.sources import lists

    rng, n = np.random.default_rng(0), sizes.rows + HELD_OUT
    keys = {"row_id": [f"r{i:06d}" for i in range(n)], "group_id": [f"p{i:06d}" for i in range(n)]}
    keys |= {"split": ["train"] * sizes.rows + ["validate"] * HELD_OUT}
    hf.ViTModel(hf.ViTConfig()).save_pretrained(folder / "vit")
    hf.ViTImageProcessor().save_pretrained(folder / "vit")
    about = {"name": f"hf:{folder}/vit", "dim": DIM, "joint": False, "grid": GRID}
    about |= {"fingerprint": load_image(f"hf:{folder}/vit", "cpu").fingerprint}
    (folder / "about.json").write_text(json.dumps(about))

    schema = features_schema(DIM, GRID, DIM)
    tokens = rng.integers(-127, 128, (n, GRID**2 * DIM), np.int8)
    scales = np.full((n, GRID**2), 0.02, np.float16)
    embedding = (rng.standard_normal((n, DIM)) / DIM**0.5).astype(np.float32)
    columns = {"embedding": lists(embedding, np.float32)}
    columns |= {"tokens": pa.array([t.tobytes() for t in tokens], schema.columns.field("tokens").type)}
    columns |= {"token_scales": pa.array([s.tobytes() for s in scales], schema.columns.field("token_scales").type)}
    write(folder / "features", schema, keys | columns)

    schema, each = texts_schema(sizes.text_dim), NOTES + PASSAGES
    passage = np.tile(np.arange(each) >= NOTES, n)
    vectors = rng.standard_normal((n, each, sizes.text_dim), np.float32) / np.float32(sizes.text_dim**0.5)
    fetched = rng.integers(KNOWN, size=(n, each))
    segment = {
        "kind": pa.array(np.where(passage, "passage", "note")),
        "name": pa.array([None if p else "triage" for p in passage]),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), sizes.text_dim, mask=pa.array(passage)),
        "id": pa.array([f"k{k}" if p else None for k, p in zip(fetched.ravel(), passage)]),
    }
    kind = schema.columns.field("segments").type.value_type
    fields = [segment.get(f.name, pa.nulls(n * each, f.type)).cast(f.type) for f in kind]
    each_row = pa.array(np.arange(n + 1) * each, pa.int32())
    segments = pa.ListArray.from_arrays(each_row, pa.StructArray.from_arrays(fields, fields=list(kind)))
    write(folder / "texts", schema, keys | {"segments": segments})
    (folder / "plain").mkdir()
    arrays = (tokens.reshape(n, GRID**2, DIM), scales, embedding, vectors[:, :NOTES], fetched[:, NOTES:])
    for name, values in zip(PLAIN, arrays):
        np.save(folder / f"plain/{name}.npy", values)

    pictures = []
    for _ in range(16):  # smooth shapes and detector noise, about 47 KB each, as a stored X-ray
        shape = cv2.resize(rng.integers(20, 235, (12, 12)).astype(np.uint8), (518, 518), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(shape + rng.normal(0, 4, shape.shape), 0, 255).astype(np.uint8)
        pictures.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    some = [*range(min(PICTURES, sizes.rows)), *range(sizes.rows, n)]
    few = {name: [values[i] for i in some] for name, values in keys.items()}
    write(folder / "images", IMAGES, few | {"image": [pictures[i % len(pictures)] for i in some]})
    return {"studies": n, "picture_kb": float(np.mean([len(p) for p in pictures]) / 1e3)}


def write(folder: Path, schema: Any, columns: dict[str, Any]) -> None:
    """A data set; what `columns` lacks is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from contracts.dataset import publish
    from contracts.storage import place

    n = len(columns["row_id"])
    table = pa.table(
        [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in schema.columns], schema.columns
    )
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data/rows.parquet", row_group_size=1024)
    publish(place(folder), schema, "made up", [{"path": "data/rows.parquet", "outcome": "row", "rows": n, "bytes": 1}])


class Enough(Exception):
    """So many steps are taken."""


def opened(folder: Path, sizes: Sizes, stage: int, precision: str, timed: bool = True) -> tuple[Any, Any, Any]:
    """-> the task, fitted, its settings, and its data. timed: it notes when each step ends, and goes no further than `sizes.steps`."""
    import pyarrow as pa

    from contracts.dataset import open_dataset
    from contracts.storage import place
    from models.mdfnet import MDFNetConfig
    from pipelines.inputs.clinical import CLINICAL
    from trainers.engine import Data, TrainerConfig
    from trainers.finetune import Unfreeze
    from trainers.fusion import Fusion
    from trainers.sources import Exported, FusionConfig, Made, lists

    class Timed(Fusion):
        ends: list[tuple[float, float]] = []
        losses: list[float] = []

        def step(self, *given: Any) -> dict[str, float]:
            said = super().step(*given)
            self.ends.append(now())
            self.losses.append(said["loss"])
            if len(self.ends) == sizes.steps:
                raise Enough
            return said

    training = TrainerConfig.model_validate(
        {"epochs": 1, "batch": sizes.batch, "micro_batch": sizes.batch, "precision": precision,
         "metric": "macro_auroc", "mode": "max", "resources": {"cache": str(folder / "cache"), "cpus": 1}}
    )  # fmt: skip
    cfg = FusionConfig(training=training, unfreeze=Unfreeze(encoders=("image",)) if stage == 2 else None)
    about = json.loads((folder / "about.json").read_text())
    text = {"name": "made up", "fingerprint": "made up", "dim": sizes.text_dim, "joint": False}
    made = Made(encoders={"image": about, "text": text}, token_dim=DIM, dicom="mimic_jpg", reading=None, knowledge=None)
    vectors = np.random.default_rng(1).standard_normal((KNOWN, sizes.text_dim), np.float32) / sizes.text_dim**0.5
    known: Any = SimpleNamespace(told="", ids=[f"k{i}" for i in range(KNOWN)], vectors=lambda ids: vectors)
    task = (Timed if timed else Fusion)(cfg, Exported(made, known))

    large = tuple(open_dataset(place(folder / name), name) for name in ("images" if stage == 2 else "features", "texts"))
    keys = large[0].table(["row_id", "group_id", "split"])
    rng = np.random.default_rng(2)
    values = rng.standard_normal((keys.num_rows, len(CLINICAL)))
    values[rng.random(values.shape) < 0.2] = np.nan
    labels = rng.random((keys.num_rows, MDFNetConfig().findings)) < 0.3
    labels[-1], labels[-2] = True, False  # of each finding both classes stand in validate
    small = {"row_id": keys["row_id"].combine_chunks(), "clinical": lists(values, np.float32), "target": lists(labels, np.float32)}
    data = Data(keys, large, (pa.table(small),))
    task.fit(data.small_columns("train", task.columns))
    return task, training, data


def now() -> tuple[float, float]:
    """Seconds on the clock, and on the processor."""
    return time.perf_counter(), time.process_time()


def rate(ends: list[tuple[float, float]], batch: int, warm: int = WARM) -> dict[str, float]:
    """ends: when each step ended."""
    clock, processor = np.quantile(np.diff(ends, axis=0)[warm:], 0.25, axis=0)
    return {"per_s": batch / float(clock), "cpu_ms": float(processor) / batch * 1000}


def by_engine(folder: Path, sizes: Sizes, stage: int = 1, precision: str = "fp32", warm: int = WARM) -> dict[str, float]:
    import torch

    from trainers.engine.context import Context
    from trainers.engine.loop import train

    task, training, data = opened(folder, sizes, stage, precision)
    began = time.perf_counter()
    with contextlib.suppress(Enough):
        train(Context(0, 1, torch.device("cpu"), lambda metrics, part: None), task, training, data)
    return rate(task.ends, sizes.batch, warm) | {"startup_s": task.ends[0][0] - began, "first_loss": task.losses[0]}


def bare(folder: Path, sizes: Sizes) -> dict[str, float]:
    import torch

    from models.mdfnet import KINDS, MODALITIES
    from trainers.engine.order import Order
    from trainers.losses import combined

    task, training, data = opened(folder, sizes, 1, "fp32", timed=False)
    tokens, scales, embedding, notes, fetched = (np.load(folder / f"plain/{name}.npy", mmap_mode="r") for name in PLAIN)
    passages, small = torch.from_numpy(task.passage_vectors), data.small_columns("train", ["clinical", "target"])
    values, target = (torch.tensor(np.stack(small[name].to_numpy())) for name in ("clinical", "target"))
    known = values.isfinite()
    values = ((values - torch.from_numpy(task.mean)) / torch.from_numpy(task.scale)).clip(-8, 8).where(known, 0)
    kinds = torch.tensor([KINDS.index("note")] * NOTES + [KINDS.index("passage")] * PASSAGES).expand(sizes.batch, -1)
    everything = {"kinds": kinds, "text_mask": torch.ones_like(kinds, dtype=torch.bool)}
    everything |= {"presence": torch.ones(sizes.batch, len(MODALITIES), dtype=torch.bool)}
    mask = torch.ones(sizes.batch, target.shape[1], dtype=torch.bool)

    torch.manual_seed(training.seed)
    model = task.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True)
    order = Order(sizes.rows, sizes.batch, sizes.batch, training.seed).epoch(0)
    ends, losses = [], []
    torch.manual_seed(int(np.random.SeedSequence([training.seed, 0, 0, 0]).generate_state(1)[0]))  # the engine's dropout of its first step
    for n in order[: sizes.steps]:
        image = torch.from_numpy(tokens[n]).float() * torch.from_numpy(scales[n]).float()[..., None]
        text = torch.cat([torch.from_numpy(notes[n]), passages[torch.from_numpy(fetched[n])]], 1)
        given = {"image": image, "embedding": torch.from_numpy(embedding[n]), "text": text, "clinical": values[n], "known": known[n]}
        logits = model(**given, **everything)
        loss = combined(task.cfg.loss, logits, target[n], mask, task.pos_weight).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(now())
    return rate(ends, sizes.batch) | {"first_loss": losses[0]}


def through_ray(folder: Path, sizes: Sizes) -> dict[str, float]:
    from contracts.storage import place
    from pipelines.speed import memory
    from trainers.engine import fit

    task, training, data = opened(folder, sizes, 1, "fp32", timed=False)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(1):
            peak.append(memory())

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    fitted = fit(task, training, data, place(folder / "run"))
    took = time.perf_counter() - began
    done.set()
    return {"per_s": fitted.steps * sizes.batch / fitted.seconds, "startup_s": took - fitted.seconds, "peak_mb": max(peak) / 1e6}


def bootstrapped(folder: Path, sizes: Sizes) -> dict[str, float]:
    from evaluation.intervals import bootstrap

    rng, studies, findings = np.random.default_rng(0), 3000, 14
    labels = (rng.random((studies, findings)) < np.linspace(0.02, 0.4, findings)).astype(float)
    labels[rng.random(labels.shape) < 0.1] = np.nan
    scores = 1 / (1 + np.exp(-(rng.standard_normal(labels.shape) + np.nan_to_num(labels))))
    began = time.perf_counter()
    bootstrap(scores, labels, rng.integers(0, 2 * studies // 3, studies).astype(str), resamples=1000)
    return {"s": time.perf_counter() - began}


def end_to_end(folder: Path, sizes: Sizes) -> dict[str, float]:
    return by_engine(folder, Sizes(sizes.rows, *SLOW, sizes.text_dim), 2, "bf16", warm=1)


CONTENDERS: dict[str, Callable[[Path, Sizes], dict[str, float]]] = {
    "make": make,
    "bare": bare,
    "engine": by_engine,
    "ray": through_ray,
    "cached": lambda folder, sizes: by_engine(folder, sizes, precision="bf16"),
    "end_to_end": end_to_end,
    "bootstrap": bootstrapped,
}
RATIOS = (("to_bare", "engine", "bare"), ("ray_to_bare", "ray", "bare"), ("cached_to_end_to_end", "cached", "end_to_end"))


def apart(name: str, folder: Path, sizes: Sizes) -> dict[str, float]:
    """A contender in a process of its own."""
    words = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
    words += [w for option, value in asdict(sizes).items() for w in (f"--{option.replace('_', '-')}", str(value))]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=alone)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of bare, engine and cached; at most an epoch")
    parser.add_argument("--text-dim", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=2, help="of bare and engine, in turn")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sizes = Sizes(asked.rows, asked.batch, min(asked.steps, asked.rows // asked.batch), asked.text_dim)
    if asked.contender:
        told = CONTENDERS[asked.contender](asked.folder, sizes)
        print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3} | told))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        apart("make", Path(scratch), sizes)
        for name in [*["bare", "engine"] * asked.rounds, "ray", "cached", "end_to_end", "bootstrap"]:
            told = apart(name, Path(scratch), sizes)
            if name not in found or told["per_s"] > found[name]["per_s"]:
                found[name] = told
    if abs(found["bare"]["first_loss"] / found["engine"]["first_loss"] - 1) > 1e-4:
        raise SystemExit("bare and engine do not see the same: their first losses differ")
    figures = {f"{name}_{key}": value for name, of in found.items() for key, value in of.items()}
    for name, over, under in RATIOS:
        figures[name] = found[over]["per_s"] / found[under]["per_s"]
    figures["to_bare_cpu"] = found["bare"]["cpu_ms"] / found["engine"]["cpu_ms"]
    print(json.dumps(asdict(sizes) | {k: round(v, 3) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
