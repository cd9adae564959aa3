"""The Chart: values repaired in one place, whatever they came as."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.chart import PLAUSIBLE, STATES, VITALS, Chart, repair
from contracts.schema import COHORT


@pytest.mark.parametrize(
    ("name", "raw", "value", "state"),
    [
        ("temperature", 36.5, 97.7, "repaired"),  # Celsius
        ("temperature", "98.6", 98.6, "ok"),
        ("temperature", 9.8, None, "implausible"),
        ("temperature", 986.0, None, "implausible"),
        ("dbp", 879, None, "implausible"),
        ("o2sat", 10, None, "implausible"),
        ("sbp", "11", None, "implausible"),
        ("pain", "7/10", 7.0, "repaired"),
        ("pain", "0/10", 0.0, "repaired"),
        ("pain", "13", None, "implausible"),
        ("pain", "Critical", None, "unreadable"),
        ("pain", "UA", None, "unreadable"),
        ("pain", "nan", None, "unreadable"),
        ("pain", " ", None, "missing"),
        ("pain", None, None, "missing"),
        ("heartrate", float("inf"), None, "missing"),
    ],
)
def test_repair(name, raw, value, state):
    values, states = repair(name, np.array([raw], dtype=object))
    assert STATES[states[0]] == state
    assert (np.isnan(values[0]) and value is None) or values[0] == pytest.approx(value)


@given(st.sampled_from(sorted(PLAUSIBLE)), st.lists(st.floats(width=32) | st.none() | st.text(max_size=5), min_size=1, max_size=8))
def test_repair_leaves_only_plausible_values_and_is_idempotent(name, entries):
    values, _ = repair(name, np.array(entries, dtype=object))
    low, high = PLAUSIBLE[name]
    known = values[~np.isnan(values)]
    assert ((known >= low) & (known <= high)).all()
    again, states = repair(name, values)
    np.testing.assert_array_equal(again, values)
    assert not (states >= STATES.index("repaired")).any()


def test_numbers_and_words_are_repaired_alike():
    numbers = np.array([36.5, 98.6, 9.8, np.nan])
    by_number, by_word = repair("temperature", numbers), repair("temperature", np.array(["36.5", "98.6", "9.8", None], dtype=object))
    np.testing.assert_array_equal(by_number[0], by_word[0])
    np.testing.assert_array_equal(by_number[1], by_word[1])


def test_a_request_and_a_row_become_the_same_chart():
    request = Chart.model_validate(
        {"age": 61, "triage": {"temperature": 36.5, "dbp": 879, "pain": "0/10"}, "vitals": [{"hours": -1, "o2sat": 10, "sbp": 120}]}
    )
    assert request.triage is not None and request.triage.temperature == 97.7 and request.triage.dbp is None
    assert set(request.repaired) == {"triage.temperature", "triage.pain"}
    assert set(request.implausible) == {"triage.dbp", "vitals.o2sat"}
    row = {f"chart_{name}": value for name, value in request.model_dump().items()}
    assert Chart.from_row(row) == request


def test_nothing_in_a_chart_lies_after_the_study():
    with pytest.raises(ValueError, match="less than or equal to 0"):
        Chart.model_validate({"vitals": [{"hours": 0.5, "sbp": 120}]})


def test_chart_and_cohort_name_the_same_things():
    columns = {name.removeprefix("chart_") for name in COHORT.columns.names if name.startswith("chart_")}
    assert columns == set(Chart.model_fields) - {"indication"}
    assert {f.name for f in COHORT.columns.field("chart_triage").type} == {"hours", *VITALS}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"age": [1]}, "age"),
        ({"age": True}, "age"),
        ({"vitals": [{"pain": [1]}]}, "vitals"),
        ({"repaired": 5}, "repaired"),
        ({"triage": 3}, "triage"),
    ],
)
def test_what_is_no_quantity_is_refused_by_its_name(wrong: dict, field: str):
    with pytest.raises(ValidationError) as refused:
        Chart.model_validate(wrong)
    assert {error["loc"][0] for error in refused.value.errors()} == {field}


def test_a_number_of_hundreds_of_digits_is_implausible():
    chart = Chart.model_validate({"age": 10**400})
    assert (chart.age, chart.implausible) == (None, ["age"])
