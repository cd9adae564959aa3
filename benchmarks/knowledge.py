"""Does a question find its passage, and what does finding cost?

    .venv/bin/python benchmarks/knowledge.py            # about 1 minute: most of it encodes the passages

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
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bm25s
import faiss
import numpy as np

from contracts.config import load
from contracts.storage import place
from models.encoders import load_text
from pipelines.knowledge.base import KnowledgeConfig, run
from pipelines.knowledge.retrieve import Knowledge, Question, RetrievalConfig

ROOT = Path(__file__).resolve().parents[1]
MEDQUAD = ROOT.parent / "shared" / "data" / "medquad-chest" / "medquad_chest.jsonl"
AT = (1, 5)
STUDIES, SEGMENTS = 2_000, 5


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


PARTS: tuple[Callable[[Path], dict[str, float]], ...] = (recall, retrieval)  # each stands for itself; a further one adds its figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Does a question find its passage, and what does finding cost?")
    parser.add_argument("--out", type=Path, help="keep the knowledge folders there")
    out: Path | None = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: value for part in PARTS for name, value in part(out or Path(folder)).items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
