"""Does a question find its passage, and what does finding cost?

    .venv/bin/python benchmarks/knowledge.py [--studies 800]      # about 3 minutes: most of it encodes

Recall. The 225 answers of MedQuAD that are about the chest (Ben Abacha & Demner-Fushman 2019; shared/data/medquad-chest) become a knowledge
folder, from the answers alone: neither the question nor the disease that it asks after is read. Then each is asked with its own question,
through `Knowledge.find` with its settings as they come: a note's segment goes the same way. Any passage of an answer to the same question
counts. Beside it, over the same passages, and with at most one of an answer too: BM25 alone (bm25s as it comes) and cosine alone.

What was tried, recall at 1 / at 5 over all questions. Halves of the questions (by a hash) are printed beside them, but both were seen while
the table was made: neither is held out, and what was chosen may do a little worse elsewhere. 225 of them tell apart what differs by
about 0.05, which most rows do not. The three weights were chosen with an eye on lists of medicines too (tests/test_knowledge.py).

    cosine, 160 words a passage, several of an answer          0.63 / 0.89     BM25 0.32 / 0.70
    the same, 40 words of overlap                              0.65 / 0.88     BM25 0.35 / 0.64
    cosine, whole sentences up to 64 tokens, one of an answer  0.66 / 0.94
    up to 96 / 128 / 192 / 256 tokens                          0.68 / 0.94, 0.65 / 0.91, 0.70 / 0.94, 0.67 / 0.93
    96, several of an answer                                   0.68 / 0.90     that is what one of an answer gives
    96, mixed with the mean of its answer (0.2 to 1)           0.63 to 0.70 / 0.92 to 0.94
    96, each passage begins with its answer's first sentence   0.71 / 0.95     in 128: 0.69 / 0.95, in 192: 0.72 / 0.94
    the same, and BM25 as s / (s + 8), weight 0.1 to 0.4       0.72 to 0.76 / 0.95 to 0.96
    without the first sentence, weights as above               0.67 to 0.68 / 0.94
    and names (pipelines/knowledge/lexical.py), 0.1 to 0.3     0.70 to 0.76 / 0.95 to 0.96    names are for medicines: see tests
    as it is now, the sentence within the 128, overlap of 24   0.72 / 0.96    weights, stop words around it 0.69 to 0.75 / 0.94 to 0.96

Retrieval. Studies of five segments are asked of the project's own passages, on one core; what encoding costs is not in it.

Studies. `cxray texts` as a user runs it, chart -> note -> filter -> passages -> Parquet, on made-up charts of which each is unlike the
others, with five passages a study and no reports: studies a second after the first file is written. `to_bare` is its share of what
plain processes, one a core, reach that only encode the same distinct segments, in batches of as many studies.
"""

import argparse
import gc
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bm25s
import faiss
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from images import written_rate  # noqa: E402 - after the path is set
from mimic.charts import cohort, row  # noqa: E402

from contracts.chart import Chart  # noqa: E402
from contracts.config import load  # noqa: E402
from contracts.dataset import open_dataset  # noqa: E402
from contracts.storage import place  # noqa: E402
from models.encoders import load_text  # noqa: E402
from pipelines.inputs.notes import NoteConfig, NoteWriter  # noqa: E402
from pipelines.knowledge.base import KnowledgeConfig, run  # noqa: E402
from pipelines.knowledge.retrieve import Knowledge, Question, RetrievalConfig  # noqa: E402
from pipelines.synthetic.lexicon import coined_medicines  # noqa: E402

MEDQUAD = ROOT.parent / "shared" / "data" / "medquad-chest" / "medquad_chest.jsonl"
AT = (1, 5)
STUDIES, SEGMENTS, BATCH, CHARTS = 2_000, 5, 64, 10_000


def recall(out: Path) -> dict[str, float]:
    """Of MedQuAD's questions the share that finds a passage of an answer to them among the first 1 and 5."""
    settings = {"out": str(out), "into": "medquad", "own": False, "corpora": [str(MEDQUAD)], "text_fields": ["answer"]}
    print(run(load(KnowledgeConfig, settings)))
    knowledge = Knowledge(place(out / "medquad"))
    items = [json.loads(line) for line in MEDQUAD.read_text().splitlines()]
    questions = [item["question"] for item in items]
    encoder = load_text(knowledge.encoder["name"])
    knowledge.agree(vars(encoder))
    asked = encoder(questions).embedding

    ids = knowledge.ids
    answers = {item["id"]: item["answer"] for item in items}
    same: dict[str, set[str]] = {}  # an answer may stand under two questions
    for item in items:
        same.setdefault(item["answer"], set()).add(item["question"])
    told = {id: same[answers[id.partition("#")[0]]] for id in ids}

    found = knowledge.find([Question(None, [("question", q, v)]) for q, v in zip(questions, asked)], RetrievalConfig())
    lists = {"": [[e.id for e in evidence] for evidence in found]}
    bm25 = bm25s.BM25()
    bm25.index(bm25s.tokenize([knowledge.text(id) for id in ids], show_progress=False), show_progress=False)
    words = bm25s.tokenize(questions, return_ids=False, show_progress=False)
    lists["bm25_"] = [_one_an_answer(bm25.get_scores([str(word) for word in said]), ids) for said in words]
    lists["dense_"] = [_one_an_answer(scores, ids) for scores in asked @ knowledge.vectors(ids).T]

    half = np.array([hashlib.sha1(q.lower().encode()).digest()[-1] % 2 for q in questions])
    figures: dict[str, float] = {}
    print(f"\n{'':<14}{'all':>8}{'half A':>8}{'half B':>8}")
    for name, ranked in lists.items():
        for k in AT:
            hit = np.array([any(q in told[id] for id in row[:k]) for q, row in zip(questions, ranked)])
            print(f"{name or 'cxray_'}at_{k:<6}{hit.mean():>8.3f}{hit[half == 0].mean():>8.3f}{hit[half == 1].mean():>8.3f}")
            figures[f"{name}recall_at_{k}"] = round(float(hit.mean()), 4)
    return figures


def _one_an_answer(scores: np.ndarray, ids: list[str]) -> list[str]:
    """Passages best first, of each answer only the best."""
    best: dict[str, str] = {}
    for place_ in np.argsort(-scores, kind="stable"):
        best.setdefault(ids[place_].partition("#")[0], ids[place_])
        if len(best) == max(AT):
            break
    return list(best.values())


def retrieval(out: Path) -> dict[str, float]:
    """Milliseconds of `find` a study of five segments, on one core, over the project's own passages."""
    run(load(KnowledgeConfig, {"out": str(out), "into": "own"}))
    knowledge = Knowledge(place(out / "own"))
    rng = np.random.default_rng(0)
    vectors = knowledge.vectors(knowledge.ids)
    said = [knowledge.text(id).split() for id in knowledge.ids]

    def segment() -> tuple[str, str, np.ndarray]:
        one, start = rng.integers(len(said)), rng.integers(15)
        vector = vectors[one] + rng.standard_normal(vectors.shape[1], np.float32) / np.sqrt(vectors.shape[1], dtype=np.float32)
        return f"segment {start}", " ".join(said[one][start : start + 25]), vector / np.linalg.norm(vector)

    questions = [Question(None, [segment() for _ in range(SEGMENTS)]) for _ in range(STUDIES)]
    faiss.omp_set_num_threads(1)
    knowledge.find(questions[:100], RetrievalConfig())
    taken = []
    for _ in range(3):
        started, wall = time.process_time(), time.perf_counter()
        found = knowledge.find(questions, RetrievalConfig())
        taken.append((time.process_time() - started, time.perf_counter() - wall))
    core, wall = (min(t) / STUDIES * 1000 for t in zip(*taken))
    each = np.mean([len(evidence) for evidence in found])
    print(f"\n{len(knowledge)} passages, {STUDIES:,} studies of {SEGMENTS} segments that fetch {each:.1f} each:")
    print(f"{core:.3f} ms a study on the core, {wall:.3f} on the clock")
    return {"find_ms_a_study": round(core, 4), "passages": len(knowledge)}


def notes() -> dict[str, float]:
    """Notes a second of one core, chart -> filtered narrative, with a writer that has seen nothing before."""
    rng, coined = np.random.default_rng(0), [drug.name for drug in coined_medicines(0)]
    charts = [Chart.from_row(row(rng, number, coined)) for number in range(CHARTS)]
    gc.freeze()  # as an actor does: what it holds for good need not be walked again
    write = NoteWriter(NoteConfig())
    started = time.process_time()
    for at in range(0, CHARTS, BATCH):
        write(charts[at : at + BATCH])
    rate = CHARTS / (time.process_time() - started)
    print(f"\n{CHARTS:,} charts: {rate:,.0f} notes a second of one core")
    return {"notes_per_s": round(rate)}


def studies(out: Path, count: int) -> dict[str, float]:
    """Studies a second through `cxray texts`, and its share of bare encoding."""
    run(load(KnowledgeConfig, {"out": str(out), "into": "own"}))
    cohort(out, count)
    config, settings = out / "texts.yaml", ["knowledge=own", "report=[]", "retrieval.per_note=5"]
    config.write_text(f"out: {out}\n")
    words = [sys.executable, "-m", "cxray", "texts", str(config), *(w for s in settings for w in ("--set", s))]
    before = bare_rate(out)
    started = time.time()
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rate, first = written_rate(out / "texts" / "data", started)
    bare = (before + bare_rate(out)) / 2  # the machine's speed drifts
    kinds = open_dataset(place(out / "texts"), "texts").leaves(["segments.list.element.kind"])["segments"].to_pylist()
    each = {kind: np.mean([sum(s["kind"] == kind for s in row) for row in kinds]) for kind in ("raw", "note", "passage")}
    print(f"\n{count:,} studies of {each['raw'] + each['note']:.1f} segments and {each['passage']:.1f} passages:")
    print(f"{rate:.1f} a second, {first:.0f} s to the first; bare encoding of the same segments {bare:.1f}")
    return {"studies_per_s": round(rate, 2), "bare_per_s": round(bare, 2), "to_bare": round(rate / bare, 3)}


def bare_rate(out: Path) -> float:
    """Studies a second of one plain process a core that only encodes."""
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.starmap(bare, [(str(out), share, cores) for share in range(cores)]))


def bare(out: str, share: int, of: int) -> float:
    import torch

    torch.set_num_threads(1)
    charts = [Chart.from_row(row) for row in open_dataset(place(Path(out) / "cohort"), "cohort").table().to_pylist()[share::of]]
    segments = [[s.text for s in note.segments] for note in NoteWriter(NoteConfig())(charts)]
    encoder = load_text("st:all-MiniLM-L6-v2")
    batches = [[text for note in segments[at : at + BATCH] for text in note] for at in range(0, len(segments), BATCH)]
    encoder(batches[0])
    started = time.perf_counter()
    for batch in batches:
        encoder(batch)
    return len(segments) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Does a question find its passage, and what does finding cost?")
    parser.add_argument("--out", type=Path, help="keep the knowledge folders there")
    parser.add_argument("--studies", type=int, default=800)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = asked.out or Path(folder)
        figures = recall(out) | retrieval(out) | notes() | studies(out, asked.studies)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
