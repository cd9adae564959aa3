"""What a network says of rows that were prepared for it: of a batch, of a split in this process, and as a data set of predictions."""

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from tqdm import tqdm

from contracts.dataset import Dataset, publish, read_manifest
from contracts.errors import CxrayError
from contracts.runs import read_run
from contracts.schema import predictions_schema
from contracts.storage import Place
from pipelines.ledger import ids_hash
from trainers.engine.context import moved
from trainers.engine.data import Rows
from trainers.engine.validate import array
from trainers.fusion import Fusion
from trainers.sources import FusionConfig, lists

QUIET_S = 3  # a run that is done by then shows no progress


def trained_with(where: Place) -> FusionConfig:
    """What a finished run was asked to do. Raises CxrayError where it is none, or of another task or version."""
    told = read_run(where)
    if told is None or told["verb"] != "train":
        raise CxrayError(f"{where}: no finished `cxray train` here; run it, or name its folder (`run`)")
    if (task := told["config"].get("task")) != "fusion":
        raise CxrayError(f"{where}: a run of the task {task!r}; here one of the task 'fusion' is wanted")
    try:
        return FusionConfig.model_validate(told["config"])
    except ValidationError:
        raise CxrayError(f"{where}: trained by another version of cxray; train again in a new folder") from None


def said(task: Fusion, network: Any, prepared: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """scores and labels float64 [B, F], NaN where nothing is known. A soft target is no label."""
    with torch.inference_mode():
        told = task.predict(network, moved(task.collate(prepared), next(network.parameters()).device))
    scores, labels = (array(told[name]).astype(np.float64) for name in ("score", "label"))
    return scores, np.where((labels == 0) | (labels == 1), labels, np.nan)


def scored(task: Fusion, network: Any, rows: Rows, size: int) -> pa.Table:
    """Keys, scores [F] and labels [F] of a split, in the order of row_id, `size` rows at a time."""
    width = len(task.cfg.findings)
    scores, labels = np.zeros((len(rows), width)), np.full((len(rows), width), np.nan)
    with tqdm(total=len(rows), desc="predict", unit=" rows", delay=QUIET_S) as progress:
        for start in range(0, len(rows), size):
            which = range(start, min(start + size, len(rows)))
            scores[start : which.stop], labels[start : which.stop] = said(task, network, [rows[0, n] for n in which])
            progress.update(len(which))
    known = pa.array(np.nan_to_num(labels).astype(np.int8).ravel(), mask=np.isnan(labels).ravel())
    keys = rows.keys.append_column("scores", lists(scores, np.float64))
    return keys.append_column("labels", pa.FixedSizeListArray.from_arrays(known, width))


def write(out: Place, parts: Sequence[pa.Table], cohort: Dataset, task: Fusion, model: str, weights: str, fingerprint: str) -> Dataset:
    """Publish the splits' rows, in the place of what stood there. weights: sha256 of the network's file.

    Raises CxrayError where there is no row, or where the folder holds something else.
    """
    before = read_manifest(out)
    if before is not None and before["schema"] != "predictions":
        raise CxrayError(f"{out}: holds {before['schema']}; name another folder (`into`)")
    table = pa.concat_tables(parts)
    if not table.num_rows:
        raise CxrayError(f"{cohort.place}: no row of the splits has what the model reads; name others (`splits`)")
    studies = cohort.table(["row_id", "study_id"])
    study = studies["study_id"].take(pc.index_in(table["row_id"], value_set=studies["row_id"].combine_chunks()))
    schema = predictions_schema(len(task.cfg.findings))
    table = table.append_column("study_id", study).select(schema.columns.names).cast(schema.columns)
    file, content = f"data/{uuid.uuid4().hex}.parquet", parquet(table)
    (out / file).write(content)
    done = publish(
        out, schema, fingerprint, [{"path": file, "outcome": "row", "rows": table.num_rows, "bytes": len(content)}],
        rows_in=table.num_rows, ids_hash=ids_hash(table["row_id"]), columns=[f"{f.name}: {f.type}" for f in schema.columns],
        model=model, targets=list(task.cfg.findings), policy=task.policy_name, weights=weights,
    )  # fmt: skip
    for old in (before or {}).get("files", []):
        (out / old["path"]).remove()
    return done


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
