"""The ablation: right verdicts on predictions made by hand, a control that reads another patient's passages, and no work done twice."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from contracts.config import load, merge
from contracts.dataset import open_dataset, publish
from contracts.errors import CxrayError
from contracts.schema import COHORT, Schema, features_schema, texts_schema
from contracts.storage import Place, place
from evaluation.predictions import Predictions, read
from evaluation.verdict import ALL, MANY, judged
from models.mdfnet import KINDS
from pipelines.verify import verify
from trainers import ablate, fusion, sources
from trainers.ablate import AblateConfig, Bench, exchanged, run
from trainers.engine import Fitted
from trainers.evidence import evidence, looked_at
from trainers.scored import scored

KNOWN, NOTE, IMAGE, OTHERS = "image + note + knowledge", "image + note", "image only", "image + note + shuffled knowledge"
FINDINGS = ("Edema", "Pneumonia", "Fracture")


# ---- the verdict, on predictions made by hand ----


def said(signal: float, seeds: int = 3, variant: int = 0, patients: int = 300) -> list[Predictions]:
    """What a variant that knows the labels so well says of two studies a patient."""
    rng = np.random.default_rng(1)
    n = 2 * patients
    labels, hard = (rng.random((n, 3)) < 0.3).astype(float), rng.normal(size=(n, 3))
    groups, studies = np.arange(n) // 2, np.array([f"s{i:04d}" for i in range(n)])
    made = []
    for seed in range(seeds):
        z = signal * labels + hard + 0.3 * np.random.default_rng([seed, variant]).normal(size=labels.shape)
        made.append(Predictions("m", FINDINGS, studies, groups.astype(str), np.full(n, "test"), 1 / (1 + np.exp(-z)), labels))
    return made


def verdict(known: float, note: float = 1.0, others: float = 1.0, **more: Any) -> dict[str, Any]:
    made = {IMAGE: said(0.6, variant=1, **more), NOTE: said(note, variant=2, **more)}
    made |= {KNOWN: said(known, variant=3, **more), OTHERS: said(others, variant=4, **more)}
    many = np.arange(len(made[KNOWN][0].studies)) % 3 == 0
    return judged(made, KNOWN, [OTHERS], {"look-alikes": FINDINGS[:2], "rare findings": ()}, many, resamples=500)


def test_knowledge_that_helps_is_said_to_help_and_shuffled_knowledge_is_not():
    found = verdict(1.8)
    assert found["knowledge_gain_low"] > 0 >= found["shuffled_gain_low"]
    assert found["answer"].startswith(
        f"{KNOWN} helps: it is better than image only and image + note; least it gains over image + note, +0."
    )
    assert f"{OTHERS} is not shown to help: it is better than image only, and not shown to differ from image + note" in found["answer"]
    assert set(found["gains"]) == {ALL, "look-alikes", MANY}, "what has no finding of both classes is left out"
    assert next(c["studies"] for c in found["comparisons"] if c["subset"] == MANY) == 200
    assert found["gains"]["look-alikes"]["knowledge"] > 0
    first = next(c for c in found["comparisons"] if c["baseline"] == NOTE and c["subset"] is None)
    apart = first["auroc"]["value"] - first["baseline_auroc"]["value"]
    assert first["difference"]["value"] == pytest.approx(apart) == pytest.approx(np.mean(first["by_seed"]))
    assert found["auroc"][KNOWN]["macro"] == pytest.approx(np.mean([found["auroc"][KNOWN][f] for f in FINDINGS]))


def test_knowledge_that_hurts_and_knowledge_of_which_nothing_can_be_told():
    hurts = verdict(0.7)
    assert f"{KNOWN} does not help: it is" in hurts["answer"]
    assert "worse than image + note" in hurts["answer"]
    assert hurts["knowledge_gain_low"] < 0
    few = verdict(1.0, note=0.98, patients=12)
    assert few["answer"].startswith(f"{KNOWN} is not shown to help: it is ")
    assert "not shown to differ from image + note (no difference shown)" in few["answer"]
    assert few["knowledge_gain_low"] < 0


def test_one_rival_that_is_as_good_is_enough_to_not_have_helped():
    """A mean over rivals would have let it pass."""
    found = verdict(1.0)
    assert found["answer"].startswith(
        f"{KNOWN} is not shown to help: it is better than image only, and not shown to differ from image + note"
    )
    assert found["knowledge_gain_low"] < 0


def test_variants_asked_about_other_studies_are_refused():
    with pytest.raises(CxrayError, match=r"^the variants predicted other studies"):
        judged({KNOWN: said(1), NOTE: said(1, patients=299)}, KNOWN, [], {}, np.zeros(600, bool), resamples=200)


# ---- the control ----


def test_others_passages_come_from_another_patient_of_the_same_split():
    patients = [f"p{i % 17}" for i in range(60)]
    split = ["test" if int(p[1:]) < 5 else "train" for p in patients]
    keys = pa.table({"row_id": [f"r{i}" for i in range(60)], "group_id": patients, "split": split})
    of = dict(zip(keys["row_id"].to_pylist(), zip(patients, split)))
    given = exchanged(keys, {row: [row] for row in of}, seed=3)
    assert set(given) == set(of)
    for row, (source,) in given.items():
        assert of[source][0] != of[row][0]
        assert of[source][1] == of[row][1]
    assert given == exchanged(keys, {row: [row] for row in of}, seed=3) != exchanged(keys, {row: [row] for row in of}, seed=4)
    with pytest.raises(CxrayError, match=r"^split train has one patient"):
        exchanged(pa.table({"row_id": ["a", "b"], "group_id": ["p", "p"], "split": ["train", "train"]}), {"a": [], "b": []}, 0)


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"treatment": "image and knowledge"}, "must be one of the variants"),
        ({"treatment": OTHERS}, "not a shuffled one"),
        ({"variants": {KNOWN: {}, OTHERS: {"shuffled": True}}}, "none to compare"),
        ({"variants": {KNOWN: {}, "image+note": {}, NOTE: {}}}, "same folder"),
        ({"variants": {KNOWN: {}, NOTE: {"modalities": ["image"], "kinds": ["passage"]}}}, "no text among its modalities"),
        ({"seeds": [1, 1]}, "same folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, Any], told: str):
    with pytest.raises(CxrayError, match=told):
        load(AblateConfig, settings)


def test_variants_differ_in_what_is_shown_and_in_nothing_else():
    cfg = load(AblateConfig, {"training": {"epochs": 3}, "network": {"dim": 32}})
    ones = [cfg.one(name, 7) for name in cfg.variants]
    same = [one.model_dump(exclude={"modalities", "kinds", "into"}) for one in ones]
    assert all(s == same[0] for s in same)
    assert same[0]["training"]["seed"] == 7
    assert same[0]["network"]["dim"] == 32
    assert ones[0].into == "ablation/image-only/7"


# ---- a whole run, on data made by hand and without the training ----


class Base:
    """In the place of a knowledge folder: eight passages, an axis each."""

    fingerprint, told = "k", "Eight."

    def __init__(self, where: Place) -> None:
        self.ids = [f"k{i}" for i in range(8)]

    def vectors(self, ids: Sequence[str]) -> np.ndarray:
        return np.eye(8, dtype=np.float32)[[int(i[1:]) for i in ids]]

    def copy(self, folder: Path) -> None:
        folder.mkdir()


def stored(folder: Path, rows: list[dict[str, Any]], schema: Schema, **about: Any) -> None:
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.columns), folder / "data/rows.parquet")
    publish(place(folder), schema, schema.name, [{"path": "data/rows.parquet", "outcome": "row", "rows": len(rows), "bytes": 1}], **about)


def thirty(folder: Path, times: int = 1) -> None:
    """Cohort, features and texts of thirty patients, or so many times thirty, with two studies each. In the embedding the first number
    leans to edema, and the next two have the same sign in pneumonia: that takes longer to learn."""
    rng, n = np.random.default_rng(0), 60 * times
    split = ["train"] * (n // 2) + ["validate"] * (n // 6) + ["test"] * (n // 3)
    keys = [{"row_id": f"r{i:03d}", "group_id": f"p{i // 2}", "split": split[i]} for i in range(n)]
    studied = [k | {"study_id": "s" + k["row_id"]} for k in keys]
    blank = {f"chart_{n}": [] for n in ("vitals", "medicines", "labs", "history", "repaired", "implausible", "unreadable")}
    labels = [{"label_row": True, "chart_age": 50.0 + i % 40, "label_edema": i % 2, "label_pneumonia": i // 2 % 2} for i in range(n)]
    labels = [one | {"label_support_devices": 1, "label_fracture": int(i % 3 == 0)} for i, one in enumerate(labels)]
    stored(folder / "cohort", [k | one | blank for k, one in zip(studied, labels)], COHORT)
    about = {"name": "e", "fingerprint": "f", "joint": False}
    features = features_schema(6, 0, 0)
    drawn = rng.normal(size=(n, 6))
    drawn[:, 0] += np.arange(n) % 2 - 0.5
    drawn[:, 2] = np.abs(drawn[:, 2]) * np.sign(drawn[:, 1]) * (2 * (np.arange(n) // 2 % 2) - 1)
    seen = [k | {"embedding": one} for k, one in zip(keys, drawn.tolist())]
    stored(folder / "features", seen, features, encoder=about | {"dim": 6, "grid": 0})
    segments = [
        {"segments": [{"kind": kind, "name": kind, "text": "t", "embedding": rng.normal(size=8)} for kind in ("raw", "note")]
         + [{"kind": "passage", "id": f"k{j}"} for j in (7 if i % 3 else 0, 1 + i % 5)]}
        for i in range(n)
    ]  # fmt: skip
    known = {"uri": str(folder / "knowledge"), "fingerprint": "k"}
    stored(
        folder / "texts",
        [k | s for k, s in zip(studied, segments)],
        texts_schema(8),
        encoder=about | {"dim": 8},
        knowledge=known,
        reading={},
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`thirty`; a fit that leaves an untrained network; settings; which runs were fitted."""
    thirty(tmp_path)
    for room in (sources, fusion):
        monkeypatch.setattr(room, "Knowledge", Base)
    fitted: list[str] = []

    def fit(task: Any, cfg: Any, data: Any, out: Place, made_by: Sequence[str]) -> Fitted:
        fitted.append("/".join(str(out).split("/")[-2:]))
        task.fit(data.small_columns("train", task.columns))
        torch.manual_seed(cfg.seed)
        (Path(str(out)) / "model").mkdir(parents=True, exist_ok=True)
        task.export(task.build(), Path(str(out)) / "model")
        return Fitted(str(out), 0, {}, 1, 1, 0.0, {})

    monkeypatch.setattr(ablate, "fit", fit)
    settings = {
        "out": str(tmp_path), "findings": FINDINGS[:2], "seeds": [0, 1], "resamples": 600, "groups": {"look-alikes": FINDINGS[:2]},
        "network": {"dim": 8, "heads": 2, "hidden": [8, 8]},
        "training": {"metric": "macro_auroc", "resources": {"cache": str(tmp_path / "rows")}},
    }  # fmt: skip
    return {"settings": settings, "fitted": fitted, "out": tmp_path}


def test_a_run_ends_in_predictions_numbers_and_a_page_and_goes_on_where_it_stopped(world: dict[str, Any]):
    """Also where the workers have GPUs and this machine has none."""
    settings = merge(world["settings"], {"training": {"resources": {"gpus": 1}}})
    cfg, out = load(AblateConfig, settings), world["out"] / "ablation"
    done = run(cfg)
    assert len(world["fitted"]) == 12
    told = json.loads((out / "metrics.json").read_text())
    assert told["answer"] in (out / "report.html").read_text().replace("&#39;", "'")
    assert told["knowledge_gain_low"] == pytest.approx(done.found["knowledge_gain_low"])
    assert told["evidence"]["words"] in (out / "report.html").read_text().replace("&#39;", "'")
    assert json.loads((out / "run.json").read_text())["verb"] == "ablate"
    first, page = told["comparisons"][0], (out / "report.html").read_text()
    assert "{value:.3f} ({low:.3f} to {high:.3f})".format(**first["auroc"]) in page, "each one's own interval"
    assert MANY in told["gains"], "a study's findings count whichever the network was asked about"
    judged = read(open_dataset(place(out / "image-note-knowledge/0/predictions"), "predictions"), splits=("test",))
    assert (len(judged.studies), judged.targets) == (20, FINDINGS[:2])
    assert verify(place(out / "image-note-knowledge/0/predictions")).clean

    (out / "image-only/1/run.json").unlink()  # as if it had been stopped there
    run(cfg)
    assert world["fitted"][12:] == ["image-only/1"]


def test_every_variant_has_the_rows_that_all_have(world: dict[str, Any]):
    """An image that has no text is left out for the image-only network too."""
    folder = world["out"] / "texts/data/rows.parquet"
    pq.write_table(pq.read_table(folder).slice(3), folder)
    bench = Bench(load(AblateConfig, world["settings"]))
    assert len(bench.data.keys) == 57
    task, module, _ = bench.trained(IMAGE, 0)
    assert len(scored(task, module, bench.rows(task, "train"), 8)) == 27


def test_the_control_reads_what_the_lookup_says_and_its_own_note(world: dict[str, Any]):
    bench = Bench(load(AblateConfig, world["settings"]))
    (control, _, _), (known, _, _) = bench.trained(OTHERS, 0), bench.trained(KNOWN, 0)
    others = exchanged(bench.data.keys, bench.passages, 0)
    rows = ablate.Rows(known, bench.data, "test", 0, world["settings"]["training"]["resources"]["cache"])
    changed = 0
    for i in range(len(rows)):
        theirs, mine = control.prepare(rows.row(i), np.random.default_rng(0)), known.prepare(rows.row(i), np.random.default_rng(0))
        passages = [n for n, k in zip(theirs["names"], theirs["kinds"]) if k == KINDS.index("passage")]
        assert passages == others[mine["row_id"]]
        assert theirs["names"][0] == mine["names"][0] == "note"
        np.testing.assert_array_equal(theirs["text"][0], mine["text"][0])
        changed += passages != mine["names"][1:]
    assert changed > 10


# ---- what the network looks at ----


class Pointing(torch.nn.Module):
    """Looks at passage k0 alone; the score of all findings is what it says there, or half as much where it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, *, text: torch.Tensor, text_mask: torch.Tensor, kinds: torch.Tensor, attention: bool = False, **_: Any) -> Any:
        here = text_mask & (kinds == KINDS.index("passage")) & (text[..., 0] == 1)
        logits = torch.where(here.any(1), 2.0, 0.0)[:, None].expand(-1, 2)
        spread = 0.5 * here + 0.1 * (text_mask & ~here)
        return {"logits": logits, "segments": spread} if attention else logits


def test_taking_away_what_it_rests_on_is_told_from_taking_away_another(world: dict[str, Any]):
    bench = Bench(load(AblateConfig, world["settings"]))
    task, _, _ = bench.trained(KNOWN, 0)
    look = looked_at(task, Pointing(), bench.data, seed=0)
    rows = ablate.Rows(task, bench.data, "test", 0, world["settings"]["training"]["resources"]["cache"])
    has = np.array(["k0" in rows[0, i]["names"] for i in range(len(rows))])
    some = np.array([(rows[0, i]["target"] == 1).any() for i in range(len(rows))])
    np.testing.assert_allclose(look["most"][has & some], torch.tensor(2.0).sigmoid() - 0.5, rtol=1e-5)
    np.testing.assert_array_equal(look["most"][~has & some], 0)
    np.testing.assert_array_equal(look["chance"][some], 0)
    assert np.isnan(look["most"][~some]).all(), "a study without a finding has no score to fall"
    np.testing.assert_allclose(look["mass"], np.where(has, 0.6, 0.2), rtol=1e-5)
    np.testing.assert_allclose(look["share"], 2 / 3, rtol=1e-5)

    told = evidence([look, look], resamples=200)
    assert told["difference"]["low"] > 0
    assert "attention points at what the scores rest on" in told["words"]
    blind = evidence([look | {"most": look["chance"]}], resamples=200)
    assert "no difference shown" in blind["words"]


def test_stage_two_is_refused_where_variants_share_what_encoders_made():
    with pytest.raises(CxrayError, match="unfreeze"):
        load(AblateConfig, {"unfreeze": {}})


@pytest.mark.soak
@pytest.mark.ray
def test_the_whole_way_finds_the_planted_knowledge_and_no_gain_in_another_patients(tmp_path):
    """benchmarks/ablation.py: 1,500 synthetic patients, three seeds, some twenty minutes on two cores, and at most forty."""
    command = [sys.executable, "benchmarks/ablation.py", "--full", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["knowledge_gain_low"] > 0 >= figures["shuffled_gain_low"]
    assert "many_knowledge_gain_low" in figures, "studies of three or more findings are compared by themselves"
    page = (tmp_path / "ablation/report.html").read_text()
    assert "image + note + knowledge helps:" in page and "image + note + shuffled knowledge is not shown to help:" in page
