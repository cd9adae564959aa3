"""A chart -> a short clinical narrative, in segments that are embedded each by itself.

    [note] = NoteWriter(NoteConfig())([chart])
    for segment in note.segments: print(segment.name, segment.text)

Free text (complaint, indication, arrival, names of medicines, laboratory tests and diagnoses) passes the leakage filter twice: as
charted, and with its abbreviations written out. What the filter empties is as if it had not been charted.

Race is never told: it stands in the chart for evaluation by subgroup alone. In a note it would be a proxy for what a patient got, not
for what a patient has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Literal, TypeAlias, TypeVar

from contracts.chart import Chart, Diagnosis, Lab, Medicine, Vitals
from contracts.config import Config
from pipelines.inputs import vitals, wording
from pipelines.inputs.abbreviations import expand
from pipelines.inputs.leakage import LeakageConfig, LeakageFilter
from pipelines.inputs.wording import number

NOTE_SEGMENTS = ("presentation", "indication", "vitals", "medicines", "labs", "history")  # in order of priority: the last are cut first
RAW_SEGMENT = "triage"
UNKNOWN = "Nothing is known of this patient before the study."
CACHED = 1 << 16  # distinct entries of a kind that are kept written out: MIMIC-IV-ED has some 60,000 complaints
ENTRY = 200  # characters; a longer one is prose, which nobody writes twice, and is not kept
TOGETHER = 4  # names in one part: enough to read as a sentence, few enough that cutting parts is fine-grained

# The five levels of the Emergency Severity Index, by their usual names.
ACUITY = {1: "resuscitation", 2: "emergent", 3: "urgent", 4: "less urgent", 5: "nonurgent"}
ARRIVALS = {"ambulance": "arrived by ambulance", "helicopter": "arrived by helicopter", "walk in": "walked in", "unknown": "", "other": ""}
PEOPLE = {"F": "woman", "M": "man", None: "patient"}


@dataclass(frozen=True, slots=True)
class Segment:
    """kind: 'raw' (as charted, unfiltered) or 'note' (narrative). parts: in falling importance, each with its own punctuation."""

    kind: str
    name: str
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.parts)


@dataclass(frozen=True, slots=True)
class Note:
    segments: tuple[Segment, ...]  # the raw one first, then the narrative as in NOTE_SEGMENTS
    removed: Mapping[str, int]  # rule of the leakage filter -> how often it took something


class NoteConfig(Config):
    missing: Literal["said", "left_out"] = "left_out"
    indication: bool = False  # the report's INDICATION section, where the chart carries one
    leakage: LeakageConfig = LeakageConfig()

    def unfiltered(self) -> "NoteConfig":
        """The same notes as they would stand without the filter."""
        return self.model_copy(update={"leakage": self.leakage.model_copy(update={"mode": "off"})})


@dataclass(frozen=True)
class LabTest:
    """How a test is named, and the value that parts flagged results: above it 'high', below it 'low'."""

    label: str
    middle: float
    unit: bool = True  # whether its unit is told


# Names and order are those of MIMIC-IV's hosp/d_labitems that a chest complaint calls for. `middle` lies in the reference ranges that
# MIMIC-IV demo 2.2 prints beside these results (hosp/labevents, ref_range_lower and _upper), where no flagged value lies.
LAB_TESTS = {
    "White Blood Cells": LabTest("White blood cells", 7), "NTproBNP": LabTest("NT-proBNP", 0), "Troponin T": LabTest("Troponin T", 0),
    "Lactate": LabTest("Lactate", 1.2), "C-Reactive Protein": LabTest("C-reactive protein", 0), "D-Dimer": LabTest("D-dimer", 0),
    "pH": LabTest("pH", 7.4, unit=False), "pO2": LabTest("pO2", 95), "pCO2": LabTest("pCO2", 40), "Hemoglobin": LabTest("Hemoglobin", 14),
    "Platelet Count": LabTest("Platelets", 275), "Creatinine": LabTest("Creatinine", 0.8), "Urea Nitrogen": LabTest("Urea nitrogen", 13),
    "Sodium": LabTest("Sodium", 139), "Potassium": LabTest("Potassium", 4.2), "Bicarbonate": LabTest("Bicarbonate", 27),
    "Chloride": LabTest("Chloride", 102), "Glucose": LabTest("Glucose", 85), "Albumin": LabTest("Albumin", 4.3),
    "INR(PT)": LabTest("INR", 1), "Bilirubin, Total": LabTest("Total bilirubin", 0.7),
}  # fmt: skip
_LAB_ORDER = {name: i for i, name in enumerate(LAB_TESTS)}

Cleaned: TypeAlias = tuple[str, dict[str, int]]
T = TypeVar("T")


class NoteWriter:
    """Writes notes; keeps each distinct entry cleaned and written out, because a million charts share a few thousand medicines."""

    def __init__(self, cfg: NoteConfig, cached: int = CACHED) -> None:
        """cached: as CACHED."""
        self.cfg = cfg
        clean = LeakageFilter(cfg.leakage).clean

        def twice(write: Callable[[str], str]) -> Callable[[str], Cleaned]:
            return _kept(lambda text: _clean_twice(clean, write, text), cached)

        self._written, self._medicine, self._diagnosis = twice(expand), twice(wording.medicine), twice(wording.diagnosis)
        self._lab, self._indication, self._code = twice(_lab_label), twice(wording.indication), twice(str)
        self._complaint = _kept(wording.complaint, cached)

    def __call__(self, charts: Sequence[Chart]) -> list[Note]:
        return [self._note(chart) for chart in charts]

    def _note(self, chart: Chart) -> Note:
        removed: dict[str, int] = {}

        def taken(cleaned: Cleaned) -> str:
            for rule, times in cleaned[1].items():
                removed[rule] = removed.get(rule, 0) + times
            return cleaned[0]

        complaint = taken(self._written(chart.chief_complaint)) if chart.chief_complaint else ""
        told = {
            "presentation": self._presentation(chart, taken(self._written(chart.transport)) if chart.transport else "", complaint),
            "indication": _indication(taken(self._indication(chart.indication))) if self.cfg.indication and chart.indication else [],
            "vitals": vitals.describe(chart.triage, chart.vitals),
            "medicines": self._medicines(chart.medicines, taken),
            "labs": self._labs(chart.labs, taken),
            "history": self._history(chart.history, taken),
        }
        if not any(told.values()):
            told["presentation"] = [UNKNOWN]
        elif self.cfg.missing == "said":
            for name, parts in _gaps(chart, bool(complaint), told).items():
                told[name] += parts
        segments = [Segment("raw", RAW_SEGMENT, raw)] if (raw := _raw(chart)) else []
        segments += [Segment("note", name, tuple(told[name])) for name in NOTE_SEGMENTS if told[name]]
        return Note(tuple(segments), removed)

    def _presentation(self, chart: Chart, arrival: str, complaint: str) -> list[str]:
        """arrival, complaint: as written out and cleaned."""
        came = ARRIVALS.get(arrival.lower(), f"arrived by {arrival}") if arrival else ""
        transfer, why = self._complaint(complaint)
        sent = ", sent from another hospital," if transfer else ""
        came = came or ("came" if sent or why else "")
        parts = []
        if chart.age is not None or chart.sex is not None or came:
            parts.append(" ".join(filter(None, (_who(chart.age, chart.sex) + sent, came, why))) + ".")
        if chart.acuity is not None:
            parts.append(f"Emergency Severity Index {number(chart.acuity)} ({ACUITY[int(chart.acuity)]}).")
        measures = (("Body mass index", chart.bmi, "kg/m2"), ("Height", chart.height_cm, "cm"), ("Weight", chart.weight_kg, "kg"))
        return parts + [f"{name} {number(value)} {unit}." for name, value, unit in measures if value is not None]

    def _medicines(self, medicines: Sequence[Medicine], taken: Callable[[Cleaned], str]) -> list[str]:
        """Given in this visit first, the newest first, as it answers to the present illness; taken at home by the alphabet."""
        given: dict[str, tuple[float, str]] = {}
        home: dict[str, str] = {}
        for m in medicines:
            name = taken(self._medicine(m.name))
            if not name:
                continue
            key = name.partition(" (")[0].lower()
            if m.kind == "dispensed":
                hours, known = given.get(key, (-1e9, ""))
                given[key] = (max(hours, -1e9 if m.hours is None else m.hours), _fuller(known, name))
            else:
                home[key] = _fuller(home.get(key, ""), name)
        newest = sorted(given, key=lambda key: (-given[key][0], key))
        at_home = sorted(home, key=lambda key: (wording.is_supply(key), key))
        return [
            *_sentences("Given in this visit: ", "Also given: ", ", ", [given[key][1] for key in newest]),
            *_sentences("Taken at home: ", "Also taken at home: ", ", ", [home[key] for key in at_home]),
        ]

    def _labs(self, labs: Sequence[Lab], taken: Callable[[Cleaned], str]) -> list[str]:
        """The newest value of each test, those flagged abnormal first."""
        newest: dict[str, Lab] = {}
        for lab in labs:
            before = newest.get(lab.name)
            if lab.value is not None and (before is None or _age(lab) > _age(before)):
                newest[lab.name] = lab
        parts = []
        for name in sorted(newest, key=lambda n: (not newest[n].abnormal, _LAB_ORDER.get(n, len(_LAB_ORDER)), n)):
            label = taken(self._lab(name))
            if label:
                parts.append(_lab_part(label, newest[name], LAB_TESTS.get(name)))
        return parts

    def _history(self, history: Sequence[Diagnosis], taken: Callable[[Cleaned], str]) -> list[str]:
        """Earlier diagnoses, the newest first, each once; those of one time together."""
        seen: set[str] = set()
        told: list[tuple[str, str]] = []
        for d in sorted(history, key=lambda d: (-d.hours if d.hours is not None else 1e9, d.title or d.code)):
            if wording.is_circumstance(d.code, d.version):
                continue
            cleaned = self._diagnosis(d.title) if d.title else self._code(f"ICD-{d.version} {d.code}")
            title = taken(cleaned)
            # A title is one statement: without its finding a scrap is left ('Localized', of an edema), which says that there was one.
            if title and not cleaned[1] and title.lower() not in seen:
                seen.add(title.lower())
                told.append((_ago(d.hours), title))
        parts: list[str] = []
        for ago, group in groupby(told, key=lambda t: t[0]):
            lead = f"{'' if parts else 'Earlier diagnoses, '}{ago}: "
            parts += _sentences(lead[0].upper() + lead[1:], f"Also {ago}: ", "; ", [title for _, title in group])
        return parts


def write_notes(charts: Sequence[Chart], cfg: NoteConfig) -> list[Note]:
    """The notes of charts, in their order. Deterministic: a chart's note does not depend on the others."""
    return _writer(cfg.model_dump_json())(charts)


@lru_cache(4)
def _writer(settings: str) -> NoteWriter:
    return NoteWriter(NoteConfig.model_validate_json(settings))


def _kept(write: Callable[[str], T], most: int) -> Callable[[str], T]:
    """`write`, which remembers so many entries."""
    known = lru_cache(most)(write)
    return lambda text: known(text) if len(text) <= ENTRY else write(text)


def _clean_twice(clean: Callable[[str], Cleaned], write: Callable[[str], str], text: str) -> Cleaned:
    """Cleaned as charted and again as written out: an abbreviation may hide from the filter, or a writing-out may uncover a term."""
    once, first = clean(text)
    again, second = clean(write(once)) if once.strip() else ("", {})
    return again.strip(), {rule: first.get(rule, 0) + second.get(rule, 0) for rule in (*first, *second)}


def _lab_label(name: str) -> str:
    return LAB_TESTS[name].label if name in LAB_TESTS else name


def _who(age: float | None, sex: str | None) -> str:
    if age is None:
        return f"A {PEOPLE[sex]}"
    years = int(age)
    article = "An" if years in (8, 11, 18) or 80 <= years < 90 else "A"
    return f"{article} {years}-year-old {PEOPLE[sex]}"


def _indication(text: str) -> list[str]:
    """Sentence by sentence, so that the last can be cut."""
    sentences = [s.strip() for s in text.replace("; ", ";\n").replace(". ", ".\n").split("\n") if s.strip()]
    if not sentences:
        return []
    sentences[-1] = sentences[-1].rstrip(".;,") + "."
    return [f"Indication: {sentences[0]}", *sentences[1:]]


def _age(entry: Lab) -> float:
    return entry.hours if entry.hours is not None else -1e9


def _ago(hours: float | None) -> str:
    if hours is None:
        return "at an unknown time"
    return f"{gap} before" if (gap := wording.span(hours)) else "just before"


def _fuller(known: str, name: str) -> str:
    """Of two spellings of one medicine the longer ('hydromorphone (Dilaudid)'), whichever came first."""
    return max(known, name, key=lambda n: (len(n), n))


def _sentences(first: str, more: str, comma: str, names: Sequence[str]) -> list[str]:
    """['Taken at home: a, b, c, d.', 'Also taken at home: e.']: each can stand without those after it."""
    chunks = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]
    return [f"{more if i else first}{comma.join(chunk)}." for i, chunk in enumerate(chunks)]


def _lab_part(label: str, lab: Lab, test: LabTest | None) -> str:
    unit = f" {lab.unit}" if lab.unit and (test is None or test.unit) else ""
    value = lab.value or 0.0
    flag = "" if not lab.abnormal else " (abnormal)" if test is None else " (high)" if value > test.middle else " (low)"
    return f"{label} {number(value)}{unit}{flag}."


def _raw(chart: Chart) -> tuple[str, ...]:
    """Complaint and triage as charted."""
    t = chart.triage or Vitals.model_construct()
    said = [
        (t.temperature, "T {} F"),
        (t.heartrate, "HR {}"),
        (t.resprate, "RR {}"),
        (t.o2sat, "SpO2 {} %"),
        (t.sbp, "SBP {}" if t.dbp is None else f"BP {{}}/{number(t.dbp)}"),
        (t.dbp if t.sbp is None else None, "DBP {}"),
        (t.pain, "pain {}"),
        (chart.acuity, "acuity {}"),
    ]
    numbers = [form.format(number(value)) for value, form in said if value is not None]
    complaint = (chart.chief_complaint or "").strip()
    parts = [complaint if complaint.endswith(".") else f"{complaint}."] if complaint else []
    return (*parts, *(f"{n}," for n in numbers[:-1]), *(f"{n}." for n in numbers[-1:]))


def _gaps(chart: Chart, complaint: bool, told: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """What a note says of what is not known. A complaint that the filter emptied is not known."""
    who = {"Age": chart.age, "Sex": chart.sex, "Chief complaint": complaint or None, "Acuity": chart.acuity}
    sets = [v for v in (chart.triage, *chart.vitals) if v is not None]
    signs = {s.label: next((x for v in sets if (x := getattr(v, s.name)) is not None), None) for s in vitals.SIGNS}
    lists = {"medicines": "No medicines recorded.", "labs": "No laboratory results recorded.", "history": "No earlier diagnoses recorded."}
    return {
        "presentation": [f"{what} not recorded." for what, value in who.items() if value is None],
        "vitals": [f"{what} not recorded." for what, value in signs.items() if value is None],
        **{name: [sentence] for name, sentence in lists.items() if not told[name]},
    }
