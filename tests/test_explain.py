"""What a network looked at is shown as it was: where the attention lay, of test only, misses too, and with its words kept off the log."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from test_predict import PASSAGES, SPLITS, chart, dataset, jpeg, out, predictor, train  # noqa: F401 - two are fixtures

from contracts.config import load as read
from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.pages import Page
from contracts.schema import IMAGES, texts_schema
from contracts.storage import place
from pipelines.images.decode import Limits
from pipelines.images.job import ImagesConfig, picture
from pipelines.overview import explained, judged
from trainers.explain import ExplainConfig, choose, run, unchanged
from trainers.overlay import overlay

GREY = np.full((518, 518), 100, np.uint8)


def colour(drawn: bytes) -> np.ndarray:
    """How far each pixel is from grey."""
    return np.ptp(pixels(drawn).astype(int), axis=2)


def pixels(drawn: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(drawn, np.uint8), cv2.IMREAD_COLOR))


def attention(grid: int, at: tuple[int, int], times: float) -> np.ndarray:
    """One part with `times` an even share; the others share the rest."""
    shares = np.full((grid, grid), (1 - times / grid**2) / (grid**2 - 1), np.float32)
    shares[at] = times / grid**2
    return shares


@pytest.mark.parametrize("grid", [7, 14, 37])
@pytest.mark.parametrize("at", [(0, 0), (2, 4), (6, 6), (0, -1), (-1, -1)])
def test_the_hottest_pixel_lies_in_the_strongest_part(grid, at):
    drawn = overlay(GREY, attention(grid, at, 6.0))
    side = 518 / grid
    row, column = (i % grid for i in at)
    y, x = np.unravel_index(colour(drawn).argmax(), GREY.shape)
    assert row * side <= y < (row + 1) * side and column * side <= x < (column + 1) * side


@pytest.mark.parametrize("at", [(0, 0), (3, 5), (6, 6)])
def test_the_strongest_part_is_framed_for_those_who_see_no_colour(at):
    white = np.argwhere((pixels(overlay(GREY, attention(7, at, 1.2))) == 255).all(axis=2))
    centre, (low, high) = (np.array(at) + 0.5) * 74, (white.min(0), white.max(0))
    assert (np.abs(low - (centre - 37)) <= 4).all() and (np.abs(high - (centre + 37)) <= 4).all()
    inside = ((white > low + 3) & (white < high - 3)).all(axis=1)
    assert not inside.any(), "a frame, and no patch over what it frames"


def test_a_picture_keeps_its_size_and_is_bare_where_nothing_was_looked_at():
    noise = np.random.default_rng(0).integers(0, 255, (400, 518), np.uint8)
    bare = np.repeat(noise[..., None], 3, axis=2)
    assert (pixels(overlay(noise, np.zeros((7, 7), np.float32))) == bare).all()
    assert (pixels(overlay(noise, np.full((7, 7), 1 / 49, np.float32))) == bare).all(), "an even share everywhere points at nothing"
    drawn = pixels(overlay(noise, attention(7, (1, 1), 5.0)))
    assert drawn.shape == (400, 518, 3) and (drawn[200:, 260:] == bare[200:, 260:]).all()


def test_attention_that_is_almost_even_looks_so():
    almost, clear = (colour(overlay(GREY, attention(7, (3, 3), times))).max() for times in (1.05, 3.0))
    assert almost < clear / 2
    assert colour(overlay(GREY, attention(7, (3, 3), 3.0), opacity=0.2)).max() < clear / 2


@pytest.mark.parametrize(
    ("grey", "patches", "opacity"),
    [(GREY[..., None], (7, 7), 0.5), (GREY.astype(np.float32), (7, 7), 0.5), (GREY, (49,), 0.5), (GREY, (0, 0), 0.5), (GREY, (7, 7), 1.5)],
)
def test_what_is_no_picture_is_not_drawn_on(grey, patches, opacity):
    with pytest.raises(ValueError, match="not a picture to draw on"):
        overlay(grey, np.zeros(patches, np.float32), opacity)


def chosen(scores, labels, fetched=None, studies=3, groups=None) -> list[tuple[int, int, bool]]:
    scores, labels = np.array(scores, float), np.array(labels, float)
    known = np.ones(len(scores), bool) if fetched is None else np.array(fetched)
    found = choose(scores, labels, np.full(scores.shape[1], 0.5), groups or [f"p{i}" for i in range(len(scores))], known, studies)
    return [(c.row, c.finding, c.right) for c in found]


def test_the_surest_right_calls_are_shown_and_the_worst_wrong_one():
    scores = [[0.9, 0.1], [0.8, 0.1], [0.1, 0.7], [0.3, 0.1], [0.02, 0.1], [0.1, 0.9]]
    labels = [[1, 0], [1, 0], [0, 1], [1, 0], [1, 0], [0, 0]]
    assert chosen(scores, labels) == [(0, 0, True), (2, 1, True), (4, 0, False)], "of another finding each, and the miss of 0.02"
    assert chosen(scores, labels, studies=1) == [(0, 0, True)]
    assert chosen(scores, labels, studies=2) == [(0, 0, True), (4, 0, False)]
    assert chosen(scores, labels, fetched=[0, 1, 1, 1, 0, 1]) == [(1, 0, True), (2, 1, True), (5, 1, False)], "with passages to read"
    assert chosen(scores, labels, groups=["a", "b", "a", "a", "c", "d"]) == [(0, 0, True), (4, 0, False), (5, 1, False)], "no patient twice"
    assert chosen([[0.9, 0.9], [0.8, 0.1]], [[1, 0], [1, 0]], studies=1) == [(1, 0, True)], "a study without other wrong calls first"


def test_where_there_is_not_enough_of_one_kind_the_other_fills_up():
    assert chosen([[0.9, 0], [0, 0.9], [0.8, 0]], [[1, 0], [0, 1], [0, 0]], studies=2) == [(0, 0, True), (2, 0, False)]
    assert chosen([[0.9, 0], [0, 0.9]], [[1, 0], [0, 1]]) == [(0, 0, True), (1, 1, True)]
    assert chosen([[0.9, 0], [0, 0.9]], [[0, 0], [0, 0]]) == [(0, 0, False), (1, 1, False)]
    nothing = np.nan
    assert chosen([[0.9, 0.1], [0.2, 0.3]], [[nothing, 0], [nothing, nothing]]) == [], "what is not known is neither right nor wrong"


@pytest.fixture(scope="module")
def whole(out) -> Path:  # noqa: F811
    """The data sets and the network of test_predict, and the stored pictures."""
    keys = [{"row_id": f"d{n}", "group_id": f"p{n}", "split": split} for n, split in enumerate(SPLITS)]
    rows = [key | picture(jpeg(n), ImagesConfig(), Limits()) for n, key in enumerate(keys)]
    dataset(out / "images", pa.Table.from_pylist(rows, schema=IMAGES.columns), IMAGES)
    return out


def explain(whole: Path, into: Path, **settings) -> tuple[dict, str]:
    run(read(ExplainConfig, {"out": str(whole), "into": str(into), **settings}))
    return json.loads((into / "explained.json").read_text()), (into / "report.html").read_text()


def test_what_is_shown_is_what_the_model_says_of_studies_of_test(whole, predictor, tmp_path, caplog, capsys):  # noqa: F811
    with caplog.at_level(logging.DEBUG):
        found, page = explain(whole, tmp_path / "x")
    [study] = found["studies"]  # d7 has no labels
    assert study["row_id"] == "d6" and found["split"] == "test"
    said = predictor.predict(jpeg(6), chart(6), attention=True)
    assert {f["name"]: f["probability"] for f in study["findings"]} == pytest.approx(said.probabilities, abs=1e-6)
    assert [f["label"] for f in study["findings"]] == [0, 1]
    np.testing.assert_allclose(study["patches"], said.attention.patches, atol=1e-6)
    assert [s.get("id") or s["name"] for s in study["read"]] == list(said.attention.read)
    assert [s["share"] for s in study["read"]] == pytest.approx(list(said.attention.read.values()), abs=1e-6)
    assert sum(s["share"] for s in study["read"]) <= 1 + 1e-5 and np.sum(study["patches"]) == pytest.approx(1, abs=1e-5)
    assert {s["text"] for s in study["read"] if s["kind"] == "passage"} <= set(PASSAGES.values())
    assert pixels((tmp_path / "x" / study["picture"]).read_bytes()).shape == (518, 2 * 518 + 12, 3)
    logged = caplog.text + "".join(capsys.readouterr())
    for segment in study["read"]:
        assert segment["text"] in page.replace("&#39;", "'") and segment["text"] not in logged
    assert "of patients" in page and "synthetic" not in page and "For research, not for diagnosis." in page
    assert "not calibrated" in page


def test_a_synthetic_cohort_is_called_so(whole, tmp_path):
    (tmp_path / "synth.json").write_text("{}")
    _, page = explain(whole, tmp_path / "x", root=str(tmp_path))
    assert "synthetic" in page and "of patients" not in page


def test_thresholds_are_the_calibrations_and_a_new_one_makes_the_page_anew(whole, tmp_path):
    train(whole, {"into": "calibrated"})
    cfg = read(ExplainConfig, {"out": str(whole), "into": str(tmp_path / "x"), "run": "calibrated"})
    run(cfg)
    assert unchanged("explain", cfg)
    file = whole / "calibrated/model/calibration.json"
    for threshold, verdicts in ((1e-6, "Edema, false alarm|Pneumonia, found"), (1 - 1e-6, "Pneumonia, missed")):
        fitted = {"temperature": 2.0, "threshold": threshold, "fitted": True}
        file.write_text(json.dumps({"Edema": fitted, "Pneumonia": fitted}))
        assert not unchanged("explain", cfg)
        found, page = explain(whole, tmp_path / "x", run="calibrated")
        assert {f["threshold"] for f in found["studies"][0]["findings"]} == {threshold} and found["calibrated"]
        assert any(f"Study 1: {verdict}" in page for verdict in verdicts.split("|")) and "not calibrated" not in page
        assert unchanged("explain", cfg)


def test_a_note_that_fetched_nothing_has_no_passages(whole, tmp_path):
    texts = open_dataset(place(whole / "texts"), "texts")
    rows = [row | {"segments": [s for s in row["segments"] if s["kind"] != "passage"]} for row in texts.table().to_pylist()]
    about = {name: texts.manifest[name] for name in ("encoder", "knowledge", "reading")}
    dataset(whole / "bare", pa.Table.from_pylist(rows, schema=texts_schema(384).columns), texts_schema(384), **about)
    train(whole, {"texts": "bare", "into": "bare-run"})
    found, page = explain(whole, tmp_path / "x", run="bare-run")
    assert {s["kind"] for s in found["studies"][0]["read"]} == {"note"} and "fetched no passages" in page


def test_a_network_of_the_image_alone_and_one_of_the_chart_alone(whole, tmp_path):
    train(whole, {"modalities": ["image"], "into": "seeing"})
    found, page = explain(whole, tmp_path / "x", run="seeing")
    assert found["studies"][0]["read"] == [] and "no text for it to read" in page
    assert np.sum(found["studies"][0]["patches"]) == pytest.approx(1, abs=1e-5)
    train(whole, {"modalities": ["text", "clinical"], "into": "reading"})
    found, page = explain(whole, tmp_path / "y", run="reading")
    assert found["studies"][0]["patches"] is None and "Where the network looked is not shown" in page
    assert pixels((tmp_path / "y/1.png").read_bytes()).shape == (518, 518, 3)


def _without_d6(whole: Path, folder: Path) -> None:
    rows = open_dataset(place(whole / "images"), "images").table().to_pylist()
    dataset(folder / "images", pa.Table.from_pylist([r for r in rows if r["row_id"] != "d6"], schema=IMAGES.columns), IMAGES)


def _spoilt(whole: Path, folder: Path) -> None:
    rows = [row | {"image": b"no picture"} for row in open_dataset(place(whole / "images"), "images").table().to_pylist()]
    dataset(folder / "images", pa.Table.from_pylist(rows, schema=IMAGES.columns), IMAGES)


@pytest.mark.parametrize(
    ("spoil", "settings", "sentence"),
    [
        (None, {"run": "cohort"}, "no finished `cxray train` here"),
        (None, {"run": "nowhere"}, "no finished `cxray train` here"),
        (None, {"images": "nowhere"}, "no finished images here"),
        (None, {"images": "features"}, "holds features, where images is wanted"),
        (_without_d6, {}, "1 of the 1 studies to show are not there"),
        (_spoilt, {}, "holds a picture that cannot be read"),
    ],
)
def test_what_is_not_there_is_said(whole, tmp_path, spoil, settings, sentence):
    if spoil:
        spoil(whole, tmp_path)
        settings = {"images": str(tmp_path / "images")}
    with pytest.raises(CxrayError, match=sentence):
        explain(whole, tmp_path / "x", **settings)
    assert not (tmp_path / "x/report.html").exists()


def test_a_run_of_another_task_is_refused(whole, tmp_path):
    told = json.loads((whole / "fusion/run.json").read_text())
    told["config"]["task"] = "report"
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(CxrayError, match="a run of the task 'report'"):
        explain(whole, tmp_path / "x", run=str(tmp_path))


def test_the_overview_asks_for_what_was_not_explained(tmp_path):
    with pytest.raises(CxrayError, match="no finished `cxray explain` here"):
        explained.show(Page("", ""), place(tmp_path))


def test_the_overview_shows_the_calibration(tmp_path):
    one = {"value": 0.25, "low": 0.125, "high": 0.5}
    measures = dict.fromkeys((*judged.MEASURES, *judged.ERRORS), one)
    findings = {"Edema": measures | {"n_pos": 7, "ece": {"value": 0.0625, "low": 0.0, "high": 0.125}}, "Fracture": measures | {"n_pos": 0}}
    findings["Fracture"]["auroc"] = {"value": None, "low": None, "high": None}
    fitted = {name: {"temperature": 0.5, "threshold": 0.5, "fitted": name == "Edema"} for name in findings}
    test = {"studies": 9, "patients": 8, "macro": measures, "findings": findings}
    (tmp_path / "metrics.json").write_text(json.dumps({"test": test, "calibration": fitted, "warnings": ["Look."]}))
    p = Page("", "")
    judged.network(p, place(tmp_path))
    how_good, how_sure = ([[text for text, _ in row] for row in part["rows"]] for part in p.parts)
    assert how_good[2][:3] == ["Fracture", "0", "not measured"] and p.parts[0]["note"].endswith("Look.")
    assert how_sure[1][:4] == ["Edema", "0.500", "0.25 (0.12 to 0.50)", "0.06 (0.00 to 0.12)"]
    assert how_sure[2][1] == "not fitted"
