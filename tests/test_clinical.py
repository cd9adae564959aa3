"""The clinical feature vector, against charts worked by hand."""

import numpy as np
import pytest

from contracts.chart import VITALS, Chart
from contracts.schema import COHORT
from pipelines.inputs.clinical import CLINICAL, LABS, clinical

NOTHING = Chart.model_validate({})
CHART = Chart.model_validate(
    {
        "age": 67,
        "sex": "F",
        "race": "WHITE",
        "transport": "AMBULANCE",
        "acuity": 2,
        "bmi": 31.5,
        "triage": {"hours": -4, "temperature": 37, "heartrate": 112, "resprate": 22, "o2sat": 93, "sbp": 150, "dbp": 92, "pain": 7},
        "vitals": [
            {"hours": -0.5, "heartrate": 125, "o2sat": 91, "sbp": 100, "dbp": 60},
            {"hours": -2, "heartrate": 118, "resprate": 28, "o2sat": 86, "sbp": 130, "dbp": 80},
            {"hours": -5, "pain": 1},  # before arrival: not later than triage
        ],
        "medicines": [
            {"name": "aspirin"},
            {"name": "Aspirin"},
            {"name": "furosemide"},
            {"name": "CefTRIAXone", "kind": "dispensed", "hours": -1},
        ],
        "labs": [
            {"name": "Lactate", "value": 4.0, "unit": "mmol/L", "hours": -3},
            {"name": "Lactate", "value": 2.5, "unit": "mmol/L", "hours": -1},
            {"name": "Lactate", "value": None, "unit": "mmol/L", "hours": -0.5},
            {"name": "Hemoglobin", "value": 108, "unit": "g/L", "hours": -1},
            {"name": "INR(PT)", "value": 1.4, "hours": -1},
            {"name": "Zoxitase", "value": 9, "hours": -1},
        ],
        "history": [{"code": "I10", "version": 10}, {"code": "I10", "version": 10, "hours": -900}, {"code": "4019", "version": 9}],
    }
)


def vector(chart: Chart) -> dict[str, float]:
    values, known = clinical([chart])
    np.testing.assert_array_equal(known, ~np.isnan(values))
    return dict(zip(CLINICAL, values[0].tolist(), strict=True))


def test_a_chart_worked_by_hand():
    got = vector(CHART)
    want = {
        "age": 67, "sex_female": 1, "acuity": 2, "bmi": 31.5, "arrived_by_ambulance": 1,
        "triage_temperature": 98.6, "triage_heartrate": 112, "triage_resprate": 22, "triage_o2sat": 93, "triage_sbp": 150,
        "triage_dbp": 92, "triage_pain": 7,
        "latest_temperature": 98.6, "latest_heartrate": 125, "latest_resprate": 28, "latest_o2sat": 91, "latest_sbp": 100,
        "latest_dbp": 60, "latest_pain": 7,
        "change_heartrate": 13, "change_resprate": 6, "change_o2sat": -2, "change_sbp": -50,
        "shock_index": 1.25, "pulse_pressure": 40, "lowest_o2sat": 86,
        "medicines_at_home": 2, "medicines_given": 1, "earlier_diagnoses": 2,
        "lactate": 2.5, "inr": 1.4,
    }  # fmt: skip
    assert {name: value for name, value in got.items() if not np.isnan(value)} == pytest.approx(want)


def test_nothing_charted_is_nan_and_counts_of_zero():
    got = vector(NOTHING)
    assert {name for name, value in got.items() if not np.isnan(value)} == {"medicines_at_home", "medicines_given", "earlier_diagnoses"}
    assert got["medicines_given"] == 0


def test_triage_alone_is_the_latest_and_has_no_change():
    got = vector(Chart.model_validate({"triage": {"heartrate": 100, "sbp": 125}}))
    assert got["latest_heartrate"] == 100 and got["shock_index"] == pytest.approx(0.8)
    assert np.isnan(got["change_heartrate"]) and np.isnan(got["pulse_pressure"])


@pytest.mark.parametrize(("transport", "value"), [("WALK IN", 0), ("ambulance", 1), ("HELICOPTER", 0), ("UNKNOWN", None), (None, None)])
def test_arrival(transport, value):
    got = vector(Chart.model_validate({"transport": transport}))["arrived_by_ambulance"]
    assert np.isnan(got) if value is None else got == value


def test_a_number_in_another_unit_is_missing_and_in_an_equal_one_counts():
    got = vector(
        Chart.model_validate(
            {"labs": [{"name": "Sodium", "value": 140, "unit": "mmol/L"}, {"name": "Glucose", "value": 6.1, "unit": "mmol/L"}]}
        )
    )
    assert got["sodium"] == 140 and np.isnan(got["glucose"])


def test_a_batch_is_its_charts_one_by_one_and_race_changes_nothing():
    other = CHART.model_copy(update={"race": "BLACK/AFRICAN AMERICAN", "indication": "r/o everything"})
    values, known = clinical([CHART, NOTHING, other])
    assert values.dtype == np.float32 and known.dtype == np.bool_ and values.shape == known.shape == (3, 45)
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(values[1], clinical([NOTHING])[0][0])
    assert clinical([])[0].shape == (0, 45)


def test_names_are_distinct_and_no_target_or_label_is_one():
    assert len(set(CLINICAL)) == len(CLINICAL) == 45
    assert set(CLINICAL) & {n for n in COHORT.columns.names if not n.startswith("chart_")} == set()
    assert not any("race" in name for name in CLINICAL)
    assert set(LABS) < set(CLINICAL) and all(f"triage_{v}" in CLINICAL for v in VITALS)
