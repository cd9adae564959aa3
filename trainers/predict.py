"""`cxray predict`: a trained model's word on a cohort's splits (CONFIG), or on any images and charts (RUN).

.venv/bin/cxray predict runs/demo/fusion --images 'scans/*.dcm' --charts charts.jsonl --out predictions.parquet

Both are jobs: the same command goes on where the last one was stopped.
"""

import copy
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contracts.dataset import Dataset, open_dataset, read_manifest
from contracts.errors import CxrayError, RowError
from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import read_run
from contracts.schema import SPLITS, Schema, predictions_schema
from contracts.storage import Place, place
from pipelines.images.decode import Limits
from pipelines.images.fetch import fetcher
from pipelines.job import KEY_NAMES, Job, RowsConfig, Summary, block, each
from pipelines.pool import EncoderResources, encoder_pool, one_thread_on_cpu
from trainers.engine.data import Data, Rows, anchored
from trainers.items import items
from trainers.predictor import Item, Model, load
from trainers.scored import parquet, said, trained_with
from trainers.sources import Sources


class PredictConfig(RowsConfig):
    run: str = "fusion"  # a finished `cxray train`
    into: str = "predictions/fusion"
    splits: tuple[Literal["train", "validate", "test"], ...] = SPLITS[1:]  # others that are there already stay
    resources: EncoderResources = EncoderResources()

    outside_fingerprint: ClassVar[frozenset[str]] = RowsConfig.outside_fingerprint | {"splits"}

    def inputs(self) -> dict[str, Place]:
        """The run, and what it was trained on."""
        where = self.at(self.run)
        read = (read_run(where) or {}).get("inputs", {})
        return {"run": where} | {name: place(i["uri"], self.storage) for name, i in read.items()}


def run(cfg: PredictConfig) -> Summary:
    """Score every row of the splits that has features and, where the model reads text, a text; labelled or not.

    The scores are as the network gives them: it is on these that `cxray evaluate` fits a calibration. Raises CxrayError where there is
    no finished run, and where features or texts are now others than it was trained on.
    """
    where = anchored(cfg.at(cfg.run))
    trained = trained_with(where)
    sources, model = Sources(trained), Model(where, device="cpu")  # here only to be asked what it is; the actors load their own
    if sources.made != model.made:
        raise CxrayError(f"{where}: its features or texts were made anew by other encoders or settings; train again, or put those back")
    streamed, *beside = sources.large
    columns = [c for c in model.task.columns if c in streamed.schema().names]
    about = {
        "model": cfg.run,
        "targets": list(model.findings),
        "policy": model.task.policy_name,
        "weights": _sha256(model.where / "model.safetensors"),
    }
    made_by = [_fingerprint(model), *(d.fingerprint for d in (sources.cohort, *sources.large))]
    del model
    data = _wanted(sources, sources.data(trained, unlabelled=True), cfg.splits, beside)
    schema = predictions_schema(len(about["targets"]))
    with Job("predict", cfg, schema, made_by) as job:
        import ray

        lookup = ray.put(data.anchored()), trained.training.resources.cache
        rows = job.read(streamed, columns, of=data.keys["row_id"])
        rows = rows.map_batches(Score, fn_constructor_args=(where, columns, lookup, schema), **encoder_pool(cfg.resources, job.missing))
        return job.write(rows, cpus=0.25, notes=_told, **about)


class Score:
    """An actor that holds a trained network. Features or pictures stream through it; the rest of a row it looks up by id."""

    def __init__(self, run: Place, columns: Sequence[str], lookup: tuple[Any, str | None], schema: Schema) -> None:
        """columns: those that stream. lookup: a reference to the `Data` of the others, and where a node keeps its copy of the long ones."""
        import ray

        one_thread_on_cpu()
        self.model, self.schema = Model(run), schema
        others = copy.copy(self.model.task)
        others.columns = ["study", *(c for c in others.columns if c not in columns)]
        data: Data = ray.get(lookup[0])
        parts = [Rows(others, data, split, 0, lookup[1]) for split in SPLITS]
        self.beside = {id: (part, n) for part in parts for n, id in enumerate(part.keys["row_id"].to_pylist())}

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(keys, what streams) -> PREDICTIONS. A picture that cannot be read is a reject."""
        rows = list(each(batch, self.prepared))
        good = [row for row in rows if "reason" not in row]
        scores, labels = said(self.model.task, self.model.network, good) if good else ((), ())
        if not np.isfinite(scores).all():
            raise CxrayError(f"{self.model.where}: its scores are not finite; the features hold numbers that are not: make them again")
        for row, score, label in zip(good, scores, labels, strict=True):
            row |= {"scores": score, "labels": [None if np.isnan(x) else int(x) for x in label]}
        return block(rows, self.schema)

    def prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keys, study, and what the network reads. Raises RowError."""
        part, number = self.beside[row["row_id"]]
        whole = row | part.row(number)
        keys = {name: whole[name] for name in KEY_NAMES} | {"study_id": whole["study"]}
        return self.model.task.prepare(whole, np.random.default_rng(0)) | keys


def _wanted(sources: Sources, data: Data, splits: Sequence[str], beside: Sequence[Dataset]) -> Data:
    """Of the splits the keys, and what is looked up by id: `beside` and the small table, with the study. Raises CxrayError for no rows."""
    inside = pc.is_in(data.keys["split"], value_set=pa.array(splits))
    keys, (small,) = data.keys.filter(inside), (table.filter(inside) for table in data.small)
    if not keys.num_rows:
        raise CxrayError(f"{sources.cohort.place}: no row of the splits has what the model reads; name others (`splits`)")
    studies = sources.cohort.table(["row_id", "study_id"])
    study = studies["study_id"].take(pc.index_in(small["row_id"], value_set=studies["row_id"].combine_chunks()))
    return Data(keys, tuple(beside), (small.append_column("study", study),))


def _told(done: Dataset) -> list[str]:
    counts = Counter(done.table(["split"])["split"].to_pylist())
    return [", ".join(f"{split} {counts[split]:,}" for split in SPLITS if counts[split]), NOT_FOR_DIAGNOSIS]


def _sha256(file: Place) -> str:
    return hashlib.sha256(file.read()).hexdigest()


def _fingerprint(model: Model) -> str:
    """Of all that decides what the network says of a row, but for the calibration."""
    weights = [_sha256(file) for file in model.where.files(".safetensors", depth=1)]  # also of tuned encoders
    return hashlib.sha256(json.dumps([weights, model.said], sort_keys=True).encode()).hexdigest()


class FilesConfig(RowsConfig):
    """`cxray predict RUN`, as the config of a job: what decides a row is in the fingerprints of the model and the items."""

    into: str
    resources: EncoderResources


@dataclass
class Predicted:
    """What was predicted of files, for a person (`str`)."""

    where: str
    rows: dict[str, int]  # by what became of them: 'predicted', or the reason why not
    seconds: float

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n:,}" for name, n in self.rows.items())
        return f"predict: {counts}; {self.seconds:.1f} s -> {self.where}\n  {NOT_FOR_DIAGNOSIS}"


def predict_files(
    run: str | Place,
    images: str | None = None,
    charts: str | None = None,
    out: str | Path = "predictions.parquet",
    resources: EncoderResources | None = None,
) -> Predicted:
    """Predict files and charts (see `trainers.items` for their forms) -> one Parquet file.

    Its columns: row_id, study_id, path, a probability by finding, reason. What could not be read has its reason, and no probabilities.
    The file appears whole at the end; until then, and while there is anything to try again, the rows stand in OUT.rows, where the same
    command goes on. Raises CxrayError, before anything is predicted, where model, tables or glob are not there, or OUT cannot be written.
    """
    started, where, target = time.monotonic(), anchored(run if isinstance(run, Place) else place(run)), anchored(place(out))
    _writable(target)
    todo = items(images, charts)
    predictor = load(where, device="cpu")  # here only to say what is wrong with it; the actors load their own
    findings, calibrated = predictor.findings, predictor.calibration
    model = {"model": str(where), "calibrated": calibrated is not None}
    made_by = [_fingerprint(predictor), json.dumps(calibrated), _hash(todo)]
    del predictor
    _readable(todo)
    cfg = FilesConfig(into=f"{target}.rows", storage=target.options, resources=resources or EncoderResources())
    schema = predictions_schema(len(findings))
    job = Job("predict", cfg, schema, made_by)
    before = read_manifest(job.out) or read_manifest(job.out / "_begun")
    if before is not None and before["fingerprint"] != job.fingerprint:
        raise CxrayError(f"{job.out}: holds what was begun with another model, or on other files; delete it, or name another --out")
    with job:
        rows = job.read(_stored(todo, job.out / "_items"), ["study_id", "path", "chart"])
        rows = rows.map_batches(PredictItems, fn_constructor_args=(where, schema), **encoder_pool(cfg.resources, job.missing))
        job.write(rows, cpus=0.25, targets=list(findings), **model)
    done = open_dataset(job.out, "predictions")
    table = _flat(todo, done, findings)
    about = model | {"findings": findings, "note": NOT_FOR_DIAGNOSIS}
    target.write(parquet(table.replace_schema_metadata({"cxray": json.dumps(about)})))
    if pc.all(done.table(["lasting"], outcome="reject")["lasting"]).as_py() is not False:
        job.out.remove()
    reasons = Counter(reason or "predicted" for reason in table["reason"].to_pylist())
    return Predicted(str(target), dict(reasons), time.monotonic() - started)


class PredictItems:
    """An actor that holds a model with its encoders."""

    def __init__(self, run: Place, schema: Schema) -> None:
        one_thread_on_cpu()
        self.predictor, self.schema = load(run), schema
        self.files = fetcher(run.options, 8, Limits().max_bytes)  # pyright: ignore[reportArgumentType]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(keys, study_id, path, chart as JSON) -> PREDICTIONS without labels."""
        rows = batch.to_pylist()
        read = self._read(rows)
        told = iter(self.predictor.predict_batch([item for item in read if not isinstance(item, RowError)]))
        outcomes = [item if isinstance(item, RowError) else next(told) for item in read]
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, RowError):
                row |= {"study_id": None, "reason": outcome.reason, "lasting": outcome.lasting}
            else:
                row["scores"] = list(outcome.probabilities.values())
        return block(rows, self.schema)

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


def _writable(target: Place) -> None:
    """Raises CxrayError, now and not after hours, where the file could not be written at the end."""
    if not target.name.endswith(".parquet") or (target.local is not None and target.local.is_dir()):
        raise CxrayError(f"--out {target}: name a Parquet file, such as {target / 'predictions.parquet'}")
    probe = Place(f"{target}.probe", target.options)
    try:
        probe.write(b"")
    except (NotADirectoryError, FileExistsError):
        raise CxrayError(f"--out {target}: a folder on its way is a file; name another place") from None
    probe.remove()


def _stored(todo: pa.Table, where: Place) -> Dataset:
    """The items as a data set: what is read from Parquet alone, Ray goes on with. A file has no patient that is known, and no split."""
    keys = {"group_id": pc.coalesce(todo["study_id"], todo["row_id"]), "split": pa.array(["none"] * todo.num_rows)}
    for name, column in keys.items():
        todo = todo.append_column(name, column)
    (where / "items.parquet").write(parquet(todo))
    return Dataset(where, {"files": [{"path": "items.parquet", "outcome": "row"}], "rows": todo.num_rows})


def _hash(todo: pa.Table) -> str:
    return hashlib.sha256(parquet(todo)).hexdigest()


def _flat(todo: pa.Table, done: Dataset, findings: Sequence[str]) -> pa.Table:
    """The items in their order, with a column a finding, and the reason of those that have none."""

    def of(outcome: str, column: str) -> pa.ChunkedArray:
        found = done.table(["row_id", column], outcome=outcome)
        return found[column].take(pc.index_in(todo["row_id"], value_set=found["row_id"].combine_chunks()))

    table, scores = todo.drop_columns(["chart"]), of("row", "scores")
    for number, finding in enumerate(findings):
        table = table.append_column(finding, pc.list_element(scores, number))
    return table.append_column("reason", of("reject", "reason"))


def _readable(todo: pa.Table) -> None:
    """A refusal (no access, no credentials) is of the whole store: the first file tells it, here and in one sentence."""
    for path in pc.drop_null(todo["path"]).slice(0, 1).to_pylist():
        next(iter(fetcher(place(path).options, 1, Limits().max_bytes).each([path])))  # pyright: ignore[reportArgumentType]
