"""Charts -> notes -> filter -> vectors -> evidence.

    inputs = Inputs(InputsConfig(), load_text("st:all-MiniLM-L6-v2"), Knowledge(folder))
    for reading in inputs([chart]): ...

A chart becomes a short narrative in segments; each segment is embedded by itself and asks the knowledge base for passages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from contracts.chart import Chart
from contracts.config import Config
from models.encoders.base import TextEncoder
from pipelines.inputs.notes import Note, NoteConfig, NoteWriter, Segment
from pipelines.knowledge.retrieve import Evidence, Knowledge, Question, RetrievalConfig


class InputsConfig(Config):
    notes: NoteConfig = NoteConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    note_tokens: int | None = None  # of a whole note at most; each segment fits the encoder's context anyhow


@dataclass(frozen=True)
class Reading:
    """What the models get to read of one chart. vectors: float32 [len(note.segments), dim]; evidence: best first."""

    note: Note
    vectors: np.ndarray
    evidence: Sequence[Evidence]
    tokens: int  # of the narrative
    cut: int  # tokens of it that did not fit

    def rows(self) -> list[dict[str, Any]]:
        """The `segments` column of TEXTS."""
        said = [
            {"kind": s.kind, "name": s.name, "text": s.text, "embedding": vector}
            for s, vector in zip(self.note.segments, self.vectors, strict=True)
        ]
        return said + [{"kind": "passage", "id": e.id, "asked_by": e.asked_by, "score": e.score} for e in self.evidence]


class Inputs:
    """Holds an encoder and a knowledge base; deterministic, and the same for a batch as for its charts one by one."""

    def __init__(self, cfg: InputsConfig, encoder: TextEncoder, knowledge: Knowledge | None = None) -> None:
        """Raises CxrayError where the knowledge was embedded by another encoder."""
        if knowledge is not None:
            knowledge.agree({"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim})
        self.cfg, self.encoder, self.knowledge = cfg, encoder, knowledge
        self.write = NoteWriter(cfg.notes)

    def __call__(self, charts: Sequence[Chart], groups: Sequence[str | None] | None = None) -> list[Reading]:
        """groups: the charts' patients, so that none is shown a report of their own; a served chart has none."""
        fitted = self._fit(self.write(charts))
        texts = [s.text for note, _, _ in fitted for s in note.segments]
        vectors = self.encoder(texts).embedding  # each distinct text once
        ends = list(accumulate(len(note.segments) for note, _, _ in fitted))
        of = [vectors[end - len(note.segments) : end] for end, (note, _, _) in zip(ends, fitted, strict=True)]
        evidence = self._retrieve([note for note, _, _ in fitted], of, groups or [None] * len(charts))
        return [Reading(note, v, e, tokens, cut) for (note, tokens, cut), v, e in zip(fitted, of, evidence, strict=True)]

    def _retrieve(self, notes: list[Note], vectors: list[np.ndarray], groups: Sequence[str | None]) -> list[list[Evidence]]:
        """Only the narrative asks: what the filter took out must not come back as a passage about it."""
        if self.knowledge is None:
            return [[] for _ in notes]
        questions = [
            Question(group, [(s.name, s.text, v) for s, v in zip(note.segments, own, strict=True) if s.kind == "note"])
            for note, own, group in zip(notes, vectors, groups, strict=True)
        ]
        return self.knowledge.find(questions, self.cfg.retrieval)

    def _fit(self, notes: list[Note]) -> list[tuple[Note, int, int]]:
        """(note, its tokens, tokens cut): no segment longer than the encoder reads, the whole no longer than asked for.

        Segments stand in order of priority, and in each the weightier parts first: what is cut is the end of the last.
        """
        counted = self._count({s.text for note in notes for s in note.segments})
        context = self.encoder.context or None
        fitted = []
        for note in notes:
            kept, tokens, cut = [], 0, 0
            for segment in note.segments:
                told = segment.kind == "note"  # the raw segment stands beside the narrative, not in it
                left = None if self.cfg.note_tokens is None or not told else self.cfg.note_tokens - tokens
                room = min((r for r in (context, left) if r is not None), default=None)
                short, size = self._shortened(segment, counted[segment.text], room)
                if told:
                    tokens, cut = tokens + size, cut + counted[segment.text] - size
                if short.parts:
                    kept.append(short)
            fitted.append((replace(note, segments=tuple(kept)), tokens, cut))
        return fitted

    def _shortened(self, segment: Segment, tokens: int, room: int | None) -> tuple[Segment, int]:
        """The segment without as many of its last parts as it takes, and its tokens."""
        if room is None or tokens <= room:
            return segment, tokens
        starts = [replace(segment, parts=segment.parts[:n]) for n in range(1, len(segment.parts))]
        sizes = self.encoder.count_tokens([s.text for s in starts]) if starts else np.zeros(0, np.int64)
        fit = int((sizes <= room).sum())  # more parts are never fewer tokens
        return (starts[fit - 1], int(sizes[fit - 1])) if fit else (replace(segment, parts=()), 0)

    def _count(self, texts: set[str]) -> dict[str, int]:
        ordered = sorted(texts)
        return dict(zip(ordered, self.encoder.count_tokens(ordered).tolist(), strict=True)) if ordered else {}
