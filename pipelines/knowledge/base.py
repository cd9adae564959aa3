"""`cxray knowledge CONFIG`: passages written for this project and a user's own corpora -> a knowledge folder.

    .venv/bin/cxray knowledge configs/mimic/knowledge.yaml

The output is a run folder: `model/` alone answers (pipelines/knowledge/retrieve.py). Its config.json goes first and comes back last, so
that a folder with one is whole.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import yaml
from pydantic import Field, model_validator
from tqdm import tqdm

from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import finished, read_run, record
from contracts.storage import Place, told
from models.encoders import load_text
from models.encoders.base import TextEncoder
from pipelines.job import VerbConfig
from pipelines.knowledge.corpus import TEXT_FIELDS, Chunker, files_of, read_corpus
from pipelines.knowledge.lexical import FILES, Lexical
from pipelines.knowledge.retrieve import COLUMNS, KIND, OF_PATIENTS, VERSION
from pipelines.search.vectors import grown

PASSAGES = Path(__file__).parent / "passages"
REPORT = "report"  # the topic of patients' reports
_AT_ONCE = 1024  # texts between two steps of the progress


class KnowledgeConfig(VerbConfig):
    into: str = "knowledge"
    own: bool = True  # the passages written for this project
    corpora: tuple[str, ...] = ()  # files or folders of JSONL, Markdown, plain text, Parquet
    text_fields: Annotated[tuple[str, ...], Field(min_length=1)] = TEXT_FIELDS  # of a record the first that is there is its text
    encoder: str = "st:all-MiniLM-L6-v2"
    chunk_tokens: Annotated[int, Field(ge=32)] = 128
    overlap_tokens: Annotated[int, Field(ge=0)] = 24
    reports: str | None = None  # a cohort, whose train split's reports become passages: the folder then holds patients' reports

    @model_validator(mode="after")
    def _room(self) -> "KnowledgeConfig":
        if self.overlap_tokens > self.chunk_tokens // 4:
            raise ValueError("overlap_tokens may be a quarter of chunk_tokens at most")
        if not (self.own or self.corpora or self.reports):
            raise ValueError("there is nothing to know: set own, corpora or reports")
        return self

    def inputs(self) -> dict[str, Place]:
        return {"cohort": self.at(self.reports)} if self.reports else {}


@dataclass
class KnowledgeSummary:
    where: str
    passages: int
    documents: int
    tokens: int
    sources: dict[str, int]
    left_out: dict[str, int]
    seconds: float

    def __str__(self) -> str:
        sources = ", ".join(f"{name} {count:,}" for name, count in self.sources.items())
        lines = [
            f"knowledge: {self.passages:,} passages of {self.documents:,} documents -> {self.where}",
            f"  from {sources}; {self.tokens / max(self.passages, 1):.0f} tokens a passage; {self.seconds:.1f} s",
        ]
        return "\n".join(lines + [f"  {reason}: {count:,}" for reason, count in sorted(self.left_out.items())])


@dataclass(slots=True)
class Passage:
    id: str
    topic: str
    source: str
    text: str
    group_id: str | None
    document: int  # chunks of one document share its number


def run(cfg: KnowledgeConfig) -> KnowledgeSummary:
    """Raises CxrayError for a corpus that is not there, is empty or cannot be read, and where the encoder cannot be loaded."""
    started = time.monotonic()
    out = cfg.output()
    before = read_run(out)
    if (before is not None and before["verb"] != "knowledge") or (before is None and (out / "dataset.json").exists()):
        raise CxrayError(f"{out}: holds the output of another verb; name another folder (`into`)")
    versions = _versions(cfg)  # before they are read: what changes meanwhile is then read again
    encoder = load_text(cfg.encoder)
    left_out: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    passages: list[Passage] = []
    for kind, passage in _once(_passages(cfg, encoder, left_out), left_out):
        sources[kind] += 1
        passages.append(passage)
    if not passages:
        raise CxrayError(f"{cfg.reports}: no report in its train split, and nothing else to know; set own or corpora")

    tokens, vectors = _embed(encoder, [p.text for p in passages])
    lexical = _lexical(encoder, passages)
    about = {
        "kind": KIND,
        "version": VERSION,
        "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint},
        "chunking": {"tokens": cfg.chunk_tokens, "overlap": cfg.overlap_tokens},
        "fingerprint": _fingerprint(encoder.fingerprint, passages),
        "passages": len(passages),
        "sources": dict(sources),
        "topics": dict(Counter(p.topic for p in passages).most_common(100)),
        "reports": bool(cfg.reports),
        "files": {"passages": "passages.parquet", "vectors": "passages.faiss", "lexical": list(FILES)},
    }
    _write(out / "model", about, passages, tokens, vectors, lexical)
    summary = KnowledgeSummary(
        where=str(out),
        passages=len(passages),
        documents=len({p.document for p in passages}),
        tokens=int(tokens.sum()),
        sources=dict(sources),
        left_out=dict(left_out),
        seconds=time.monotonic() - started,
    )
    record(out, "knowledge", cfg, cfg.inputs(), summary.__dict__ | {"versions": versions})
    return summary


def unchanged(verb: str, cfg: KnowledgeConfig) -> bool:
    """True where the folder of just these settings stands, and its corpora's files are those it was made from."""
    before = read_run(cfg.output())
    if before is None or not finished(cfg.output(), verb, cfg, cfg.inputs()):
        return False
    return (cfg.output() / "model/config.json").exists() and before["summary"]["versions"] == _versions(cfg)


def _versions(cfg: KnowledgeConfig) -> dict[str, str]:
    """A word a file that changes with it: of the project's own passages their content, of others what their store says of them."""
    versions = {f"own/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in _own_files()} if cfg.own else {}
    for corpus in cfg.corpora:
        for file in files_of(cfg.at(corpus)):
            with told(file):
                info: dict[str, Any] = file.fs.info(file.path)
            versions[file.uri] = f"{info.get('size')} {info.get('mtime') or info.get('etag') or info.get('updated')}"
    return versions


def _own_files() -> list[Path]:
    return sorted(PASSAGES.glob("*.yaml"))


def _passages(cfg: KnowledgeConfig, encoder: TextEncoder, left_out: Counter[str]) -> Iterator[tuple[str, Passage]]:
    """(what it came from, passage), in order: this project's own, the corpora's, the reports."""
    number = 0
    for passage in _own() if cfg.own else ():
        passage.document = number
        number += 1
        yield "this project", passage
    cut = Chunker(encoder, cfg.chunk_tokens, cfg.overlap_tokens)
    for corpus in cfg.corpora:
        where, without = cfg.at(corpus), Counter[str]()
        for document in read_corpus(where, cfg.text_fields, without):
            chunks = cut(document)
            for n, text in enumerate(chunks, 1):
                id = document.id if len(chunks) == 1 else f"{document.id}#{n}"
                yield where.name, Passage(id, document.topic, document.source, text, None, number)
            number += 1
        left_out.update(without)
    if cfg.reports:
        for passage in _reports(cfg.at(cfg.reports), left_out):
            passage.document = number
            number += 1
            yield "reports", passage


def _own() -> Iterator[Passage]:
    for file in _own_files():
        for item in yaml.safe_load(file.read_text(encoding="utf-8")):
            yield Passage(item["id"], item["topic"], item["rests_on"], " ".join(item["text"].split()), None, 0)


def _reports(cohort: Place, left_out: Counter[str]) -> Iterator[Passage]:
    """One passage a study of the train split: its findings and impression."""
    columns = ["study_id", "group_id", "report_findings", "report_impression"]
    rows = open_dataset(cohort, "cohort").table(columns, where=pyarrow.dataset.field("split") == "train")
    studies = {row["study_id"]: row for row in rows.to_pylist()}
    for study, row in sorted(studies.items()):
        text = " ".join(" ".join(part for name in columns[2:] if (part := row[name])).split())
        if text:
            yield Passage(f"{REPORT}-{study}", REPORT, REPORT, text, row["group_id"], 0)
        else:
            left_out["studies without a report"] += 1


def _once(found: Iterator[tuple[str, Passage]], left_out: Counter[str]) -> Iterator[tuple[str, Passage]]:
    """Each text once (of reports: once a patient), each under an id of its own."""
    texts: set[tuple[str, str | None]] = set()
    ids: Counter[str] = Counter()
    for kind, passage in found:
        if (passage.text, passage.group_id) in texts:
            left_out["texts that stand there twice"] += 1
            continue
        texts.add((passage.text, passage.group_id))
        if passage.id in ids:
            left_out["ids given twice, and made unique"] += 1
            given = passage.id
            while passage.id in ids:
                ids[given] += 1
                passage.id = f"{given}~{ids[given]}"
        ids[passage.id] += 1
        yield kind, passage


def _embed(encoder: TextEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each text, int64; unit vectors, float32 [texts, dim]), each distinct text once, with the progress on standard error."""
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    waiting = sorted(distinct, key=len)  # like lengths together: less padding
    tokens, vectors = np.zeros(len(distinct), np.int64), np.zeros((len(distinct), encoder.dim), np.float32)
    with tqdm(total=len(distinct), desc="knowledge", unit=" passages") as progress:
        for start in range(0, len(waiting), _AT_ONCE):
            some = waiting[start : start + _AT_ONCE]
            done, at = encoder(some), [distinct[text] for text in some]
            tokens[at], vectors[at] = done.tokens, done.embedding
            progress.update(len(some))
    where = [distinct[text] for text in texts]
    return tokens[where], vectors[where]


def _lexical(encoder: TextEncoder, passages: list[Passage]) -> Lexical:
    special = int(encoder.count_tokens([""])[0])
    documents = np.array([p.document for p in passages])
    return Lexical.build([p.text for p in passages], documents, lambda words: encoder.count_tokens(words) - special)


def _fingerprint(encoder: str, passages: list[Passage]) -> str:
    """Changes when an answer could: with the encoder, and with any passage's id, words, patient or document."""
    digest = hashlib.sha256(json.dumps([VERSION, encoder]).encode())
    for p in passages:
        digest.update(json.dumps([p.id, p.text, p.group_id, p.document]).encode())
    return digest.hexdigest()


def _write(model: Place, about: dict[str, Any], passages: list[Passage], tokens: np.ndarray, vectors: np.ndarray, lexical: Lexical) -> None:
    (model / "config.json").remove()
    (model / "README.md").write(_model_card(about).encode())
    columns = {name: [getattr(p, name) for p in passages] for name in COLUMNS if name != "tokens"}
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    group = pa.array(columns.pop("group_id"), pa.string())  # typed, where all are null
    table = pa.table(columns | {"group_id": group, "tokens": tokens, "embedding": embedding})
    fs, path = (model / about["files"]["passages"]).arrow()
    with told(model):
        pq.write_table(table, path, filesystem=fs, compression="zstd", row_group_size=10_000)
    grown(None, vectors, np.arange(len(vectors))).write(model / about["files"]["vectors"])
    lexical.write(model)
    (model / "config.json").write(json.dumps(about, indent=1).encode())


def _model_card(about: dict[str, Any]) -> str:
    sources = "\n".join(f"- {name}: {count:,}" for name, count in about["sources"].items())
    topics = ", ".join(f"{name} ({count:,})" for name, count in list(about["topics"].items())[:30])
    patients = OF_PATIENTS if about["reports"] else "It holds no patient's data unless a corpus that was read into it does."
    return f"""# Knowledge folder

{NOT_FOR_DIAGNOSIS}

{about["passages"]:,} passages, of at most {about["chunking"]["tokens"]} tokens where they were cut from longer documents:

{sources}

Topics: {topics}.

- text encoder: `{about["encoder"]["name"]}`
- each passage's words, source and vector: `passages.parquet`

The project's own passages were written for it from general knowledge of the fields that each names as its source. They are not reviewed
guidelines. {patients}
"""
