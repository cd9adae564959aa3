"""`cxray index CONFIG`: embeddings -> a FAISS index of images and one of reports, with what an answer shows.

The output is a run folder: `model/` alone answers. Its config.json names the files of image vectors, report vectors and rows. New rows
are added to an index that stands; they do not build it anew, until there are so many that exact search gives way to HNSW.
"""

import json
import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import record
from contracts.storage import Place, told
from pipelines.job import VerbConfig
from pipelines.search.vectors import EXACT_UP_TO, Vectors, grown

LABELS = [label_column(f) for f in FINDINGS]
SHOWN = ["row_id", "group_id", "study_id", "split", "view", *LABELS, "report_impression", "report_findings"]


class IndexConfig(VerbConfig):
    cohort: str = "cohort"
    features: str = "features"
    texts: str | None = None  # without it only images are searched
    into: str = "index"
    exact_up_to: int = EXACT_UP_TO

    outside_fingerprint: ClassVar[frozenset[str]] = VerbConfig.outside_fingerprint | {"exact_up_to"}

    def inputs(self) -> dict[str, Place]:
        names = {"cohort": self.cohort, "features": self.features} | ({"texts": self.texts} if self.texts else {})
        return {n: self.at(name) for n, name in names.items()}


@dataclass
class IndexSummary:
    where: str
    rows: int
    added: int
    kinds: dict[str, str]
    reports: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} ({kind})" for name, kind in self.kinds.items())
        return f"index: {self.rows:,} images and {self.reports:,} reports, {self.added:,} added -> {self.where}\n  {kinds}"


def run(cfg: IndexConfig) -> IndexSummary:
    """Raises CxrayError where an input is not there, or where the index in this folder was made from other embeddings."""
    cohort = open_dataset(cfg.at(cfg.cohort), "cohort")
    features = open_dataset(cfg.at(cfg.features), "features")
    texts = open_dataset(cfg.at(cfg.texts), "texts") if cfg.texts else None
    model = cfg.output() / "model"
    about = {
        "image_encoder": features.manifest["encoder"],
        "text_encoder": texts.manifest["encoder"] if texts else None,
        "fingerprint": cfg.fingerprint(features.fingerprint, texts.fingerprint if texts else ""),
    }
    before = _before(model, about)

    start = before.num_rows if before else 0
    rows, images = _new_rows(cohort, features, known=before["row_id"] if before else pa.chunked_array([], pa.string()))
    sides = {"image": grown(_old(model, "image"), images, np.arange(start, start + len(images)), cfg.exact_up_to)}
    del images  # they stand in the index now, and are the size of it
    if texts is not None:
        numbers, reports = _report_vectors(rows, texts)
        sides["report"] = grown(_old(model, "report"), reports, start + numbers, cfg.exact_up_to)
    every = pa.concat_tables([before, rows]) if before else rows

    _write(model, about, every, sides)
    kinds = {name: side.kind for name, side in sides.items()}
    summary = IndexSummary(str(cfg.output()), every.num_rows, rows.num_rows, kinds, len(sides["report"]) if "report" in sides else 0)
    record(cfg.output(), "index", cfg, cfg.inputs(), {"rows": summary.rows, "reports": summary.reports, "kinds": kinds})
    return summary


def _before(model: Place, about: dict[str, Any]) -> pa.Table | None:
    """The rows of the index that stands here, if one does."""
    if not (model / "config.json").exists():
        return None
    there = json.loads((model / "config.json").read())
    if there["fingerprint"] != about["fingerprint"]:
        raise CxrayError(f"{model}: holds an index made from other embeddings; name another folder (`into`), or delete this one")
    return pq.read_table(pa.BufferReader((model / there["files"]["rows"]).read()))


def _old(model: Place, name: str) -> Vectors | None:
    """The vectors of that name that stand here, or None."""
    if not (model / "config.json").exists():
        return None
    file = json.loads((model / "config.json").read())["files"].get(name)
    return Vectors.read(model / file) if file else None


def _write(model: Place, about: dict[str, Any], rows: pa.Table, sides: dict[str, Vectors]) -> None:
    """Each file under a name of its own, and config.json, which names them, last: killed anywhere, the old index stands."""
    stamp = uuid.uuid4().hex[:12]
    files = {"rows": f"rows-{stamp}.parquet"} | {name: f"{name}-{stamp}.faiss" for name in sides}
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    (model / files["rows"]).write(sink.getvalue().to_pybytes())
    for name, side in sides.items():
        side.write(model / files[name])
    (model / "README.md").write(_model_card(about, rows.num_rows, {name: side.kind for name, side in sides.items()}).encode())
    (model / "config.json").write(json.dumps(about | {"files": files}, indent=1).encode())
    for file in (*model.files(".faiss"), *model.files(".parquet")):
        if file.name not in files.values():
            file.remove()


def _new_rows(cohort: Dataset, features: Dataset, known: pa.ChunkedArray) -> tuple[pa.Table, np.ndarray]:
    """Rows with an embedding that the index does not have yet: what an answer shows of each, and the vectors of their images."""
    there = features.table(["row_id"])
    order = pc.sort_indices(there["row_id"])
    order = order.filter(pc.invert(pc.is_in(there["row_id"].take(order), value_set=known)).combine_chunks())
    ids = there.take(order)
    rows = ids.join(cohort.table(SHOWN), "row_id", join_type="inner").sort_by("row_id")
    if rows.num_rows != ids.num_rows:
        lacking = ids.num_rows - rows.num_rows
        raise CxrayError(f"{features.place}: {lacking:,} of its rows are not in the cohort; it was made from another")
    return rows, _matrix(features, "embedding", order.to_numpy())


def _report_vectors(rows: pa.Table, texts: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the rows whose report has a vector, the vectors). A study's report stands once, at its first such row."""
    with_report = pc.is_valid(pc.field("report_embedding"))
    at = {row_id: i for i, row_id in enumerate(texts.table(["row_id"], where=with_report)["row_id"].to_pylist())}
    first: dict[str, tuple[int, int]] = {}
    for number, (row_id, study) in enumerate(zip(rows["row_id"].to_pylist(), rows["study_id"].to_pylist(), strict=True)):
        if row_id in at:
            first.setdefault(study, (number, at[row_id]))
    pairs = np.array(list(first.values()), np.int64).reshape(-1, 2)
    return pairs[:, 0], _matrix(texts, "report_embedding", pairs[:, 1])


def _matrix(dataset: Dataset, column: str, order: np.ndarray) -> np.ndarray:
    """Of a column's vectors, nulls not counted, those at these places in this order -> float32 [places, width].

    Read piece by piece into their final places: a whole column, read and sorted by Arrow, stands in memory five times.
    """
    field = dataset.schema().field(column)
    out = np.empty((len(order), field.type.list_size), np.float32)
    if not len(order):
        return out
    fs, _ = dataset.place.arrow()
    files = pyarrow.dataset.dataset(dataset.paths(), filesystem=fs, format="parquet", schema=pa.schema([field]))
    to = np.full(dataset.rows, -1)
    to[order] = np.arange(len(order))
    at = 0
    with told(dataset.place):
        for batch in files.to_batches(batch_size=8192, batch_readahead=2, fragment_readahead=2):
            vectors = batch.column(0).flatten().to_numpy().reshape(-1, out.shape[1])  # leaves nulls out
            places = to[at : at + len(vectors)]
            out[places[places >= 0]] = vectors[places >= 0]
            at += len(vectors)
    return out


def _model_card(about: dict[str, Any], rows: int, kinds: dict[str, str]) -> str:
    text = about["text_encoder"]["name"] if about["text_encoder"] else "none"
    indices = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    return f"""# Search index

{NOT_FOR_DIAGNOSIS}

{rows:,} images ({indices}).

- image encoder: `{about["image_encoder"]["name"]}`
- text encoder: `{text}`

It holds vectors of patients' images and reports, and the reports' impressions: keep it where the data may be kept.
"""
