"""Vital signs as sentences: what was measured at triage, what last, where it went, and how far that is from normal."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from contracts.chart import Vitals
from pipelines.inputs.wording import number, when


@dataclass(frozen=True)
class Sign:
    """A vital sign and the words for its values: `words[i]` up to and without `bounds[i]`, the last from the last bound on."""

    name: str
    label: str
    unit: str
    step: float  # a smaller change is called steady: about twice what charting rounds to. Chosen for this project
    worst: Literal["lowest", "highest"] | None = None  # the extreme that is told where it is abnormal, the lowest saturation anyhow
    bounds: tuple[float, ...] = ()
    words: tuple[str, ...] = ("",)

    def word(self, value: float) -> str:
        return self.words[bisect_right(self.bounds, _celsius(value) if self.name == "temperature" else value)]


def _celsius(fahrenheit: float) -> float:
    return round((fahrenheit - 32) * 5 / 9, 1)


# Bounds: NEWS2 (Royal College of Physicians 2017, National Early Warning Score 2, chart 1), oxygen scale 1; a score of 1 is 'slightly',
# of 3 'very'. It scores no high blood pressure below 220: 'high' above 180 is the hypertensive crisis of the ACC/AHA guideline (Whelton
# et al. 2018, Hypertension 71:e13). The temperature's are in Celsius. In order of their weight for a chest film.
SIGNS = (
    Sign("o2sat", "Oxygen saturation", " %", 2, "lowest", (92, 94, 96), ("very low", "low", "slightly low", "")),
    Sign("resprate", "Respiratory rate", " breaths/min", 3, "highest", (9, 12, 21, 25),
         ("very slow", "slightly slow", "", "fast", "very fast")),
    Sign("heartrate", "Heart rate", " beats/min", 10, "highest", (41, 51, 91, 111, 131),
         ("very slow", "slightly slow", "", "slightly fast", "fast", "very fast")),
    Sign("temperature", "Temperature", " F", 1, "highest", (35.1, 36.1, 38.1, 39.1),
         ("very low", "slightly low", "", "slightly high", "high")),
    Sign("sbp", "Blood pressure", " mmHg", 15, "lowest", (91, 101, 111, 181, 220),
         ("very low", "low", "slightly low", "", "high", "very high")),
    Sign("pain", "Pain", " of 10", 2),
)  # fmt: skip


def describe(triage: Vitals | None, vitals: Iterable[Vitals]) -> list[str]:
    """A part for each sign: at triage, the latest, where it went, and the worst between; abnormal signs first."""
    later = sorted(vitals, key=lambda v: v.hours if v.hours is not None else -1e9)
    sets = ([(triage, True)] if triage is not None else []) + [(v, False) for v in later]
    if triage is not None and triage.hours is not None and later:  # a set charted before the patient's arrival is not the latest
        sets.sort(key=lambda s: s[0].hours if s[0].hours is not None else -1e9)
    parts = []
    for rank, sign in enumerate(SIGNS):
        series = [(value, v, at_triage) for v, at_triage in sets if (value := getattr(v, sign.name)) is not None]
        if series:
            parts.append((*_sign_part(sign, series), rank))
        elif sign.name == "sbp" and (low := [(value, v, t) for v, t in sets if (value := v.dbp) is not None]):
            parts.append((*_sign_part(Sign("dbp", "Diastolic blood pressure", " mmHg", sign.step), low), rank))
    return [text for _, text, _ in sorted(parts, key=lambda p: (-p[0], p[2]))]


def _sign_part(sign: Sign, series: list[tuple[float, Vitals, bool]]) -> tuple[int, str]:
    """(how far from normal, 'Heart rate 112 beats/min at triage (fast), 125 half an hour before the study (fast, rising).')"""
    first = next((s for s in series if s[2]), series[0])
    last = series[-1]
    said = [_measured(sign, first)]
    weight = _weight(sign.word(first[0]))
    if last is not first:
        change = last[0] - first[0]
        trend = "steady" if abs(change) < sign.step else "rising" if change > 0 else "falling"
        said.append(_measured(sign, last, trend))
        weight = max(weight, _weight(sign.word(last[0])))
    if sign.worst and len(series) > 2:
        worst = (min if sign.worst == "lowest" else max)(series, key=lambda s: s[0])
        word = sign.word(worst[0])
        if worst[0] not in (first[0], last[0]) and (word or sign.name == "o2sat"):
            said.append(f"{sign.worst} {_measured(sign, worst)}")
            weight = max(weight, _weight(word))
    return weight, f"{sign.label} {', '.join(said)}."


def _measured(sign: Sign, measured: tuple[float, Vitals, bool], trend: str = "") -> str:
    value, vitals, at_triage = measured
    text = f"{number(value)}{sign.unit}"
    if sign.name == "sbp":
        text = f"{number(value)}/{number(vitals.dbp)}{sign.unit}" if vitals.dbp is not None else f"{text} systolic"
    marks = ", ".join(filter(None, (sign.word(value), trend)))
    return f"{text} {'at triage' if at_triage else when(vitals.hours)}" + (f" ({marks})" if marks else "")


def _weight(word: str) -> int:
    return 0 if not word else 1 if word.startswith("slightly") else 3 if word.startswith("very") else 2
