"""A chart -> its clinical feature vector: 45 numbers, as charted. Nothing is imputed or scaled here: both are fitted on train alone.

    name                                        unit, and what it is
    age                                         years
    sex_female                                  1 female, 0 male
    acuity                                      Emergency Severity Index, 1 (most urgent) to 5
    bmi                                         kg/m2
    arrived_by_ambulance                        1 by ambulance, 0 otherwise; missing where the arrival is not known
    triage_* , latest_*                         the seven vital signs at triage, and the last known of each at the study (triage counts):
                                                degrees Fahrenheit, beats/min, breaths/min, %, mmHg, mmHg, 0 to 10
    change_*                                    the last value after triage less that at triage, in the sign's unit; missing without both
    shock_index                                 latest heart rate / latest systolic pressure, beats/min per mmHg (Allgower and Burri 1967)
    pulse_pressure                              latest systolic less latest diastolic pressure, mmHg
    lowest_o2sat                                %, of triage and all sets since
    medicines_at_home, medicines_given,         how many names, names and codes are charted: 0 where none is, never missing
    earlier_diagnoses
    white_cells, platelets                      10^3/uL (K/uL)
    haemoglobin, albumin                        g/dL
    creatinine, urea_nitrogen, glucose          mg/dL
    sodium, potassium, bicarbonate              mEq/L
    lactate                                     mmol/L
    nt_probnp                                   pg/mL
    troponin_t                                  ng/mL
    inr, ph                                     no unit
    c_reactive_protein                          mg/L

A laboratory result counts by its MIMIC-IV name, in its unit or in none; one in another unit is missing rather than wrong by a factor.
Race, labels and targets are no part of it.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from contracts.chart import VITALS, Chart, Lab, Vitals

CHANGES = ("heartrate", "resprate", "o2sat", "sbp")

# Feature -> (name in MIMIC-IV's hosp/d_labitems, units in which its number means the same).
LABS: dict[str, tuple[str, tuple[str, ...]]] = {
    "white_cells": ("white blood cells", ("k/ul", "10^3/ul", "10^9/l")),
    "haemoglobin": ("hemoglobin", ("g/dl",)),
    "platelets": ("platelet count", ("k/ul", "10^3/ul", "10^9/l")),
    "creatinine": ("creatinine", ("mg/dl",)),
    "urea_nitrogen": ("urea nitrogen", ("mg/dl",)),
    "sodium": ("sodium", ("meq/l", "mmol/l")),
    "potassium": ("potassium", ("meq/l", "mmol/l")),
    "bicarbonate": ("bicarbonate", ("meq/l", "mmol/l")),
    "glucose": ("glucose", ("mg/dl",)),
    "lactate": ("lactate", ("mmol/l",)),
    "nt_probnp": ("ntprobnp", ("pg/ml", "ng/l")),
    "troponin_t": ("troponin t", ("ng/ml", "ug/l")),
    "albumin": ("albumin", ("g/dl",)),
    "inr": ("inr(pt)", ()),
    "c_reactive_protein": ("c-reactive protein", ("mg/l",)),
    "ph": ("ph", ("units",)),
}
CLINICAL: tuple[str, ...] = (
    *("age", "sex_female", "acuity", "bmi", "arrived_by_ambulance"),
    *(f"triage_{v}" for v in VITALS),
    *(f"latest_{v}" for v in VITALS),
    *(f"change_{v}" for v in CHANGES),
    *("shock_index", "pulse_pressure", "lowest_o2sat", "medicines_at_home", "medicines_given", "earlier_diagnoses"),
    *LABS,
)
_LAB_COLUMN = {name: i for i, (name, _) in enumerate(LABS.values())}
_LAB_UNITS = [frozenset(units) for _, units in LABS.values()]
_NO_VITALS = Vitals.model_validate({})
_CHANGED = [VITALS.index(v) for v in CHANGES]


def clinical(charts: Sequence[Chart]) -> tuple[np.ndarray, np.ndarray]:
    """-> (values float32 [n, 45] in the order of CLINICAL, NaN where not known; known bool [n, 45])."""
    n, width = len(charts), len(VITALS)
    person = _table([_person(c) for c in charts], 5)
    triage = _table([_signs(c.triage or _NO_VITALS) for c in charts], width)
    later = _table([_last(c.vitals, c.triage) for c in charts], width)
    counts = _table([_counts(c) for c in charts], 3)
    lowest = _table([[_lowest(c)] for c in charts], 1)
    labs = _table([_labs(c.labs) for c in charts], len(LABS))
    latest = np.where(np.isnan(later), triage, later)
    at = {v: latest[:, i] for i, v in enumerate(VITALS)}
    derived = np.stack([at["heartrate"] / at["sbp"], at["sbp"] - at["dbp"]], axis=1) if n else np.zeros((0, 2))
    values = np.hstack([person, triage, latest, (later - triage)[:, _CHANGED], derived, lowest, counts, labs]).astype(np.float32)
    assert values.shape == (n, len(CLINICAL))
    return values, ~np.isnan(values)


def _table(rows: list[list[float | None]], width: int) -> np.ndarray:
    """None -> NaN. float64 [n, width], so that differences are taken before rounding to float32."""
    return np.array(rows, np.float64).reshape(len(rows), width)


def _person(chart: Chart) -> list[float | None]:
    sex = None if chart.sex is None else float(chart.sex == "F")
    arrival = (chart.transport or "").strip().upper()
    ambulance = None if arrival in ("", "UNKNOWN") else float(arrival == "AMBULANCE")
    return [chart.age, sex, chart.acuity, chart.bmi, ambulance]


def _signs(v: Vitals) -> list[float | None]:
    return [v.temperature, v.heartrate, v.resprate, v.o2sat, v.sbp, v.dbp, v.pain]


def _hours(entry: Vitals | Lab) -> float:
    """What has no time is older than what has one."""
    return -np.inf if entry.hours is None else entry.hours


def _last(vitals: Iterable[Vitals], triage: Vitals | None) -> list[float | None]:
    """The last value of each sign after triage; a set from before the patient's arrival is not later."""
    since = -np.inf if triage is None or triage.hours is None else triage.hours
    last: list[float | None] = [None] * len(VITALS)
    for v in sorted(vitals, key=_hours):
        if _hours(v) >= since or v.hours is None:
            last = [old if new is None else new for old, new in zip(last, _signs(v), strict=True)]
    return last


def _lowest(chart: Chart) -> float | None:
    known = [v.o2sat for v in (chart.triage, *chart.vitals) if v is not None and v.o2sat is not None]
    return min(known, default=None)


def _counts(chart: Chart) -> list[float | None]:
    home = {m.name.lower() for m in chart.medicines if m.kind == "reconciled"}
    given = {m.name.lower() for m in chart.medicines if m.kind == "dispensed"}
    return [float(len(home)), float(len(given)), float(len({(d.code, d.version) for d in chart.history}))]


def _labs(labs: Iterable[Lab]) -> list[float | None]:
    """The newest number of each test, in a unit that it may have."""
    values: list[float | None] = [None] * len(LABS)
    times = [-np.inf] * len(LABS)
    for lab in labs:
        i = _LAB_COLUMN.get(lab.name.lower())
        if i is None or lab.value is None or (lab.unit and lab.unit.lower() not in _LAB_UNITS[i]):
            continue
        if values[i] is None or _hours(lab) > times[i]:
            values[i], times[i] = lab.value, _hours(lab)
    return values
