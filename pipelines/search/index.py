"""`cxray index CONFIG`: embeddings -> a FAISS index of images and one of reports, with what an answer shows.

    .venv/bin/cxray index configs/demo/index.yaml

The output is a run folder: `model/` alone answers. Its config.json names the files of image vectors, report vectors and rows. New rows
are added to an index that stands; they do not build it anew, until there are so many that exact search gives way to HNSW.
"""

import json
import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import record
from contracts.storage import Place
from pipelines.job import VerbConfig

# Exact search of 377,110 x 512 takes 0.16 s, HNSW 0.5 ms after minutes of building; below this many rows exact is quick enough.
EXACT_UP_TO = 50_000
HNSW_LINKS, HNSW_BUILD = 32, 80  # neighbours a node, and candidates while building (Malkov & Yashunin 2018, arXiv:1603.09320)

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
    rows, images = _new_rows(cohort, features, known=set(before["row_id"].to_pylist()) if before else set())
    grown = {"image": _grow(_old(model, "image"), images, np.arange(start, start + len(images)), cfg.exact_up_to)}
    if texts is not None:
        numbers, reports = _report_vectors(rows, texts)
        grown["report"] = _grow(_old(model, "report"), reports, start + numbers, cfg.exact_up_to)
    every = pa.concat_tables([before, rows]) if before else rows

    kinds = {name: _kind(index) for name, index in grown.items()}
    _write(model, about, every, grown, kinds)
    reports_in = grown["report"].ntotal if "report" in grown else 0
    summary = IndexSummary(str(cfg.output()), every.num_rows, rows.num_rows, kinds, reports_in)
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


def _old(model: Place, name: str) -> Any:
    """The FAISS index of that name that stands here, or None."""
    if not (model / "config.json").exists():
        return None
    file = json.loads((model / "config.json").read())["files"].get(name)
    return faiss.deserialize_index(np.frombuffer((model / file).read(), np.uint8)) if file else None


def _write(model: Place, about: dict[str, Any], rows: pa.Table, indices: dict[str, Any], kinds: dict[str, str]) -> None:
    """Each file under a name of its own, and config.json, which names them, last: killed anywhere, the old index stands."""
    stamp = uuid.uuid4().hex[:12]
    files = {"rows": f"rows-{stamp}.parquet"} | {name: f"{name}-{stamp}.faiss" for name in indices}
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    (model / files["rows"]).write(sink.getvalue().to_pybytes())
    for name, index in indices.items():
        (model / files[name]).write(faiss.serialize_index(index).tobytes())
    (model / "README.md").write(_model_card(about, rows.num_rows, kinds).encode())
    (model / "config.json").write(json.dumps(about | {"files": files}, indent=1).encode())
    for file in (*model.files(".faiss"), *model.files(".parquet")):
        if file.name not in files.values():
            file.remove()


def _new_rows(cohort: Dataset, features: Dataset, known: set[str]) -> tuple[pa.Table, np.ndarray]:
    """Rows with an embedding that the index does not have yet: what an answer shows of each, and the vectors of their images."""
    found = features.table(["row_id", "embedding"])
    found = found.filter(pa.array([i not in known for i in found["row_id"].to_pylist()], pa.bool_())).sort_by("row_id")
    rows = found.select(["row_id"]).join(cohort.table(SHOWN), "row_id", join_type="inner").sort_by("row_id")
    if rows.num_rows != found.num_rows:
        lacking = found.num_rows - rows.num_rows
        raise CxrayError(f"{features.place}: {lacking:,} of its rows are not in the cohort; it was made from another")
    return rows, _matrix(found["embedding"])


def _report_vectors(rows: pa.Table, texts: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the rows whose report has a vector, the vectors). A study's report stands once, at its first such row."""
    found = texts.table(["row_id", "report_embedding"])
    found = found.filter(pc.is_valid(found["report_embedding"]))
    at = {row_id: i for i, row_id in enumerate(found["row_id"].to_pylist())}
    first: dict[str, tuple[int, int]] = {}
    for number, (row_id, study) in enumerate(zip(rows["row_id"].to_pylist(), rows["study_id"].to_pylist(), strict=True)):
        if row_id in at:
            first.setdefault(study, (number, at[row_id]))
    pairs = np.array(list(first.values()), np.int64).reshape(-1, 2)
    return pairs[:, 0], _matrix(found["report_embedding"])[pairs[:, 1]]


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors without nulls -> float32 [rows, width]."""
    width = column.type.list_size
    return np.concatenate([np.empty(0, np.float32), *(c.flatten().to_numpy() for c in column.chunks)]).reshape(-1, width)


def _grow(old: Any, vectors: np.ndarray, ids: np.ndarray, exact_up_to: int) -> Any:
    """`old` with these vectors added, or a new index: exact for few, HNSW for many. Inner product of unit vectors."""
    total = len(vectors) + (old.ntotal if old else 0)
    if old is not None and (total <= exact_up_to or _kind(old) == "HNSW"):
        old.add_with_ids(vectors, ids)
        return old
    if old is not None:  # it has outgrown exact search
        flat = faiss.downcast_index(old.index)
        vectors = np.concatenate([flat.reconstruct_n(0, old.ntotal), vectors])
        ids = np.concatenate([faiss.vector_to_array(old.id_map), ids])
    if total <= exact_up_to:
        base: Any = faiss.IndexFlatIP(vectors.shape[1])
    else:
        base = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        base.hnsw.efConstruction = HNSW_BUILD
    index = faiss.IndexIDMap2(base)
    index.add_with_ids(vectors, ids)
    return index


def _kind(index: Any) -> str:
    return "HNSW" if isinstance(faiss.downcast_index(index.index), faiss.IndexHNSWFlat) else "exact"


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
