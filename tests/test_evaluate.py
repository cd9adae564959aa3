"""`cxray evaluate`: what is fitted comes from validate alone, what is undefined says so, and notes that tell the answer are named."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import expit
from test_leaks import outputs, write
from test_radiologists import labelled

from contracts.config import load
from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.findings import label_column
from contracts.schema import COHORT, predictions_schema
from contracts.storage import place
from evaluation import leaks
from evaluation.calibration import apply, thresholds
from evaluation.evaluate import EvaluateConfig, EvaluateSummary, run, unchanged
from evaluation.intervals import resample, statistic
from evaluation.judged import AT_SPECIFICITY, MEASURES
from evaluation.metrics import ece, judge
from evaluation.predictions import read
from evaluation.studies import rare, subgroups

TARGETS = ("Pneumonia", "Edema", "Fracture", "No Finding", "Pleural Other")
WEIGHTS = b"weights of the model"


def studies(n: int = 300) -> list[dict[str, Any]]:
    """Cohort rows: two studies a patient, every third with two images. The labels are the columns' own."""
    rng = np.random.default_rng(5)
    made = []
    for s in range(n):
        split = "train" if s < n * 0.4 else "validate" if s < n * 0.7 else "test"
        states = {f: int(rng.random() < share) for f, share in zip(TARGETS, (0.4, 0.3, 0.02, 0.3, 0.0), strict=True)}
        states["Pleural Other"] = int(split == "test" and s % 7 == 0)  # in validate it has one class
        study = {
            "study_id": f"s{s:04d}", "group_id": f"p{s // 2}", "split": split, "label_row": True, "stay_id": "e" if s % 3 else None,
            "chart_sex": ("F", "M", None)[s % 5 % 3], "chart_age": (39.0, 40.0, 79.9, 80.0, None)[s % 5], "view": ("AP", "PA")[s % 2],
        }  # fmt: skip
        study |= {label_column(f): state for f, state in states.items()}
        made += [{"row_id": f"i{s:04d}{image}", **study} for image in ("b", "a")[: 1 + (s % 3 == 0)]]
    return made


def predicted(cohort: list[dict[str, Any]], splits: tuple[str, ...] = ("validate", "test"), known: bool = True) -> list[dict[str, Any]]:
    """Predictions of it that are surer than they should be, by a factor of three; each eleventh study has no label."""
    made = []
    for i, row in enumerate(r for r in cohort if r["split"] in splits):
        rng = np.random.default_rng(i)
        labels = [row.get(label_column(f)) for f in TARGETS]
        scores = expit(3 * (rng.normal(size=len(TARGETS)) + 1.2 * np.array([y == 1 for y in labels]) - 0.6))
        unknown = not known and int(row["study_id"][1:]) % 11 == 0
        keys = {k: row[k] for k in ("row_id", "group_id", "split", "study_id")}
        made.append(keys | {"scores": scores.tolist(), "labels": [None if unknown else y for y in labels]})
    return made


def publish(folder: Path, made: list[dict[str, Any]], name: str = "predictions/fusion", **more: Any) -> None:
    about = {"model": "fusion", "targets": list(TARGETS), "policy": "u-ignore, blank zero", "weights": hashlib.sha256(WEIGHTS).hexdigest()}
    write(folder / name, predictions_schema(len(TARGETS)), made, **(about | more))


def trained(folder: Path, mode: str = "standard", **reading: Any) -> None:
    (folder / "fusion/model").mkdir(parents=True)
    (folder / "fusion/model/model.safetensors").write_bytes(WEIGHTS)
    (folder / "fusion/model/README.md").write_text("# Fusion\n\n## Limits\n\nMany.\n")
    notes = {"notes": {"leakage": {"mode": mode}} | reading}
    (folder / "fusion/model/config.json").write_text(json.dumps({"reading": notes}))


def world(folder: Path, made: list[dict[str, Any]] | None = None) -> Path:
    cohort = studies()
    write(folder / "cohort", COHORT, cohort)
    publish(folder, predicted(cohort) if made is None else made)
    trained(folder)
    return folder


def evaluate(folder: Path, **settings: Any) -> tuple[dict[str, Any], str, EvaluateSummary]:
    """(metrics.json, the page, the summary)."""
    summary = run(load(EvaluateConfig, {"out": str(folder), "resamples": 50} | settings))
    return json.loads((folder / "evaluation/metrics.json").read_text()), (folder / "evaluation/report.html").read_text(), summary


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, EvaluateSummary]:
    folder = world(tmp_path_factory.mktemp("evaluated"))
    return folder, *evaluate(folder, run="fusion")


def test_every_number_is_that_of_the_metrics_on_study_means(done):
    folder, found, page, _ = done
    p = read(open_dataset(place(folder / "predictions/fusion")))
    test = p.splits == "test"
    after = apply(p.scores, TARGETS, found["calibration"])[test]
    wanted = judge(after, p.labels[test], TARGETS, thresholds(TARGETS, found["calibration"]))
    raw = judge(p.scores[test], p.labels[test], TARGETS)
    for measure in MEASURES:
        for name in TARGETS:
            got, value = found["test"]["findings"][name][measure]["value"], wanted["findings"][name][measure]
            assert got is None if np.isnan(value) else got == pytest.approx(value)
        assert found["test"]["macro"][measure]["value"] == pytest.approx(wanted["macro"][measure]["value"])
        assert found["test"]["macro"][measure]["over"] == wanted["macro"][measure]["over"]
        assert found["test"]["micro"][measure]["value"] == pytest.approx(wanted["micro"][measure])
        assert found["test"]["micro"][measure]["low"] <= found["test"]["micro"][measure]["high"]
    for s, least in AT_SPECIFICITY.items():
        at = [found["calibration"][f]["at_specificity"].get(s, np.nan) for f in TARGETS]
        there, fitted = judge(after, p.labels[test], TARGETS, np.array(at)), p.splits == "validate"
        before = judge(apply(p.scores, TARGETS, found["calibration"])[fitted], p.labels[fitted], TARGETS, np.array(at))
        for measure in ("sensitivity", "specificity"):
            got = {f: found["test"]["findings"][f][f"{measure}_at_{s}"]["value"] for f in TARGETS}
            assert got.pop("Pleural Other") is None, "in validate it has one class"
            assert got == pytest.approx({f: there["findings"][f][measure] for f in got})
            assert found["test"]["macro"][f"{measure}_at_{s}"]["value"] == pytest.approx(np.mean(list(got.values())))
        assert all(before["findings"][f]["specificity"] >= least for f in got)
    for measure in ("brier", "ece"):
        assert found["test"]["macro"][f"{measure}_before"]["value"] == pytest.approx(raw["macro"][measure]["value"])
    one = found["test"]["findings"]["Pneumonia"]
    assert one["tp"] + one["fn"] == one["n_pos"] and one["fp"] + one["tn"] == one["n_neg"]
    assert one["sensitivity"]["value"] == pytest.approx(one["tp"] / one["n_pos"])
    assert (found["test"]["studies"], found["test"]["patients"]) == (90, 45)
    assert found["protocol"]["splits"]["validate"] == {"studies": 90, "patients": 45, "unlabelled": 0}
    assert found["protocol"]["policy"] == "u-ignore, blank zero" and "For research, not for diagnosis." in page


def test_calibration_makes_what_was_too_sure_less_so(done):
    folder, found, _, summary = done
    for name in ("Pneumonia", "Edema"):
        one = found["test"]["findings"][name]
        assert found["calibration"][name]["temperature"] > 1.5
        assert one["ece"]["value"] < one["ece_before"]["value"] and one["brier"]["value"] < one["brier_before"]["value"]
    assert json.loads((folder / "fusion/model/calibration.json").read_text()) == found["calibration"]
    table = pq.read_table(folder / "evaluation/predictions.parquet")
    p = read(open_dataset(place(folder / "predictions/fusion")))
    assert table["study_id"].to_pylist() == p.studies.tolist() and table["label_no_finding"].to_pylist() == p.labels[:, 3].tolist()
    np.testing.assert_allclose(table["score_edema"], apply(p.scores, TARGETS, found["calibration"])[:, 1])
    assert "before calibration" in str(summary)


def test_the_models_card_has_the_latest_judgement_once(tmp_path):
    world(tmp_path)
    evaluate(tmp_path, run="fusion", threshold="f1")
    earlier = (tmp_path / "fusion/model/README.md").read_text()
    found, _, _ = evaluate(tmp_path, run="fusion")
    card = (tmp_path / "fusion/model/README.md").read_text()
    assert card != earlier and card.startswith("# Fusion\n\n## Limits\n\nMany.\n\n## On the test split") and card.count("## On") == 1
    auroc = found["test"]["findings"]["Edema"]["auroc"]
    assert f"| Edema | {auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f}) |" in card and "| Fracture |" in card
    assert "Youden" in card and "Youden" not in earlier and "where F1 is greatest" in earlier


def test_one_class_in_validate_is_not_fitted_and_said(done):
    _, found, page, summary = done
    assert found["not_fitted"] == ["Pleural Other"]
    assert found["calibration"]["Pleural Other"] == {"temperature": 1.0, "threshold": 0.5, "at_specificity": {}, "fitted": False}
    assert found["test"]["findings"]["Pleural Other"]["auroc"]["value"] is not None
    assert "not fitted: one class in validate" in page and "validate has one class: Pleural Other" in str(summary)


@pytest.mark.parametrize("change", ["labels", "scores"])
def test_nothing_of_test_is_fitted(done, tmp_path, change):
    """Shuffled among the patients of test, labels or scores change what is measured and nothing that was fitted."""
    cohort = studies()
    made = predicted(cohort)
    test = [i for i, row in enumerate(made) if row["split"] == "test"]
    values = {row["study_id"]: made[i][change] for i, row in ((i, made[i]) for i in test)}
    moved = dict(zip(values, np.random.default_rng(0).permutation(list(values)), strict=True))
    for i in test:
        made[i] = made[i] | {change: values[moved[made[i]["study_id"]]]}
    found, _, _ = evaluate(world(tmp_path, made), run="fusion")
    assert (tmp_path / "fusion/model/calibration.json").read_bytes() == (done[0] / "fusion/model/calibration.json").read_bytes()
    assert found["test"]["macro"]["auroc"]["value"] < done[1]["test"]["macro"]["auroc"]["value"] - 0.1


def test_subgroups_hold_every_study_once(done):
    folder, found, page, _ = done
    by = found["subgroups"]
    assert {kind: set(own) for kind, own in by.items()} == {
        "sex": {"F", "M", "not stated"},
        "age": {"under 40", "40 to 59", "60 to 79", "80 and over", "not stated"},
        "view": {"AP", "PA"},
        "emergency visit": {"with a visit", "without"},
        "number of findings": {"0", "1", "2", "3 or more"} & set(by["number of findings"]),
        "rarity": {"rare findings", "other findings"},
    }
    for kind, own in by.items():
        if kind != "rarity":
            assert sum(one["studies"] for one in own.values()) == 90
            assert sum(one["findings"]["Edema"]["n_pos"] for one in own.values()) == found["test"]["findings"]["Edema"]["n_pos"]
    none = by["number of findings"]["0"]["findings"]  # 'No Finding' is not counted, so it alone can have both classes
    assert none["Pneumonia"]["n_pos"] == 0 and none["Pneumonia"]["auroc"]["value"] is None and none["No Finding"]["auroc"]["value"]
    assert by["number of findings"]["0"]["macro"]["auroc"]["over"] == 1
    assert set(by["rarity"]["rare findings"]["findings"]) == {"Fracture", "Pleural Other"}
    assert "AUROC by sex" in page and "not defined (0 / " in page
    p = read(open_dataset(place(folder / "predictions/fusion")))
    rows = subgroups(open_dataset(place(folder / "cohort")), p)["sex"]["F"]
    assert rows.tolist() == [int(s[1:]) % 5 % 3 == 0 for s in p.studies]


def test_a_finding_is_rare_by_the_labels_of_train(tmp_path):
    made = [row | {label_column("Edema"): None if row["split"] == "train" else 1} for row in studies()]
    write(tmp_path / "cohort", COHORT, made)
    assert rare(open_dataset(place(tmp_path / "cohort")), TARGETS) == ["Edema", "Fracture", "Pleural Other"]


def test_several_views_of_a_study_are_a_part_of_their_own(tmp_path):
    made = [row | {"view": "LL" if row["row_id"].endswith("a") else None} for row in studies()]
    write(tmp_path / "cohort", COHORT, made)
    publish(tmp_path, predicted(made))
    found = subgroups(open_dataset(place(tmp_path / "cohort")), read(open_dataset(place(tmp_path / "predictions/fusion"))))["view"]
    assert {name: int(rows.sum()) for name, rows in found.items()} == {"not stated": 120, "several": 60}


def test_studies_without_a_label_are_not_judged(tmp_path):
    found, _, _ = evaluate(world(tmp_path, predicted(studies(), known=False)))
    assert found["test"]["studies"] == 82 and found["protocol"]["splits"]["test"]["unlabelled"] == 8
    assert pq.read_table(tmp_path / "evaluation/predictions.parquet").num_rows == 180


def test_ece_of_every_resample():
    """Against the plain functions on rows repeated as often as they were drawn; ties and unknown labels among them."""
    rng = np.random.default_rng(8)
    labels = (rng.random((90, 3)) < [0.3, 0.5, 0.0]).astype(float)
    labels[rng.random((90, 3)) < 0.1] = np.nan
    scores = np.round(np.clip(0.3 * np.nan_to_num(labels) + rng.random((90, 3)) * 0.7, 0, 1), 1)
    seen: list[np.ndarray] = []
    resample(np.arange(90) // 2, lambda w: seen.append(w) or w[:1], 30, seed=0)
    weights = np.concatenate(seen, axis=1)
    got = statistic(scores, labels, ("ece",))(weights)
    for r in range(30):
        for f in range(3):
            told = ~np.isnan(labels[:, f])
            times = weights[told, r].astype(int)
            s, y = np.repeat(scores[told, f], times), np.repeat(labels[told, f], times)
            np.testing.assert_allclose(got[0, f, r], ece(s, y), atol=1e-6)


# --- Notes that tell the answer.


def trap(folder: Path, mode: str, said: str | None = None) -> Path:
    """Complaints name Pneumonia and Pneumothorax; a model that predicts them well, and the leak meter's word on its notes."""
    outputs(folder, mode, said)
    leaks.run(load(leaks.LeaksConfig, {"out": str(folder), "resamples": 50}))
    cohort = open_dataset(place(folder / "cohort")).table().to_pylist()
    publish(folder, predicted(cohort))
    return folder


def test_notes_that_leak_the_label_are_warned_of_wherever_the_result_is_read(tmp_path):
    found, page, summary = evaluate(trap(tmp_path, "off"), leaks="leaks")
    given, left, off = found["warnings"]
    assert "may give the answer away for Pneumonia, Pneumothorax:" in given and "Pneumonia" in left and "filter off" in off
    assert "Edema" not in given + left
    assert page.index("Warnings: read these first") < page.index("What was judged, and how") and given in page
    assert str(summary).count("WARNING") == 3 and given in str(summary)
    assert json.loads((tmp_path / "evaluation/run.json").read_text())["summary"]["warnings"] == found["warnings"]


def test_a_filter_that_works_gives_no_warning(tmp_path):
    found, page, summary = evaluate(trap(tmp_path, "standard"), leaks="leaks")
    assert found["warnings"] == [] and "Warnings" not in page and "WARNING" not in str(summary)
    assert "No leak meter was named" not in page


def test_a_model_that_reads_unfiltered_notes_is_warned_of_without_a_meter(tmp_path):
    world(tmp_path / "a")
    (tmp_path / "a/fusion/model/config.json").write_text(json.dumps({"reading": {"notes": {"leakage": {"mode": "off"}}}}))
    found, page, _ = evaluate(tmp_path / "a", run="fusion")
    assert len(found["warnings"]) == 1 and "filter off" in found["warnings"][0] and "No leak meter was named" in page


def test_a_meter_of_other_notes_than_the_models_is_warned_of(tmp_path):
    trap(tmp_path, "standard")
    trained(tmp_path, indication=True)
    found, _, _ = evaluate(tmp_path, leaks="leaks", run="fusion")
    assert len(found["warnings"]) == 1 and "other settings" in found["warnings"][0]


@pytest.mark.parametrize(("low", "after", "warned"), [(0.01, 0.95, True), (-0.01, 0.95, False), (0.01, 0.89, False), (None, None, False)])
def test_only_a_clear_leak_is_called_one(low, after, warned):
    one = {"why_not": None if after else "one class", "after": {"value": after}, "after_less_structured": {"low": low}}
    found = {"findings": {"Edema": one}, "terms_left": {"Edema": 0}, "notes": {"leakage": {"mode": "standard"}}}
    assert bool(leaks.warnings(found)) == warned


# --- Radiologists.


def test_radiologists_are_a_second_reference_on_test(tmp_path):
    """They say of Pneumonia the contrary of the reports, and nothing of Fracture."""
    world(tmp_path)
    p = read(open_dataset(place(tmp_path / "predictions/fusion")))
    test = p.splits == "test"
    lines = [f"{s},{1.0 - y[0]},{'' if y[1] == 0 else y[1]},-1.0" for s, y in zip(p.studies[test][::2], p.labels[test][::2])]
    file = labelled(tmp_path, "\n".join(["study_id,Pneumonia,Edema,No Finding", "99,1.0,,", *lines]))
    found, page, summary = evaluate(tmp_path, radiologists=file, run="fusion")
    by = found["radiologists"]
    assert by["studies"] == 45 and "Against radiologists" in page and "against radiologists" in str(summary)
    reports = by["auroc_by_reports"]["findings"]
    assert by["findings"]["Pneumonia"]["auroc"]["value"] == pytest.approx(1 - reports["Pneumonia"]["value"])
    assert by["findings"]["Edema"]["auroc"]["value"] == pytest.approx(reports["Edema"]["value"])
    assert by["findings"]["Fracture"]["auroc"]["value"] is None and by["findings"]["No Finding"]["n_unknown"] == 45
    cfg = load(EvaluateConfig, {"out": str(tmp_path), "resamples": 50, "radiologists": file, "run": "fusion"})
    assert unchanged("evaluate", cfg)
    Path(file).write_text(Path(file).read_text() + "98,0.0,,\n")
    assert not unchanged("evaluate", cfg), "another file under the same name is another reference"
    alone, _, _ = evaluate(tmp_path)
    assert alone["calibration"] == found["calibration"] and alone["test"] == found["test"]


# --- What is refused.


def test_a_study_is_the_mean_of_its_images(done):
    p = read(open_dataset(place(done[0] / "predictions/fusion")), ("test",))
    rows = [r for r in predicted(studies()) if r["study_id"] == p.studies[0]]
    assert len(rows) == 2 and rows[0]["scores"] != rows[1]["scores"] and set(p.splits) == {"test"} and len(p.studies) == 90
    np.testing.assert_allclose(p.scores[0], np.mean([r["scores"] for r in rows], axis=0))
    assert p.studies.tolist() == sorted(p.studies) and p.labels[0].tolist() == rows[0]["labels"]


FIRST = predicted(studies())[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (FIRST, "scored twice"),
        (FIRST | {"row_id": "new", "labels": [1 - y for y in FIRST["labels"]]}, "different labels"),
        (FIRST | {"row_id": "new", "group_id": "other"}, "two patients"),
        (FIRST | {"row_id": "new", "study_id": "other", "split": "test"}, "a patient stands in two splits"),
        (FIRST | {"row_id": "new", "scores": [None, *FIRST["scores"][1:]]}, "1 scores are null"),
        (FIRST | {"row_id": "new", "scores": None}, "1 rows have no scores"),
        (FIRST | {"row_id": "new", "study_id": None}, "1 rows have no study_id"),
    ],
)
def test_predictions_that_do_not_fit_together_are_refused(tmp_path, row, message):
    publish(tmp_path, [*predicted(studies()), row])
    with pytest.raises(CxrayError, match=message):
        read(open_dataset(place(tmp_path / "predictions/fusion")))


def test_inputs_that_do_not_go_together_are_refused(tmp_path):
    cohort = studies()
    world(tmp_path)
    for name, made, message in [
        ("less", cohort[:-3], "predicted studies are not in this cohort"),
        (
            "moved",
            [r | {"split": "test" if r["split"] == "validate" else r["split"]} for r in cohort],
            "differs from the predictions in split",
        ),
        ("others", [r | {"group_id": f"q{r['group_id']}"} for r in cohort], "differs from the predictions in group_id"),
    ]:
        write(tmp_path / name, COHORT, made)
        with pytest.raises(CxrayError, match=message):
            evaluate(tmp_path, cohort=name)
    for split, message in (("test", "no labelled study of validate"), ("validate", "no labelled study of test")):
        publish(tmp_path, predicted(cohort, (split,)), f"predictions/{split}")
        with pytest.raises(CxrayError, match=message):
            evaluate(tmp_path, predictions=f"predictions/{split}")
    publish(tmp_path, predicted(cohort), "predictions/four", targets=list(TARGETS[:4]))
    with pytest.raises(CxrayError, match="names 4 targets, and a row has 5"):
        evaluate(tmp_path, predictions="predictions/four")
    with pytest.raises(CxrayError, match="no finished `cxray leaks` here"):
        evaluate(tmp_path, leaks="fusion")
    assert not (tmp_path / "evaluation").exists()


def test_a_calibration_is_not_written_into_another_model(tmp_path):
    world(tmp_path)
    (tmp_path / "fusion/model/model.safetensors").write_bytes(b"trained again")
    with pytest.raises(CxrayError, match="not predicted with the weights in"):
        evaluate(tmp_path, run="fusion")
    assert not (tmp_path / "fusion/model/calibration.json").exists()


def test_no_identifier_reaches_the_page_or_the_numbers(done):
    folder, found, page, summary = done
    text = json.dumps(found) + page + str(summary) + (folder / "evaluation/run.json").read_text()
    p = read(open_dataset(place(folder / "predictions/fusion")))
    assert not [i for i in p.studies if i in text]


def test_no_finding_with_both_classes_is_said_and_not_zero(tmp_path):
    made = [row | {"labels": [0] * len(TARGETS)} for row in predicted(studies())]
    found, page, summary = evaluate(world(tmp_path, made))
    assert found["test"]["macro"]["auroc"] == {"value": None, "low": None, "high": None, "dropped": 50, "over": 0}
    assert "No finding has both classes in test" in page and "macro AUROC not defined over 0 of 5" in str(summary)
