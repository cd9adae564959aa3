"""Charts -> notes -> filter -> vectors -> evidence.

    inputs = Inputs(InputsConfig(), load_text("st:all-MiniLM-L6-v2"), Knowledge(folder))
    for reading in inputs([chart]): ...

A chart becomes a short narrative in segments; each segment is embedded by itself and asks the knowledge base for passages.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
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

    def __call__(
        self, charts: Sequence[Chart], groups: Sequence[str | None] | None = None, asking: Sequence[bool] | None = None
    ) -> list[Reading]:
        """groups: the charts' patients, so that none is shown a report of their own; a served chart has none.
        asking: which of the charts fetch passages, of which knowledge there is; None: all."""
        notes = self.write(charts)
        read = self._read({s.text for note in notes for s in note.segments})  # each distinct text once, and most of them stay as they are
        fitted = self._fit(notes, {text: tokens for text, (_, tokens) in read.items()})
        read |= self._read({s.text for note, _, _ in fitted for s in note.segments} - read.keys())
        none = np.zeros((0, self.encoder.dim), np.float32)
        of = [np.stack([read[s.text][0] for s in note.segments]) if note.segments else none for note, _, _ in fitted]
        evidence = self._retrieve([note for note, _, _ in fitted], of, groups or [None] * len(charts), asking or [True] * len(charts))
        return [Reading(note, v, e, tokens, cut) for (note, tokens, cut), v, e in zip(fitted, of, evidence, strict=True)]

    def _read(self, texts: set[str]) -> dict[str, tuple[np.ndarray, int]]:
        """Of each its vector and its tokens."""
        ordered = sorted(texts)
        out = self.encoder(ordered)
        return dict(zip(ordered, zip(out.embedding, out.tokens.tolist(), strict=True), strict=True))

    def _retrieve(
        self, notes: list[Note], vectors: list[np.ndarray], groups: Sequence[str | None], asking: Sequence[bool]
    ) -> list[list[Evidence]]:
        """Only the narrative asks: what the filter took out must not come back as a passage about it."""
        if self.knowledge is None:
            return [[] for _ in notes]
        questions = [
            Question(group, [(s.name, s.text, v) for s, v in zip(note.segments, own, strict=True) if s.kind == "note"])
            for note, own, group, asks in zip(notes, vectors, groups, asking, strict=True)
            if asks
        ]
        found = iter(self.knowledge.find(questions, self.cfg.retrieval) if questions else [])
        return [list(next(found)) if asks else [] for asks in asking]

    def _fit(self, notes: list[Note], counted: Mapping[str, int]) -> list[tuple[Note, int, int]]:
        """(note, its tokens, tokens cut): no segment longer than the encoder reads, the whole no longer than asked for.

        Segments stand in order of priority, and in each the weightier parts first: what is cut is the end of the last.
        counted: tokens by text.
        """
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

        @cache
        def size(parts: int) -> int:
            return int(self.encoder.count_tokens([replace(segment, parts=segment.parts[:parts]).text])[0])

        fit = bisect_right(range(1, len(segment.parts)), room, key=size)  # more parts are never fewer tokens
        return replace(segment, parts=segment.parts[:fit]), size(fit) if fit else 0
