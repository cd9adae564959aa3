"""The Chart: what was known of a patient before the study, and the one place where its values are repaired.

A cohort row, a JSON request and a form all become this record, through `repair`, so that training and serving see equal
values. Times are hours before the study: -2.5 was known two and a half hours before it; nothing is positive.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from contracts.config import Config

# Bounds outside which a number is taken for an error of entry. Chosen for this project a little wider than what an adult has
# survived; narrower than the open bounds of MIMIC-Extract (Wang et al. 2020, arXiv:1907.08322), which would let the 10 % saturations
# of MIMIC-IV-ED through. Units: Fahrenheit, beats/min, breaths/min, %, mmHg, 0 to 10, Emergency Severity Index 1 to 5.
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "temperature": (77.0, 113.0),
    "heartrate": (10.0, 300.0),
    "resprate": (3.0, 80.0),
    "o2sat": (40.0, 100.0),
    "sbp": (40.0, 300.0),
    "dbp": (10.0, 200.0),
    "pain": (0.0, 10.0),
    "acuity": (1.0, 5.0),
    "age": (0.0, 120.0),
    "bmi": (8.0, 120.0),
    "height_cm": (40.0, 250.0),
    "weight_kg": (1.0, 500.0),
}
CELSIUS = (25.0, 45.0)  # a temperature in this range was charted in Celsius: no living person has 45 F
VITALS = ("temperature", "heartrate", "resprate", "o2sat", "sbp", "dbp", "pain")

MISSING, OK, REPAIRED, IMPLAUSIBLE, UNREADABLE = range(5)
STATES = ("missing", "ok", "repaired", "implausible", "unreadable")


def repair(name: str, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of one quantity as charted -> (float64 values, NaN where there is none; int8 states, indices into STATES).

    Celsius becomes Fahrenheit, '7/10' becomes 7, a number out of bounds and a text that is no number become NaN. Idempotent.
    raw: shape [n], floats or strings or None.
    """
    raw = np.asarray(raw)
    if raw.dtype.kind in "fiu":
        values = raw.astype(np.float64)
        states = np.where(np.isfinite(values), OK, MISSING).astype(np.int8)
    else:
        known = {entry: _read(entry) for entry in set(raw.tolist())}  # of a million entries of pain, fifty are distinct
        values = np.array([known[entry][0] for entry in raw.tolist()], np.float64)
        states = np.array([known[entry][1] for entry in raw.tolist()], np.int8)
    low, high = PLAUSIBLE[name]
    if name == "temperature":
        celsius = (values >= CELSIUS[0]) & (values <= CELSIUS[1])
        values[celsius] = np.round(values[celsius] * 9 / 5 + 32, 1)
        states[celsius] = REPAIRED
    wild = ~np.isnan(values) & ~((values >= low) & (values <= high))
    values[wild], states[wild] = np.nan, IMPLAUSIBLE
    return values, states


def _read(entry: Any) -> tuple[float, int]:
    """One entry as charted -> (number or NaN, state before its range is looked at)."""
    if entry is None:
        return np.nan, MISSING
    if isinstance(entry, str):
        text = entry.strip()
        if not text:
            return np.nan, MISSING
        share, slash, of = text.partition("/")
        try:
            value = float(share)
        except ValueError:
            return np.nan, UNREADABLE
        if slash and of.strip() != "10":
            return np.nan, UNREADABLE
        return (value, REPAIRED if slash else OK) if np.isfinite(value) else (np.nan, UNREADABLE)
    try:
        value = float(entry)
    except OverflowError:  # an integer of hundreds of digits
        return np.nan, IMPLAUSIBLE
    return (value, OK) if np.isfinite(value) else (np.nan, MISSING)


class Vitals(Config):
    """One set of vital signs."""

    hours: float | None = Field(None, le=0, description="hours before the study, zero or negative")
    temperature: float | None = Field(None, description="degrees Fahrenheit (Celsius is converted)")
    heartrate: float | None = Field(None, description="beats a minute")
    resprate: float | None = Field(None, description="breaths a minute")
    o2sat: float | None = Field(None, description="peripheral oxygen saturation, %")
    sbp: float | None = Field(None, description="systolic blood pressure, mmHg")
    dbp: float | None = Field(None, description="diastolic blood pressure, mmHg")
    pain: float | None = Field(None, description="0 to 10")


class Medicine(Config):
    name: str
    kind: Literal["reconciled", "dispensed"] = "reconciled"  # taken at home; given in this visit
    hours: float | None = Field(None, le=0)


class Lab(Config):
    name: str
    value: float | None = None
    unit: str | None = None
    abnormal: bool | None = None
    hours: float | None = Field(None, le=0, description="when the result was stored, not when the blood was drawn")


class Diagnosis(Config):
    """A code of an earlier visit. ICD-9 and ICD-10 share strings, so a code without its version means nothing."""

    code: str
    version: Literal[9, 10]
    title: str | None = None
    hours: float | None = Field(None, le=0, description="when that visit ended")


class Chart(Config):
    """All that may become an input besides the image. Every field may be missing."""

    age: float | None = None
    sex: Literal["F", "M"] | None = None
    race: str | None = None
    transport: str | None = None
    chief_complaint: str | None = None
    indication: str | None = Field(None, description="why the image was asked for, where the setting allows it; never filled unless asked")
    acuity: float | None = Field(None, description="Emergency Severity Index, 1 (most urgent) to 5")
    bmi: float | None = None
    height_cm: float | None = None
    weight_kg: float | None = None
    triage: Vitals | None = None
    vitals: list[Vitals] = []
    medicines: list[Medicine] = []
    labs: list[Lab] = []
    history: list[Diagnosis] = []
    repaired: list[str] = Field([], description="quantities whose unit or form was mended, such as 'triage.temperature'")
    implausible: list[str] = Field([], description="quantities whose number was out of bounds and is missing now")
    unreadable: list[str] = Field([], description="quantities that held a text, which is missing now")

    @model_validator(mode="before")
    @classmethod
    def _repair(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        said = {s: data.get(STATES[s]) for s in (REPAIRED, IMPLAUSIBLE, UNREADABLE)}
        if not all(names is None or isinstance(names, list) for names in said.values()):
            return data  # what is no list is refused below, by its name
        found: dict[int, list[str]] = {s: list(names or []) for s, names in said.items()}

        def mend(group: Mapping[str, Any], prefix: str) -> dict[str, Any]:
            group = dict(group)
            for name in PLAUSIBLE:
                raw = group.get(name)
                low, high = PLAUSIBLE[name]
                # None and a number within its range are what `repair` would give back, as all numbers of a cohort row are: spare the call.
                if raw is None or (type(raw) is float and low <= raw <= high):
                    continue
                if isinstance(raw, bool) or not isinstance(raw, Real | str):
                    group[name] = [raw]  # no quantity: pydantic refuses it by its name, which it would not do with a bool
                    continue
                values, states = repair(name, np.array([raw], dtype=object))
                group[name] = None if np.isnan(values[0]) else float(values[0])
                if states[0] in found:
                    found[int(states[0])].append(prefix + name)
            return group

        data = mend(data, "")
        if isinstance(data.get("triage"), Mapping):
            data["triage"] = mend(data["triage"], "triage.")
        if isinstance(data.get("vitals"), list):
            data["vitals"] = [mend(v, "vitals.") if isinstance(v, Mapping) else v for v in data["vitals"]]
        return {**data, **{STATES[s]: names for s, names in found.items()}}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], indication: bool = False) -> "Chart":
        """A cohort row (its `chart_*` columns) -> the chart; `report_indication` is read only when asked for."""
        known = {f: value for f in cls.model_fields if (value := row.get(f"chart_{f}")) is not None}
        known.pop("indication", None)
        return cls.model_validate({**known, "indication": row.get("report_indication")} if indication else known)


# A cohort's columns that `Chart.from_row` reads; the indication, which is the report's, only where it is asked for.
CHART_COLUMNS = tuple(f"chart_{name}" for name in Chart.model_fields if name != "indication")
