"""`cxray predict`: a trained model's word on a cohort's splits (CONFIG), or on any images and charts (RUN).

.venv/bin/cxray predict runs/demo/fusion --images 'scans/*.dcm' --charts charts.jsonl --out predictions.parquet
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from contracts.errors import CxrayError, RowError
from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import read_run, record
from contracts.schema import SPLITS
from contracts.storage import Place, place
from pipelines.images.decode import Limits
from pipelines.images.fetch import fetcher
from pipelines.job import VerbConfig, connect, plainly
from pipelines.pool import EncoderResources, encoder_pool, one_thread_on_cpu
from trainers.engine.data import Rows, anchored
from trainers.items import items
from trainers.predictor import Item, Model, load
from trainers.scored import QUIET_S, parquet, scored, trained_with, write
from trainers.sources import Sources


class PredictConfig(VerbConfig):
    run: str = "fusion"  # a finished `cxray train`
    into: str = "predictions/fusion"
    splits: tuple[Literal["train", "validate", "test"], ...] = SPLITS[1:]

    def inputs(self) -> dict[str, Place]:
        """The run, and what it was trained on."""
        where = self.at(self.run)
        read = (read_run(where) or {}).get("inputs", {})
        return {"run": where} | {name: place(i["uri"], self.storage) for name, i in read.items()}


@dataclass
class Predicted:
    """What was predicted, for a person (`str`) and for run.json."""

    where: str
    rows: dict[str, int]  # by split, or by what became of them: 'predicted', or the reason why not
    seconds: float

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n:,}" for name, n in self.rows.items())
        return f"predict: {counts}; {self.seconds:.1f} s -> {self.where}\n  {NOT_FOR_DIAGNOSIS}"


def run(cfg: PredictConfig) -> Predicted:
    """Score every row of the splits that has features and, where the model reads text, a text; labelled or not.

    The scores are as the network gives them: it is on these that `cxray evaluate` fits a calibration. Raises CxrayError where there is
    no finished run, and where features or texts are now others than it was trained on.
    """
    started, where, out = time.monotonic(), cfg.at(cfg.run), cfg.output()
    trained = trained_with(where)
    sources, model = Sources(trained), Model(where)
    if sources.made != model.made:
        raise CxrayError(f"{where}: its features or texts were made anew by other encoders or settings; train again, or put those back")
    data = sources.data(trained, unlabelled=True)
    size, cache = trained.training.micro_batch, trained.training.resources.cache
    parts = [scored(model.task, model.network, Rows(model.task, data, split, 0, cache), size) for split in cfg.splits]
    weights = hashlib.sha256((model.where / "model.safetensors").read()).hexdigest()
    made_by = cfg.fingerprint(weights, *(d.version for d in (sources.cohort, *data.large)))
    write(out, parts, sources.cohort, model.task, cfg.run, weights, made_by)
    counts = {split: part.num_rows for split, part in zip(cfg.splits, parts, strict=True)}
    done = Predicted(str(out), counts, time.monotonic() - started)
    record(out, "predict", cfg, cfg.inputs(), done.__dict__)
    return done


def predict_files(
    run: str | Place,
    images: str | None = None,
    charts: str | None = None,
    out: str | Path = "predictions.parquet",
    resources: EncoderResources | None = None,
) -> Predicted:
    """Predict files and charts (see `trainers.items` for their forms), over Ray Data -> one Parquet file.

    Its columns: row_id, study_id, path, a probability by finding, reason. What could not be read has its reason, and no probabilities.
    The file appears whole at the end. Raises CxrayError, before anything is predicted, where model, tables or glob are not there.
    """
    import ray.data

    started, where = time.monotonic(), run if isinstance(run, Place) else place(run)
    target = place(out)
    if target.local is not None and target.local.is_dir():
        raise CxrayError(f"--out {target}: is a folder; name a file, such as {target / 'predictions.parquet'}")
    todo = items(images, charts)
    predictor = load(where, device="cpu")  # here only to say what is wrong with it; the actors load their own
    about = {
        "model": str(where),
        "findings": predictor.findings,
        "calibrated": predictor.calibration is not None,
        "note": NOT_FOR_DIAGNOSIS,
    }
    del predictor
    _readable(todo)
    connect()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.max_errored_blocks = False, 0
    context.raise_original_map_exception = True
    pool = encoder_pool(resources or EncoderResources())
    share = todo.num_rows // (8 * int(ray.cluster_resources().get("CPU", 1)))
    rows = ray.data.from_arrow(todo).repartition(target_num_rows_per_block=max(pool["batch_size"], min(1024, share)))
    rows = rows.map_batches(PredictItems, fn_constructor_args=(anchored(where),), **pool)
    parts: list[pa.Table] = []
    with tqdm(total=todo.num_rows, desc="predict", unit=" rows", delay=QUIET_S) as progress, plainly(target):
        for part in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            parts.append(part)
            progress.update(part.num_rows)
    table = pa.concat_tables(parts).sort_by("row_id")
    target.write(parquet(table.replace_schema_metadata({"cxray": json.dumps(about)})))
    reasons = pc.value_counts(table["reason"].fill_null("predicted").combine_chunks()).to_pylist()
    return Predicted(str(target), {r["values"]: r["counts"] for r in reasons}, time.monotonic() - started)


class PredictItems:
    """An actor that holds a model with its encoders."""

    def __init__(self, run: Place) -> None:
        one_thread_on_cpu()
        self.predictor = load(run)
        self.files = fetcher(run.options, 8, Limits().max_bytes)  # pyright: ignore[reportArgumentType]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(row_id, study_id, path, chart as JSON) -> the same without the chart, with probabilities or a reason."""
        rows = batch.to_pylist()
        read = self._read(rows)
        good = [i for i, item in enumerate(read) if not isinstance(item, RowError)]
        said = dict(zip(good, self.predictor.predict_batch([item for item in read if not isinstance(item, RowError)]), strict=True))
        outcomes = [said.get(i, item) for i, item in enumerate(read)]
        table = batch.drop_columns(["chart"])
        for finding in self.predictor.findings:
            column = [None if isinstance(o, RowError) else o.probabilities[finding] for o in outcomes]
            table = table.append_column(finding, pa.array(column, pa.float64()))
        return table.append_column("reason", pa.array([o.reason if isinstance(o, RowError) else None for o in outcomes], pa.string()))

    def _read(self, rows: Sequence[dict[str, Any]]) -> list[Item | RowError]:
        """Bytes and charts, or why there are none."""
        files = self.files.each(row["path"] for row in rows if row["path"] is not None)
        read: list[Item | RowError] = []
        for row in rows:
            image = next(files) if row["path"] is not None else None
            try:
                chart = json.loads(row["chart"]) if row["chart"] is not None else None
            except ValueError:
                chart = RowError("bad_chart")
            read.append(next((x for x in (image, chart) if isinstance(x, RowError)), (image, chart)))  # pyright: ignore[reportArgumentType]
        return read


def _readable(todo: pa.Table) -> None:
    """A refusal (no access, no credentials) is of the whole store: the first file tells it, here and in one sentence."""
    for path in pc.drop_null(todo["path"]).slice(0, 1).to_pylist():
        next(iter(fetcher(place(path).options, 1, Limits().max_bytes).each([path])))  # pyright: ignore[reportArgumentType]
