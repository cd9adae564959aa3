"""The leak meter: it sees an answer that stands in the notes, sees it gone, and sees a filter that is broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.chart import Chart
from contracts.config import load
from contracts.dataset import publish
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from contracts.schema import COHORT, Schema, texts_schema
from contracts.storage import place
from evaluation import leaks
from evaluation.probes import in_words, measure
from pipelines.inputs.notes import NoteConfig, NoteWriter

NAMES = ("Pneumonia", "Edema", "Fracture", "Lung Lesion")
N = 900


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """Two studies a patient. Saturation and heart rate know a little of Pneumonia and Edema; the words of a note say both numbers roughly,
    and before the filter the finding by name."""
    rng = np.random.default_rng(0)
    labels = (rng.random((N, 4)) < [0.3, 0.3, 0.004, 0.3]).astype(float)
    vitals = rng.normal(size=(N, 2)) + labels[:, :2]
    vitals[rng.random((N, 2)) < 0.1] = np.nan
    split = np.where(np.arange(N) < 600, "train", "validate")
    labels[split == "validate", 3] = 0
    labels[::17, 0] = np.nan
    steps = np.clip(np.round(np.nan_to_num(vitals, nan=-9) * 2), -9, 9).astype(int) + 20
    after = [f"saturation {a}. heart rate {b}." for a, b in steps]
    words = [f"{'pneumonia' if p == 1 else ''} {'pulmonary edema' if e == 1 else ''}" for p, e in labels[:, :2]]
    before = [f"{note} {word}" for note, word in zip(after, words)]
    return {
        "before": before, "after": after, "structured": vitals, "labels": labels, "groups": np.arange(N) // 2, "split": split,
        "findings": NAMES, "resamples": 300,
    }  # fmt: skip


def test_an_answer_in_the_notes_is_seen_and_seen_to_be_gone(world):
    found = measure(**world)
    for name in ("Pneumonia", "Edema"):
        one = found["findings"][name]
        assert one["before"]["value"] > 0.98 and one["before"]["low"] > one["structured"]["high"]
        assert one["structured"]["low"] <= one["after"]["value"] <= one["structured"]["high"] and not one["exceeds"]
        assert one["after_less_structured"]["value"] == pytest.approx(one["after"]["value"] - one["structured"]["value"])
    assert found["exceeding"] == [] and found["macro"]["over"] == 2
    assert found["macro"]["before"]["value"] == pytest.approx(np.mean([found["findings"][n]["before"]["value"] for n in NAMES[:2]]))
    assert "no more than the structured features" in in_words(found)
    assert found["patients"] == {"train": 300, "validate": 150}


def test_a_broken_filter_is_seen(world):
    """It takes 'pneumonia' but leaves a word that says the same in some of the notes."""
    broken = [f"{n} {'pna' if y == 1 and i % 2 else ''}" for i, (n, y) in enumerate(zip(world["after"], world["labels"][:, 0]))]
    found = measure(**world | {"after": broken})
    assert found["exceeding"] == ["Pneumonia"] and found["findings"]["Pneumonia"]["after_less_structured"]["low"] > 0
    assert "Above the interval of the structured features are, after the filter: Pneumonia." in in_words(found)


def test_what_cannot_be_measured_says_why(world):
    found = measure(**world)["findings"]
    assert found["Fracture"]["why_not"] == "under 10 positives in train" and 0 < found["Fracture"]["train"]["n_pos"] < 10
    assert found["Lung Lesion"]["why_not"] == "one class in validate" and found["Lung Lesion"]["validate"] == {"n_pos": 0, "n_neg": 300}
    assert all(np.isnan(found[n][view]["value"]) for n in NAMES[2:] for view in ("before", "after", "structured"))
    assert found["Pneumonia"]["train"]["n_pos"] + found["Pneumonia"]["train"]["n_neg"] == 600 - len(range(0, 600, 17))
    nothing = measure(**world | {"labels": np.zeros((N, 4))})
    assert nothing["macro"]["over"] == 0 and "No finding could be measured" in in_words(nothing)


def test_the_labels_of_validate_teach_nothing(world):
    """Turned around on validate, they turn the AUROC around: nothing of them was fitted."""
    labels = world["labels"].copy()
    check = world["split"] == "validate"
    labels[check, 1] = 1 - labels[check, 1]
    there, turned = (measure(**world | {"labels": y})["findings"]["Edema"] for y in (world["labels"], labels))
    for view in ("before", "after", "structured"):
        assert turned[view]["value"] == pytest.approx(1 - there[view]["value"])


def test_notes_and_features_that_say_nothing_are_a_coin(world):
    silent = measure(**world | {"before": [""] * N, "after": ["?"] * N, "structured": np.full((N, 3), np.nan)})
    for view in ("before", "after", "structured"):
        assert silent["findings"]["Edema"][view] == {"value": 0.5, "low": 0.5, "high": 0.5, "dropped": 0}
    with pytest.raises(CxrayError, match=r"600 and 0|900 and 0"):
        measure(**world | {"split": np.full(N, "train")})


# --- The verb, on a cohort and texts made by hand.

ANSWERS = {"Pneumonia": "pneumonia", "Pneumothorax": "pneumothorax"}


def rows(n: int = 420) -> list[dict[str, Any]]:
    """Two images of each of n studies, one study a patient; the complaint of a positive study names its finding."""
    rng = np.random.default_rng(1)
    found = []
    for s in range(n):
        states = {f: int(rng.random() < 0.3) for f in ANSWERS}
        complaint = ", ".join(["cough", *(word for f, word in ANSWERS.items() if states[f])])
        split = "train" if s < n * 0.6 else "validate" if s < n * 0.9 else "test"
        study = {
            "group_id": f"p{s}", "study_id": f"s{s}", "split": split, "label_row": s % 50 != 1,
            "chart_age": float(rng.integers(20, 90)), "chart_sex": "F", "chart_chief_complaint": complaint,
            "chart_triage": {"heartrate": float(rng.integers(60, 130)), "o2sat": float(rng.integers(88, 100))},
        }  # fmt: skip
        if study["label_row"]:
            study |= {label_column(f): state or None for f, state in states.items()} | {label_column("Edema"): -1 if s % 5 else 1}
        found += [{"row_id": f"i{s:04d}b", **study}, {"row_id": f"i{s:04d}a", **study}]
    return found


def write(folder: Path, schema: Schema, made: list[dict], **more: Any) -> None:
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(made, schema.columns), folder / "data/all.parquet")
    publish(
        place(folder),
        schema,
        f"of-the-test-{schema.name}",
        [{"path": "data/all.parquet", "outcome": "row", "rows": len(made), "bytes": 1}],
        **more,
    )


def outputs(folder: Path, mode: str, said: str | None = None) -> Path:
    """mode: the filter that wrote the notes; said: the one that the texts say wrote them."""
    made = rows()
    write(folder / "cohort", COHORT, made)
    notes = NoteWriter(NoteConfig.model_validate({"leakage": {"mode": mode}}))([Chart.from_row(r) for r in made])
    texts = [
        {k: r[k] for k in ("row_id", "group_id", "split", "study_id")}
        | {"segments": [{"kind": s.kind, "name": s.name, "text": s.text, "embedding": [0.0, 0.0]} for s in note.segments]}
        | {"note_tokens": 10 + i % 3, "note_cut": i % 2, "removed": [{"rule": k, "count": v} for k, v in note.removed.items()]}
        for i, (r, note) in enumerate(zip(made, notes, strict=True))
    ]
    reading = {"notes": NoteConfig.model_validate({"leakage": {"mode": said or mode}}).model_dump(mode="json")}
    write(folder / "texts/minilm", texts_schema(2), texts, reading=reading)
    return folder


def meter(folder: Path) -> tuple[dict[str, Any], str, leaks.LeaksSummary]:
    """(metrics.json, the page, the summary)."""
    summary = leaks.run(load(leaks.LeaksConfig, {"out": str(folder), "resamples": 100}))
    return json.loads((folder / "leaks/metrics.json").read_text()), (folder / "leaks/report.html").read_text(), summary


def test_the_verb_shows_what_the_filter_takes(tmp_path):
    found, page, summary = meter(outputs(tmp_path, "standard"))
    for name in ANSWERS:
        one = found["findings"][name]
        assert one["before"]["value"] == 1.0 and one["after"]["value"] < 0.65 and not one["exceeds"]
    assert found["studies"] == {"train": 252, "validate": 126}  # a row a study; none of test
    assert set(found["terms_left"].values()) == {0} and found["segments"] >= 2 * 840
    assert found["filtered"]["rules"]["finding:Pneumonia"] == sum("pneumonia" in r["chart_chief_complaint"] for r in rows())
    assert found["findings"]["Edema"]["why_not"] == "one class in train"  # 1 and uncertain: no negative
    assert found["findings"]["Fracture"] == found["findings"]["Fracture"] | {"why_not": "under 10 positives in train"}
    without = sum(not r["label_row"] for r in rows() if r["split"] == "train") / 2
    assert sum(found["findings"]["Pneumonia"]["train"].values()) == 252 - without
    assert found["lengths"]["test"] == {"notes": 84, "median": 11.0, "p95": 12.0, "longest": 12.0, "cut": 42}
    assert "no more than the structured features" in str(summary) and "none holds a term" in str(summary)
    assert "For research, not for diagnosis." in page and "no more than the structured features" in page
    assert json.loads((tmp_path / "leaks/run.json").read_text())["summary"]["terms_left"] == 0


def test_the_verb_shows_a_filter_that_did_not_work(tmp_path):
    found, page, summary = meter(outputs(tmp_path, "off", said="standard"))
    assert set(found["exceeding"]) == set(ANSWERS) and found["findings"]["Pneumonia"]["after"]["value"] == 1.0
    assert found["terms_left"]["Pneumonia"] == sum("pneumonia" in r["chart_chief_complaint"] for r in rows())
    assert "segments still hold a term" in str(summary) and "Pneumothorax" in page


def test_no_words_of_a_note_reach_the_report(tmp_path):
    """'cough' is charted in every note."""
    folder = outputs(tmp_path, "standard")
    found, page, summary = meter(folder)
    assert "cough" not in json.dumps(found) + page + str(summary) + (folder / "leaks/run.json").read_text()


def test_texts_of_another_cohort_are_refused(tmp_path):
    folder = outputs(tmp_path, "standard")
    write(folder / "other", COHORT, rows()[:-2])
    with pytest.raises(CxrayError, match="2 rows of the texts are not in this cohort"):
        leaks.run(load(leaks.LeaksConfig, {"out": str(folder), "cohort": "other"}))


def test_findings_are_those_of_the_house():
    assert len(leaks.LABELS) == len(FINDINGS) == 14
