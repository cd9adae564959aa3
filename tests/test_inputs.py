"""The one way in: a batch and a single chart read alike, long notes are cut from their end, and a row's own patient never comes back."""

import numpy as np
import pytest

from contracts.chart import Chart
from contracts.config import load
from contracts.errors import CxrayError
from contracts.storage import place
from models.encoders.base import TextEncoder
from pipelines.inputs.notes import NOTE_SEGMENTS
from pipelines.inputs.reading import Inputs, InputsConfig
from pipelines.knowledge import base
from pipelines.knowledge.retrieve import Knowledge


class Words(TextEncoder):
    """A bag of words in 64 numbers; a token a word."""

    name, dim, token_dim, joint, fingerprint = "words:", 64, 0, False, "words-1"

    def __init__(self, context: int = 0) -> None:
        self.context = context

    def count_tokens(self, texts):
        return np.array([len(t.split()) for t in texts], np.int64)

    def embed(self, texts):
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.lower().split():
                row[sum(word.encode()) % self.dim] += 1
        return vectors

    def embed_tokens(self, texts):
        raise NotImplementedError


CHARTS = [
    Chart(
        age=67, sex="F", chief_complaint="Fever, ?PNA", acuity=2,
        triage={"hours": -2, "temperature": 38.9, "heartrate": 118, "o2sat": 91},  # pyright: ignore[reportArgumentType]
        medicines=[{"name": n, "kind": "reconciled"} for n in ("aspirin", "metformin", "lisinopril")],  # pyright: ignore[reportArgumentType]
        labs=[{"name": "White Blood Cells", "value": 16.5, "unit": "K/uL", "abnormal": True, "hours": -1}],  # pyright: ignore[reportArgumentType]
        history=[{"code": "I10", "version": 10, "title": "Essential (primary) hypertension", "hours": -9000}],  # pyright: ignore[reportArgumentType]
    ),
    Chart(age=40, sex="M", chief_complaint="Ankle pain", acuity=4),
    Chart(),
]  # fmt: skip


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory) -> Knowledge:
    out = tmp_path_factory.mktemp("knowledge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_text", lambda *_, **__: Words())
        base.run(load(base.KnowledgeConfig, {"out": str(out)}))
    return Knowledge(place(out / "knowledge"))


def reads(knowledge=None, encoder=None, **settings):
    return Inputs(load(InputsConfig, settings), encoder or Words(), knowledge)


def test_a_chart_reads_the_same_alone_and_in_a_batch(knowledge):
    together = reads(knowledge)(CHARTS)
    for chart, one in zip(CHARTS, together, strict=True):
        alone = reads(knowledge)([chart])[0]
        assert alone.note == one.note
        assert alone.evidence == one.evidence
        np.testing.assert_array_equal(alone.vectors, one.vectors)


def test_the_narrative_asks_and_the_raw_segment_does_not(knowledge):
    reading = reads(knowledge)(CHARTS[:1])[0]
    assert {s.kind for s in reading.note.segments} == {"raw", "note"}
    assert reading.evidence
    assert {e.asked_by for e in reading.evidence} <= set(NOTE_SEGMENTS)
    assert "PNA" in reading.note.segments[0].text  # as charted
    assert reading.note.removed == {"finding:Pneumonia": 1}
    assert not any("PNA" in s.text or "neumonia" in s.text for s in reading.note.segments if s.kind == "note")


def test_nothing_charted_says_so_and_asks_nothing_of_the_answer(knowledge):
    reading = reads(knowledge)([Chart()])[0]
    assert [s.text for s in reading.note.segments] == ["Nothing is known of this patient before the study."]


def test_a_note_too_long_loses_the_end_of_its_last_segments():
    whole = reads()(CHARTS[:1])[0]
    assert whole.cut == 0
    short = reads(note_tokens=whole.tokens - 3)(CHARTS[:1])[0]
    assert short.tokens <= whole.tokens - 3
    assert short.tokens + short.cut == whole.tokens
    notes = [[s for s in r.note.segments if s.kind == "note"] for r in (whole, short)]
    assert [s.name for s in notes[1]] == [s.name for s in notes[0]][: len(notes[1])]
    assert notes[1][0] == notes[0][0]  # the presentation goes last


def test_no_segment_is_longer_than_the_encoder_reads():
    reading = reads(encoder=Words(context=9))(CHARTS[:1])[0]
    assert max(len(s.text.split()) for s in reading.note.segments) <= 9
    assert reading.cut > 0


class Counted(Words):
    """Remembers of how many texts it was asked the tokens."""

    def __init__(self, context: int) -> None:
        super().__init__(context)
        self.sizes: list[int] = []

    def count_tokens(self, texts):
        self.sizes.append(len(texts))
        return super().count_tokens(texts)


def test_a_segment_far_too_long_is_cut_after_few_counts():
    long = Chart(medicines=[{"name": f"medicine{n}"} for n in range(1200)])  # pyright: ignore[reportArgumentType]
    encoder = Counted(context=100)
    (reading,) = reads(encoder=encoder)([long])
    whole = reads()([long])[0].note.segments[0].parts
    kept = reading.note.segments[0].parts
    assert kept == whole[: len(kept)] and len(" ".join(kept).split()) <= 100 < len(" ".join(whole[: len(kept) + 1]).split())
    assert sum(encoder.sizes) < 15 and reading.tokens + reading.cut == len(" ".join(whole).split())


def test_only_charts_that_ask_are_given_passages(knowledge):
    some = reads(knowledge)([CHARTS[0], CHARTS[0]], asking=[False, True])
    (alone,) = reads(knowledge)(CHARTS[:1])
    assert not some[0].evidence and alone.evidence and some[1].evidence == alone.evidence


def test_knowledge_of_another_encoder_is_refused(knowledge):
    other = Words()
    other.fingerprint = "words-2"
    with pytest.raises(CxrayError, match="words"):
        reads(knowledge, other)


def test_rows_hold_ids_of_passages_and_no_words_of_them(knowledge):
    rows = reads(knowledge)(CHARTS[:1])[0].rows()
    passages = [r for r in rows if r["kind"] == "passage"]
    assert passages
    assert not any(r.get("text") or r.get("embedding") is not None for r in passages)
    assert all(knowledge.text(r["id"]) for r in passages)
