"""How long a question to a search index of MIMIC-CXR's size takes, beside the bare FAISS index and beside exact search.

    .venv/bin/python benchmarks/search.py                  # 100,000 vectors of 512: about 1 minute, 15 s once the index stands
    .venv/bin/python benchmarks/search.py --rows 377110    # all of MIMIC-CXR: about 5 minutes, 30 s once the index stands

A question goes through `Index.search` whole (filter, search, one answer a study, labels and words of the answers) but for the encoder:
its words are the number of a ready vector. Each contender meets the same questions in another order, one at a time and in turns with the
others, so that a busy machine slows all of them, and none finds what another has just brought into the caches; what a question took on
the core, without waiting for one, stands beside. Recall is of the ten studies that exact search finds (of the bare index: the ten images).

The vectors. Pure noise has no neighbours worth finding, so they are drawn as embeddings of X-rays lie: in groups of unequal size (what is
seen, and how), in them patients, of each patient studies, of each study images, every level a step from the one above in a space of
LATENT dimensions of falling weight, which a random linear map takes to `--dim`, with a little noise in each; then made unit. Questions
are images of patients who are not in the index. Numbers of studies, patients, splits and views are in MIMIC-CXR's proportions.
"""

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import load
from contracts.dataset import publish
from contracts.findings import FINDINGS, label_column
from contracts.schema import COHORT, Schema, features_schema
from contracts.storage import place
from pipelines.search.ask import Index
from pipelines.search.index import IndexConfig, run
from pipelines.search.vectors import HNSW_BUILD, HNSW_LINKS, HNSW_SEARCH

ROOT = Path(__file__).resolve().parents[1]
VERSION = 2  # of the data sets below: goes up when the code makes others
LATENT, GROUPS = 48, 300
PATIENT, STUDY, IMAGE, NOISE = 0.7, 0.5, 0.4, 0.02  # steps, against 1 between groups; noise is of each of `--dim` dimensions
K = 10
FILTERS = {  # name -> condition
    "quarter": "view = 'PA'",
    "test": "split = 'test'",
    "rare": "split = 'test' and label_pneumothorax = 1 and view = 'PA'",
}
WORDS = ("no", "acute", "cardiopulmonary", "process", "mild", "small", "left", "right", "basal", "opacity", "effusion", "edema", "stable")


@dataclass(frozen=True)
class World:
    """Rows in the order of their ids, and the questions: unit vectors [rows, dim] and [queries, dim]."""

    patient: np.ndarray
    study: np.ndarray
    vectors: np.ndarray
    queries: np.ndarray


def world(rows: int, dim: int, queries: int) -> World:
    """The vectors that the heading describes; of the questions each is of a patient of its own."""
    rng = np.random.default_rng(0)
    weight = np.arange(1, LATENT + 1, dtype=np.float32) ** -0.5
    groups = rng.standard_normal((GROUPS, LATENT), np.float32) * weight
    across = rng.standard_normal((LATENT, dim), np.float32) / np.sqrt(np.float32(dim))
    share = 1 / np.arange(1, GROUPS + 1)

    def images(patient_of: np.ndarray, study: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        def steps(count: int, size: float) -> np.ndarray:
            return rng.standard_normal((count, LATENT), np.float32) * weight * np.float32(size)

        patients = groups[rng.choice(GROUPS, patient_of.max() + 1, p=share / share.sum())] + steps(patient_of.max() + 1, PATIENT)
        studies = patients[patient_of] + steps(len(patient_of), STUDY)
        vectors = (studies[study] + steps(len(study), IMAGE)) @ across
        for start in range(0, len(vectors), 10_000):  # in pieces: beside the vectors there is no room for their like
            part = vectors[start : start + 10_000]
            part += rng.standard_normal(part.shape, np.float32) * np.float32(NOISE)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        return vectors

    n_studies, n_patients = max(1, round(rows * 227_835 / 377_110)), max(1, round(rows * 65_379 / 377_110))
    patient_of, study = rng.integers(n_patients, size=n_studies), rng.integers(n_studies, size=rows)
    each = np.arange(queries)
    vectors = images(patient_of, study, np.random.default_rng(1))
    return World(patient_of[study], study, vectors, images(each, each, np.random.default_rng(2)))


def write(folder: Path, schema: Schema, table: pa.Table, **about: object) -> None:
    """A published data set of these columns, the others null, in files of 20,000 rows."""
    (folder / "data").mkdir(parents=True)
    files = []
    for start in range(0, table.num_rows, 20_000):
        part, name = table.slice(start, 20_000), f"data/{start:07d}.parquet"
        have = set(table.column_names)
        columns = [part[f.name].cast(f.type) if f.name in have else pa.nulls(len(part), f.type) for f in schema.columns]
        pq.write_table(pa.table(columns, names=schema.columns.names), folder / name, compression="zstd")
        files.append({"path": name, "outcome": "row", "rows": len(part), "bytes": (folder / name).stat().st_size})
    publish(place(folder), schema, f"of-the-benchmark-{VERSION}", files, **about)


def write_datasets(folder: Path, made: World) -> None:
    """The cohort and the features of this world, as their verbs publish them."""
    rng = np.random.default_rng(1)
    rows, dim = made.vectors.shape
    split = rng.choice(["train", "validate", "test"], made.patient.max() + 1, p=[0.9784, 0.0079, 0.0137])
    texts = [" ".join(rng.choice(WORDS, 25)) for _ in range(2_000)]
    keys = pa.table(
        {
            "row_id": [f"{n:07d}" for n in range(rows)],
            "group_id": made.patient.astype(str),
            "split": split[made.patient],
        }
    )
    studies = made.study.max() + 1
    cohort = keys.append_column("study_id", pa.array(made.study.astype(str)))
    cohort = cohort.append_column("view", pa.array(rng.choice(["AP", "PA", "LATERAL", "LL", None], rows, p=[0.39, 0.26, 0.22, 0.09, 0.04])))
    for finding in FINDINGS:
        states = rng.choice(np.array([1, 0, -1, 2], np.int8), studies, p=[0.15, 0.1, 0.03, 0.72])[made.study]
        cohort = cohort.append_column(label_column(finding), pa.array(states, mask=states == 2))
    for section in ("report_impression", "report_findings"):
        cohort = cohort.append_column(section, pa.array(texts).take(pa.array(rng.integers(len(texts), size=studies)[made.study])))
    order = rng.permutation(rows)  # files are in no order of ids
    write(folder / "cohort", COHORT, cohort.take(order))
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(made.vectors[order].ravel()), dim)
    about = {"name": "of-the-benchmark", "fingerprint": "none", "dim": dim, "joint": True}
    features = keys.take(order).append_column("embedding", embedding)
    write(folder / "features", features_schema(dim, 0, 0), features, encoder=about)


def build(folder: str, report: str) -> None:
    """Make the index as `cxray index` does, and write down what it took; in a process of its own, whose memory is only this."""
    begun = time.perf_counter()
    summary = run(load(IndexConfig, {"out": folder, "exact_up_to": 0}))
    about = {"build_s": round(time.perf_counter() - begun, 1), "build_peak_gb": round(peak_gb(), 2)}
    Path(report).write_text(json.dumps(about | {"kinds": summary.kinds}))


def peak_gb() -> float:
    """The most memory that this process held. (getrusage counts what its parent held when it began, too.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def opened(folder: Path, made: World) -> tuple[Index, dict[str, Any]]:
    """The index of this world, built if it is not there yet, and what building took."""
    report = folder / "built.json"
    if not report.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print("writing the data sets", flush=True)
        write_datasets(folder, made)
        print("building the index", flush=True)
        child = multiprocessing.get_context("spawn").Process(target=build, args=(str(folder), str(report)))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"building the index failed ({child.exitcode})")
    index = Index(place(folder / "index"))
    index.joint_text_encoder = lambda texts: SimpleNamespace(embedding=made.queries[[int(texts[0])]])  # the words are a number
    return index, json.loads(report.read_text())


def truth(made: World, allowed: np.ndarray | None = None) -> tuple[list[set[str]], list[set[int]]]:
    """Of each question the ten nearest studies, and the ten nearest rows, by a product with all vectors and a full sort of the best."""
    studies, rows = [], []
    for start in range(0, len(made.queries), 25):
        scores = made.queries[start : start + 25] @ made.vectors.T
        if allowed is not None:
            scores[:, ~allowed] = -np.inf
        reach = min(30 * K, scores.shape[1])
        best = np.argpartition(-scores, reach - 1, axis=1)[:, :reach]
        for line, at in zip(scores, best, strict=True):
            ranked = at[np.argsort(-line[at], kind="stable")]
            ranked = ranked[np.isfinite(line[ranked])]
            rows.append(set(ranked[:K].tolist()))
            studies.append({str(s) for s in list(dict.fromkeys(made.study[ranked].tolist()))[:K]})
    return studies, rows


def recall(found: dict[int, set], wanted: list[set]) -> float:
    """The mean share of what was wanted that was found."""
    return float(np.mean([len(found[n] & wanted[n]) / len(wanted[n]) for n in found if wanted[n]]))


def in_turns(contenders: dict[str, tuple[Callable[[int], set], int]], queries: int) -> tuple[dict, dict, dict]:
    """({name: ms of each question}, {name: of these on the core}, {name: {question: what was found}}).

    A contender answers as many of the questions as stands beside it.
    """
    wall, core = ({name: [] for name in contenders} for _ in range(2))
    found: dict[str, dict[int, set]] = {name: {} for name in contenders}
    orders = {name: np.random.default_rng(i).permutation(queries).tolist() for i, name in enumerate(contenders)}
    for turn in range(queries):
        for name, (ask, count) in contenders.items():
            if turn % max(1, queries // count) == 0:
                question = orders[name][turn]
                begun, begun_core = time.perf_counter(), time.thread_time()
                found[name][question] = ask(question)
                core[name].append(1000 * (time.thread_time() - begun_core))
                wall[name].append(1000 * (time.perf_counter() - begun))
    return wall, core, found


def main() -> None:
    """Measure, print a line a contender, and one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=500)
    asked = parser.parse_args()
    made = world(asked.rows, asked.dim, asked.queries)
    folder = ROOT / f"runs/bench/search-{asked.rows}x{asked.dim}-{VERSION}-{HNSW_LINKS}-{HNSW_BUILD}"
    index, about = opened(folder, made)
    graph = faiss.downcast_index(index.images.index.index)  # below the map from places to rows, whose threads wait for each other
    flat = faiss.downcast_index(graph.storage)

    def ours(where: str | None) -> Callable[[int], set]:
        return lambda n: {a.study_id for a in index.search(str(n), None, "image", where, K)}

    def bare(candidates: int) -> Callable[[int], set]:
        return lambda n: set(
            graph.search(made.queries[n : n + 1], K, params=faiss.SearchParametersHNSW(efSearch=candidates))[1][0].tolist()
        )

    n, first = asked.queries, {}
    for name, where in FILTERS.items():  # the first of all makes the table that filters are asked of
        begun = time.perf_counter()
        ours(where)(0)
        first[name] = 1000 * (time.perf_counter() - begun)
    # Those that are compared with each other stand in turns; the rest, which would only fill the caches between them, comes after.
    exact = lambda q: set(flat.search(made.queries[q : q + 1], K)[1][0].tolist())  # noqa: E731
    wall, core, found = in_turns({"ours": (ours(None), n), "bare": (bare(HNSW_SEARCH), n), "exact": (exact, 30)}, n)
    filtered = {name: (ours(where), n) for name, where in FILTERS.items()}
    others = {f"bare, efSearch {e}": (bare(e), n) for e in (16, 32, 64, 256)}
    for more in (filtered, others):
        for all_of_it, part in zip((wall, core, found), in_turns(more, n), strict=True):
            all_of_it.update(part)

    studies, rows = truth(made)
    shown = index.rows.select(["row_id", "split", "view", label_column("Pneumothorax")])  # noqa: F841 - DuckDB finds it by its name
    lines = {}
    for name in wall:
        wanted, let_through = (studies if name == "ours" else rows), len(made.vectors)
        if name in FILTERS:
            allowed = np.zeros(len(made.vectors), bool)
            allowed[[int(i) for (i,) in duckdb.sql(f"SELECT row_id FROM shown WHERE {FILTERS[name]}").fetchall()]] = True
            wanted, let_through = truth(made, allowed)[0], int(allowed.sum())
        p50, p95 = np.percentile(wall[name], (50, 95))
        core95, found_of_it = np.percentile(core[name], 95), recall(found[name], wanted)
        lines[name] = {
            "p50_ms": round(p50, 3),
            "p95_ms": round(p95, 3),
            "p95_core_ms": round(core95, 3),
            "recall_at_10": round(found_of_it, 4),
        }
        print(
            f"{name:<20} p50 {p50:7.2f} ms   p95 {p95:7.2f} ms, on the core {core95:7.2f}   recall@10 {found_of_it:.4f} of {let_through:,}"
        )
    print("a filter's first question: " + ", ".join(f"{name} {t:.0f} ms" for name, t in first.items()))
    print(json.dumps({
        "rows": asked.rows, "dim": asked.dim, "queries": n, **lines["ours"],
        "to_faiss": round(lines["bare"]["p50_ms"] / lines["ours"]["p50_ms"], 3), "exact_ms": lines["exact"]["p50_ms"],
        "efsearch": HNSW_SEARCH, "filters": {name: lines[name] for name in FILTERS}, **about,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
