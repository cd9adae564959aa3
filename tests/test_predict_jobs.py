"""`cxray predict` as a job: a cohort's splits, and any files; cut short, gone on with, refused."""
# ruff: noqa: F811 - fixtures of test_predict.py are arguments here

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_predict import SPLITS, changed, chart, dataset, jpeg, out, patient, predictor, train  # noqa: F401 - two are fixtures

from contracts.chart import Chart
from contracts.config import load as read
from contracts.dataset import open_dataset
from contracts.errors import CxrayError, RowError
from contracts.schema import COHORT, features_schema
from contracts.storage import place
from pipelines.pool import EncoderResources
from pipelines.verify import verify
from trainers import predict
from trainers.engine.data import Rows
from trainers.items import items
from trainers.predict import PredictConfig, predict_files, run
from trainers.predictor import Model, load
from trainers.scored import scored
from trainers.sources import FusionConfig, Sources

ONE = EncoderResources(actors=1)


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
    changed("encoders.text.fingerprint", "x")(tmp_path / "fusion")
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
