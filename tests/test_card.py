"""Every number on the data card of a synthetic cohort is what the generator says it made."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from contracts.chart import VITALS
from contracts.config import load
from contracts.dataset import open_dataset
from contracts.findings import FINDINGS, label_column
from contracts.storage import place
from pipelines.cohort.job import CohortConfig, run
from pipelines.synthetic import job as synthetic

STATES = {"positive": 1, "negative": 0, "uncertain": -1}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("card")
    synthetic.run(synthetic.SynthConfig(out=str(out), patients=80, size=128, seed=4))
    return out / "mimic"


@pytest.fixture(scope="module", params=["one_frontal", "all"])
def made(request, tree, tmp_path_factory) -> tuple[dict, pd.DataFrame, pd.DataFrame, Path]:
    """(the card, the generator's word on every image, the same of those that should be rows, where the cohort is)."""
    out = tmp_path_factory.mktemp("out")
    card = run(load(CohortConfig, {"root": str(tree), "out": str(out), "images": request.param})).card
    truth = pd.read_parquet(tree / "truth/images.parquet")
    usable = truth.study_time.notna() & truth.split.notna()
    return card, truth, truth[truth.chosen] if request.param == "one_frontal" else truth[usable], out / "cohort"


def reason(image) -> str | None:
    if pd.isna(image.study_time):
        return "no_study_time"
    if pd.isna(image.split):
        return "no_split"
    if image.view == "":
        return "view_blank"
    return "view_not_frontal" if not image.frontal else None if image.chosen else "not_chosen"


def test_images_and_why_some_are_dropped(made):
    card, truth, rows, _ = made
    every = truth.apply(reason, axis=1)
    if len(rows) > rows.chosen.sum():
        every = every[every.isin(["no_study_time", "no_split"])]
    assert card["images"] == {"in_table": len(truth), "rows": len(rows), "dropped": every.value_counts().sort_index().to_dict()}
    assert (card["studies"], card["patients"]) == (rows.study_id.nunique(), rows.subject_id.nunique())


def test_splits_and_their_audit(made):
    card, _, rows, _ = made
    of = rows.groupby("split")
    assert card["splits"] == {s: {"images": len(g), "studies": g.study_id.nunique(), "patients": g.subject_id.nunique()} for s, g in of}
    assert set(card["audit"].values()) == {0}


def test_findings_by_split(made):
    card, _, rows, _ = made
    for finding in FINDINGS:
        column = label_column(finding)
        assert card["findings"][finding] == {
            s: {name: int((g[column] == value).sum()) for name, value in STATES.items()} | {"blank": int(g[column].isna().sum())}
            for s, g in rows.groupby("split")
        }
    assert card["without_label_row"] == (~rows.label_row).sum()


def test_views_and_reports(made):
    card, truth, rows, _ = made
    assert card["views"] == {"in_table": truth.view.value_counts().to_dict(), "rows": rows.view.value_counts().to_dict()}
    assert card["reports"] == {s: int((rows.report == s).sum()) for s in ("present", "short", "absent")}


def test_emergency_visits_and_their_times(made):
    card, _, rows, _ = made
    linked = rows[rows.stay_id.notna()]
    assert (card["ed"]["linked"], card["ed"]["triage_known"]) == (len(linked), rows.triage_known.sum())
    assert card["ed"]["coverage"] == pytest.approx(len(linked) / len(rows))
    wanted = np.quantile(linked.stay_offset_hours, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    np.testing.assert_allclose(list(card["ed"]["offset_hours"].values()), wanted, atol=1e-6)


def test_every_image_has_its_own_visit_and_age(made):
    _, _, rows, where = made
    table = open_dataset(place(where)).table(["row_id", "stay_id", "hadm_id", "chart_age"]).to_pandas().set_index("row_id")
    wanted = rows.set_index("dicom_id").loc[table.index]
    for name in ("stay_id", "hadm_id"):
        pd.testing.assert_series_equal(table[name].astype(float), wanted[name].astype(float), check_names=False, check_index_type=False)
    assert (table.chart_age == wanted.age).all()


def test_what_the_charts_hold(made):
    card, _, rows, _ = made
    assert card["chart"] == {
        "vitals": rows.known_vitals.sum(),
        "medicines": rows.known_reconciled.sum() + rows.known_dispensed.sum(),
        "labs": rows.known_labs.sum(),
        "history": rows.known_history.sum(),
        "dispensed": rows.known_dispensed.sum(),
    }


def test_what_is_missing(made):
    card, _, rows, _ = made
    arrived = rows.triage_known
    never = {name: int((~rows.measured.astype(bool)).sum()) for name in ("bmi", "height_cm", "weight_kg")}
    counts = {"vitals": rows.known_vitals, "medicines": rows.known_reconciled + rows.known_dispensed, "labs": rows.known_labs}
    expected = {
        **dict.fromkeys(("age", "sex"), 0),
        **dict.fromkeys(("race", "transport", "triage"), int((~arrived).sum())),
        "chief_complaint": int((~rows.complaint_known).sum()),
        "acuity": int((~rows.acuity_known).sum()),
        **never,
        **{name: int((n == 0).sum()) for name, n in counts.items()},
        "history": int((rows.known_history == 0).sum()),
        **{f"triage.{q}": int((~rows[f"triage_{q}"].isin(["ok", "repaired"])).sum()) for q in VITALS},
    }
    assert card["missing"] == expected


def test_what_was_repaired(made):
    card, _, rows, _ = made
    for state in ("repaired", "implausible", "unreadable"):
        triage = {f"triage.{q}": int((rows[f"triage_{q}"] == state).sum()) for q in VITALS}
        series = {f"vitals.{q}": sum(cells.tolist().count(f"{q} {state}") for cells in rows.vitals_mended) for q in VITALS}
        assert card["repairs"][state] == {name: n for name, n in sorted((triage | series).items()) if n}
        assert sum(series.values()) == rows[f"vitals_{state}"].sum()


def test_outcomes(made):
    card, _, rows, _ = made
    visit = rows.stay_id.notna() | rows.hadm_id.notna()
    for target in ("icu", "death", "hospitalised"):
        yes = (rows[f"target_{target}"].fillna(False).astype(bool) & visit).sum()
        assert card["targets"][target] == {"yes": yes, "no": visit.sum() - yes, "unknown": (~visit).sum()}
