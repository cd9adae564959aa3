"""Asks a knowledge folder: each segment of a note fetches passages by what it means and by the words it says.

    knowledge = Knowledge(place("runs/demo/knowledge"))
    knowledge.agree(encoder_of_the_notes)
    found = knowledge.find([Question(group_id, [(name, text, embedding), ...]), ...], RetrievalConfig())

Nothing here encodes: a segment comes with its embedding, of the encoder that made the folder.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from contracts.config import Config
from contracts.errors import CxrayError
from contracts.storage import Place, told
from pipelines.knowledge.lexical import Lexical
from pipelines.search.vectors import HNSW_SEARCH, Vectors

KIND, VERSION = "knowledge", 1  # what config.json says; the version goes up when the same folder would answer otherwise
COLUMNS = ("id", "topic", "source", "text", "group_id", "document", "tokens")
OF_PATIENTS = "It holds the reports of patients of the train split: keep it where the data may be kept."

# A score is a weighted mean of three parts, each in [0, 1]: cosine, BM25 as s / (s + HALF), and the rarest name.
# Chosen by hand on the questions of benchmarks/knowledge.py, whose heading has what was tried, and on synthetic lists of medicines.
MEANING, WORDS, NAME = 0.4, 0.3, 0.3
HALF = 8.0
CANDIDATES = 64  # by meaning, and as many by words
_CELLS = 1 << 22  # segments times passages that are scored at once


class RetrievalConfig(Config):
    per_segment: Annotated[int, Field(ge=1)] = 5  # passages that one segment may fetch
    per_note: Annotated[int, Field(ge=1)] = 8
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.2
    alike: Annotated[float, Field(ge=0, le=1)] = 0.95  # of two passages with a higher cosine only the better one stays; 1 keeps all
    token_budget: Annotated[int, Field(ge=1)] = 1024  # of the encoder's tokens, all passages of a note together


@dataclass(frozen=True, slots=True)
class Question:
    """A note. segments: (name, text, unit embedding float32 [dim]) each. group_id: the row's own patient."""

    group_id: str | None
    segments: Sequence[tuple[str, str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A passage that a note fetched. score: in [0, 1], of one scale for all segments. asked_by: the segment it fits best."""

    id: str
    score: float
    asked_by: str


class Knowledge:
    """An opened knowledge folder. Raises CxrayError where there is none, or one of another version."""

    def __init__(self, where: Place) -> None:
        """where: what `cxray knowledge` made, or its `model/` by itself."""
        self.where = where
        self._model = model = where / "model" if (where / "model" / "config.json").exists() else where
        about = _about(where, model)
        self._about, files = about, about["files"]
        self.encoder: dict[str, Any] = about["encoder"]
        self.fingerprint: str = about["fingerprint"]
        fs, path = (model / files["passages"]).arrow()
        with told(model):
            table = pq.read_table(path, filesystem=fs, columns=list(COLUMNS)).combine_chunks()
        self.ids: list[str] = table["id"].to_pylist()
        self._texts, self._topics, self._sources = table["text"], table["topic"], table["source"]
        self._tokens: list[int] = table["tokens"].to_pylist()
        self._place = {id: place for place, id in enumerate(self.ids)}
        groups = table["group_id"].to_pylist()
        self._groups = {group: number for number, group in enumerate(dict.fromkeys(g for g in groups if g is not None))}
        self._group = np.array([self._groups.get(g, -1) for g in groups], np.int64)
        self._largest = np.bincount(self._group[self._group >= 0], minlength=1)  # passages of each patient
        self._document = table["document"].to_numpy()
        self._vectors = Vectors.read(model / files["vectors"])
        self._matrix = self._vectors.of(np.arange(len(self._vectors)))
        self._lexical = Lexical.read(model, len(self.ids))
        if not len(self._vectors) == len(self.ids) == about["passages"]:
            raise CxrayError(f"{where}: its files are not of one run; make it again with `cxray knowledge`")

    def __len__(self) -> int:
        return len(self.ids)

    def agree(self, encoder: Mapping[str, Any]) -> None:
        """Raises CxrayError unless `encoder` (name, fingerprint, dim) is the one whose vectors are in here."""
        if any(encoder[key] != self.encoder[key] for key in ("fingerprint", "dim")):
            ours, theirs = (f"`{e['name']}` ({e['dim']} numbers, {str(e['fingerprint'])[:12]})" for e in (self.encoder, encoder))
            raise CxrayError(f"{self.where}: made with {ours}, asked with {theirs}; use one encoder, or make the folder again")

    def text(self, id: str) -> str:
        return self._texts[self._place[id]].as_py()

    def topic(self, id: str) -> str:
        return self._topics[self._place[id]].as_py()

    def source(self, id: str) -> str:
        return self._sources[self._place[id]].as_py()

    @property
    def told(self) -> str:
        """What is in it, for the card of a model that carries it."""
        sources = ", ".join(f"{name}: {count:,}" for name, count in self._about["sources"].items())
        said = f"`knowledge/` holds {len(self):,} passages ({sources}), each under the licence of its source."
        return f"{said} {OF_PATIENTS}" if self._about["reports"] else said

    def copy(self, folder: Path) -> None:
        """All that answers, into a new folder on this disk, which can be opened in the place of this one."""
        folder.mkdir()
        files = self._about["files"]
        for name in ("README.md", files["passages"], files["vectors"], *files["lexical"], "config.json"):
            (folder / name).write_bytes((self._model / name).read())

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        """float32 [ids, dim], unit length."""
        return self._matrix[[self._place[id] for id in ids]]

    def find(self, questions: Sequence[Question], cfg: RetrievalConfig) -> list[list[Evidence]]:
        """For each note its passages, best first: each once, under the segment that it fits best, and never of the row's own patient.

        A segment fetches at most one passage of a document, for chunks of one repeat each other. An answer does not depend on which
        other notes are asked with it. Raises CxrayError for embeddings of another width.
        """
        segments = [(text, vector) for question in questions for _, text, vector in question.segments]
        groups = [self._groups.get(q.group_id, -1) if q.group_id is not None else -1 for q in questions for _ in q.segments]
        ranked = self._ranked(segments, np.array(groups, np.int64), cfg)
        found = []
        for question in questions:
            offers = [
                (-score, place, number)
                for number, _ in enumerate(question.segments)
                for score, place in next(ranked)
            ]  # fmt: skip
            found.append(self._chosen(sorted(offers), [name for name, _, _ in question.segments], cfg))
        return found

    def _chosen(self, offers: list[tuple[float, int, int]], names: list[str], cfg: RetrievalConfig) -> list[Evidence]:
        """Of (minus score, passage, segment), best first, those that stay."""
        evidence: list[Evidence] = []
        seen: set[int] = set()
        documents: set[tuple[int, int]] = set()
        room, left = [cfg.per_segment] * len(names), cfg.token_budget
        chosen = np.empty((cfg.per_note, self._matrix.shape[1]), np.float32)
        for minus, place, segment in offers:
            if len(evidence) == cfg.per_note:
                break
            of = (segment, int(self._document[place]))
            if place in seen or not room[segment] or of in documents or self._tokens[place] > left:
                continue
            vector = self._matrix[place]
            if evidence and (chosen[: len(evidence)] @ vector).max() > cfg.alike + 1e-6:
                continue
            chosen[len(evidence)] = vector
            evidence.append(Evidence(self.ids[place], -minus, names[segment]))
            seen.add(place)
            documents.add(of)
            room[segment] -= 1
            left -= self._tokens[place]
        return evidence

    def _ranked(
        self, segments: list[tuple[str, np.ndarray]], groups: np.ndarray, cfg: RetrievalConfig
    ) -> Iterator[list[tuple[float, int]]]:
        """For each segment (score, passage) of its candidates that reach `min_score` and are not of its patient."""
        block = max(1, _CELLS // max(len(self), 1))
        for start in range(0, len(segments), block):
            some = segments[start : start + block]
            wide = self._matrix.shape[1]
            if other := next((len(vector) for _, vector in some if len(vector) != wide), None):
                raise CxrayError(
                    f"{self.where}: its vectors, of `{self.encoder['name']}`, have {wide} numbers; a segment came with {other}"
                )
            query = np.stack([np.asarray(vector, np.float32) for _, vector in some])
            yield from self._scored([text for text, _ in some], query, groups[start : start + block], cfg.min_score)

    def _scored(self, texts: list[str], query: np.ndarray, group: np.ndarray, least: float) -> Iterator[list[tuple[float, int]]]:
        said, name = self._lexical.ask(texts)
        lexical = WORDS * said / (said + HALF) + NAME * name
        # A patient's own passages are left out below, so as many more are fetched here.
        count = min(CANDIDATES + int(self._largest[group[group >= 0]].max(initial=0)), len(self))
        both = np.sort(np.concatenate([self._near(query, count), np.argpartition(-lexical, count - 1, axis=1)[:, :count]], axis=1), axis=1)
        # FAISS's and BLAS's last digits depend on how many ask at once; einsum's do not, so that serving one note equals training on all.
        cosine = np.einsum("skd,sd->sk", self._matrix[both], query)
        score = MEANING * np.clip(cosine, 0, 1) + np.take_along_axis(lexical, both, axis=1)
        score = np.minimum(score.astype(np.float64).round(6), 1)
        out = (score < least) | ((self._group[both] == group[:, None]) & (group[:, None] >= 0))
        out[:, 1:] |= both[:, 1:] == both[:, :-1]
        for row, scores, places in zip(~out, score, both):
            yield list(zip(scores[row].tolist(), places[row].tolist()))

    def _near(self, query: np.ndarray, count: int) -> np.ndarray:
        """Passages nearest in meaning: int [segments, count]."""
        inner = faiss.downcast_index(self._vectors.index.index)
        graph = faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * count)) if self._vectors.kind == "HNSW" else None
        return np.maximum(inner.search(query, count, params=graph)[1], 0)  # a graph may find fewer, and says -1


def _about(where: Place, model: Place) -> dict[str, Any]:
    wrong = CxrayError(f"{where}: no knowledge folder here; make one with `cxray knowledge`")
    try:
        about = json.loads((model / "config.json").read())
    except CxrayError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise wrong from None
        raise
    except ValueError:
        raise wrong from None
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise wrong
    if about["version"] != VERSION:
        raise CxrayError(f"{where}: made by another version of cxray; make it again with `cxray knowledge`")
    return about
