"""Notes: what a chart is made to say, what it is never made to say, and in which order."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.chart import PLAUSIBLE, VITALS, Chart, repair
from contracts.schema import COHORT
from pipelines.inputs import notes as module
from pipelines.inputs import wording
from pipelines.inputs.abbreviations import ABBREVIATIONS, TABLE, expand
from pipelines.inputs.leakage import LeakageConfig, scan
from pipelines.inputs.notes import NOTE_SEGMENTS, UNKNOWN, Note, NoteConfig, NoteWriter, write_notes

SIGNS: dict[str, Any] = {"temperature": 98.6, "heartrate": 112, "resprate": 22, "o2sat": 93, "sbp": 150, "dbp": 92, "pain": 7}
FULL: dict[str, Any] = {
    "age": 67,
    "sex": "F",
    "race": "ASIAN - KOREAN",
    "transport": "AMBULANCE",
    "chief_complaint": "CP, SOB",
    "acuity": 2,
    "bmi": 31.2,
    "triage": {"hours": -3, **SIGNS},
    "vitals": [{"hours": -0.5, "heartrate": 125, "o2sat": 95}, {"hours": -2, "heartrate": 118, "o2sat": 88}],
    "medicines": [
        {"name": "lisinopril"},
        {"name": "albuterol sulfate [ProAir HFA]"},
        {"name": "Albuterol Sulfate"},
        {"name": "HYDROmorphone (Dilaudid) 2mg TAB", "kind": "dispensed", "hours": -2},
        {"name": "Zoxitranol", "kind": "dispensed", "hours": -1},
    ],
    "labs": [
        {"name": "Sodium", "value": 138, "unit": "mEq/L", "abnormal": False, "hours": -1},
        {"name": "Lactate", "value": 4.0, "unit": "mmol/L", "abnormal": True, "hours": -2},
        {"name": "Lactate", "value": 2.4, "unit": "mmol/L", "abnormal": True, "hours": -1},
        {"name": "pH", "value": 7.21, "unit": "units", "abnormal": True, "hours": -1},
        {"name": "Zoxitase", "value": 9.5, "unit": "U/L", "abnormal": True, "hours": -1},
    ],
    "history": [
        {"code": "4019", "version": 9, "title": "HYPERTENSION NOS", "hours": -24 * 800},
        {"code": "I10", "version": 10, "title": "Hypertension", "hours": -24 * 900},
        {"code": "E119", "version": 10, "title": "Type 2 diabetes mellitus without complications", "hours": -24 * 92},
        {"code": "Y92009", "version": 10, "title": "Oth places as the place of occurrence", "hours": -24 * 92},
        {"code": "M109", "version": 10, "hours": -24 * 92},
    ],
}


def note(chart: dict[str, Any] | Chart, **settings: Any) -> Note:
    settings.setdefault("leakage", LeakageConfig(mode="off"))
    [made] = write_notes([chart if isinstance(chart, Chart) else Chart.model_validate(chart)], NoteConfig(**settings))
    return made


def told(made: Note, name: str) -> str:
    return next((s.text for s in made.segments if s.name == name), "")


def words(made: Note) -> str:
    return " ".join(s.text for s in made.segments)


def test_a_full_chart_reads_as_written_here():
    made = note(FULL)
    assert [s.name for s in made.segments] == ["triage", "presentation", "vitals", "medicines", "labs", "history"]
    assert [s.kind for s in made.segments] == ["raw"] + ["note"] * 5
    assert told(made, "triage") == "CP, SOB. T 98.6 F, HR 112, RR 22, SpO2 93 %, BP 150/92, pain 7, acuity 2."
    assert told(made, "presentation") == (
        "A 67-year-old woman arrived by ambulance with chest pain and shortness of breath. Emergency Severity Index 2 (emergent). "
        "Body mass index 31.2 kg/m2."
    )
    vitals = told(made, "vitals")
    assert (
        "Heart rate 112 beats/min at triage (fast), 125 beats/min half an hour before the study (fast, rising)." in vitals
        and "Temperature 98.6 F at triage." in vitals
        and "Blood pressure 150/92 mmHg at triage." in vitals
    )
    assert vitals.startswith(
        "Oxygen saturation 93 % at triage (low), 95 % half an hour before the study (slightly low, rising), lowest 88 %"
    )
    assert told(made, "medicines") == (
        "Given in this visit: Zoxitranol, hydromorphone (Dilaudid). Taken at home: albuterol sulfate, lisinopril."
    )
    assert told(made, "labs") == "Lactate 2.4 mmol/L (high). pH 7.21 (low). Zoxitase 9.5 U/L (abnormal). Sodium 138 mEq/L."
    assert told(made, "history") == (
        "Earlier diagnoses, 3 months before: ICD-10 M109; Type 2 diabetes mellitus without complications. 2 years before: hypertension."
    )


@pytest.mark.parametrize("missing", ["said", "left_out"])
def test_nothing_charted_is_one_segment_that_says_so(missing):
    made = note({}, missing=missing)
    assert [(s.kind, s.name, s.text) for s in made.segments] == [("note", "presentation", UNKNOWN)]


def test_what_is_missing_is_left_out_or_said():
    assert words(note({"chief_complaint": "Cough"})) == "Cough. A patient came with cough."
    said = note({"chief_complaint": "Cough", "triage": {"heartrate": 80}}, missing="said")
    assert "Temperature not recorded." in told(said, "vitals") and "Heart rate not recorded" not in words(said)
    assert told(said, "labs") == "No laboratory results recorded."
    assert "Chief complaint not recorded" not in words(said)
    assert "Sex not recorded." in told(said, "presentation")


@pytest.mark.parametrize(
    "hidden", ["age", "sex", "triage", "vitals", "chief_complaint", "medicines", "labs", "history", "transport", "acuity"]
)
def test_any_part_may_be_missing(hidden):
    made = note({k: v for k, v in FULL.items() if k != hidden})
    assert "None" not in words(made) and "nan" not in words(made) and "  " not in words(made)
    assert all(part.endswith((".", ",")) for s in made.segments for part in s.parts)


def test_race_is_never_told():
    assert "korean" not in words(note(FULL, missing="said")).lower() and "asian" not in words(note(FULL)).lower()


def test_the_indication_is_told_only_when_asked_for():
    row = {"chart_age": 50.0, "report_indication": "___F with DOE // r/o zoxosis", "report_findings": "secret"}
    chart = Chart.from_row(row, indication=True)
    assert Chart.from_row(row).indication is None
    assert "zoxosis" not in words(note(chart))
    assert told(note(chart, indication=True), "indication") == "Indication: woman with dyspnea on exertion; rule out zoxosis."
    assert told(note(Chart.from_row(row), indication=True), "indication") == ""


def _poisoned(field: Any, marks: list[str]) -> Any:
    """A value of the column's type that would show in a note: a marker word where it is text, an odd number where it is not."""
    kind = str(field.type)
    if "string" in kind and "list" not in kind:
        marks.append(f"poison{len(marks)}")
        return marks[-1]
    if "list" in kind:
        marks.append(f"poison{len(marks)}")
        return [{"code": marks[-1], "version": 10}]
    return 8765.4321 if "double" in kind else 1


def test_no_label_report_or_target_of_a_row_reaches_the_note():
    chart = Chart.model_validate(FULL)
    clean = {f"chart_{k}": v for k, v in chart.model_dump().items() if k != "indication"}
    marks: list[str] = []
    poison = {f.name: _poisoned(f, marks) for f in COHORT.columns if f.name.startswith(("label_", "report_", "target_"))}
    assert len(poison) > 25 and len(marks) > 8
    for missing in ("said", "left_out"):
        bad = note(Chart.from_row({**clean, **poison}), missing=missing, indication=True)
        assert bad == note(Chart.from_row(clean), missing=missing, indication=True)
        assert "poison" not in words(bad) and "8765" not in words(bad)
    asked = words(note(Chart.from_row({**clean, **poison}, indication=True), indication=True))
    assert [m for m in marks if m in asked] == [poison["report_indication"]]


def test_the_filter_runs_before_and_after_writing_out_and_is_counted(monkeypatch):
    """A stand-in that takes one word and its abbreviation's expansion."""

    class Taking:
        def __init__(self, cfg: LeakageConfig) -> None:
            pass

        def clean(self, text: str) -> tuple[str, dict[str, int]]:
            left, times = re.subn(r"\b(cough|pneumonia|zoxitranol)\b", "", text, flags=re.IGNORECASE)
            return " ".join(left.split()).strip(" ,"), {"finding:Test": times} if times else {}

    monkeypatch.setattr(module, "LeakageFilter", Taking)
    chart = {**FULL, "chief_complaint": "Cough, PNA", "history": [{"code": "486", "version": 9, "title": "PNEUMONIA"}]}
    cfg = NoteConfig(missing="said")
    [made] = NoteWriter(cfg)([Chart.model_validate(chart)])
    narrative = " ".join(s.text for s in made.segments if s.kind == "note").lower()
    assert not any(word in narrative for word in ("cough", "pneumonia", "pna", "zoxitranol", "withheld", "removed"))
    assert made.removed == {"finding:Test": 4}
    assert "Chief complaint not recorded." in told(made, "presentation")  # emptied is as if it had not been charted
    assert told(made, "history") == "No earlier diagnoses recorded."
    assert "Cough, PNA" in told(made, "triage")  # the raw segment is as charted
    [nothing] = NoteWriter(cfg)([Chart.model_validate({"chief_complaint": "PNA"})])
    assert [s.text for s in nothing.segments] == ["PNA.", UNKNOWN]


def test_a_title_that_loses_its_finding_goes_whole():
    """'Localized' of 'Localized edema' would say that something was there."""
    history = [{"code": "J90", "version": 10, "title": "PLEURAL EFFUSION NOS"}, {"code": "I10", "version": 10, "title": "Hypertension"}]
    made = note({"history": history, "chief_complaint": "? PNA, Cough, s/p pneumothorax"}, leakage=LeakageConfig())
    assert told(made, "history") == "Earlier diagnoses, at an unknown time: Hypertension."
    assert told(made, "presentation") == "A patient came with cough."
    assert sum(made.removed.values()) == 3


def test_parts_cut_from_the_end_leave_whole_sentences():
    many = {**FULL, "medicines": [{"name": f"medicine{i:02d}"} for i in range(11)]}
    for segment in note(many).segments:
        for n in range(1, len(segment.parts)):
            short = replace(segment, parts=segment.parts[:n])
            assert segment.text.startswith(short.text) and (segment.kind == "raw" or short.text.endswith("."))
    assert told(note(many), "medicines").count("Also taken at home:") == 2


def test_order_within_a_chart_does_not_matter_and_neither_do_the_others():
    turned = {**FULL, **{k: FULL[k][::-1] for k in ("vitals", "medicines", "labs", "history")}}
    assert note(turned) == note(FULL)
    charts = [Chart.model_validate(c) for c in (FULL, {}, turned)]
    cfg = NoteConfig(leakage=LeakageConfig(mode="off"))
    assert write_notes(charts, cfg) == [note(c) for c in charts]


@pytest.mark.parametrize(
    ("sign", "value", "word"),
    [  # NEWS2, chart 1: on both sides of each bound
        *(("heartrate", v, w) for v, w in ((40, "very slow"), (41, "slightly slow"), (50, "slightly slow"), (51, ""), (90, ""))),
        *(("heartrate", v, w) for v, w in ((91, "slightly fast"), (111, "fast"), (130, "fast"), (131, "very fast"))),
        *(("resprate", v, w) for v, w in ((8, "very slow"), (11, "slightly slow"), (12, ""), (20, ""), (21, "fast"), (25, "very fast"))),
        *(("o2sat", v, w) for v, w in ((91, "very low"), (92, "low"), (94, "slightly low"), (96, ""))),
        *(("sbp", v, w) for v, w in ((90, "very low"), (91, "low"), (100, "low"), (101, "slightly low"), (110, "slightly low"))),
        *(("sbp", v, w) for v, w in ((111, ""), (180, ""), (181, "high"), (219, "high"), (220, "very high"))),
        *(("temperature", v, w) for v, w in ((95.0, "very low"), (96.8, "slightly low"), (97.0, ""), (100.4, ""))),
        *(("temperature", v, w) for v, w in ((100.6, "slightly high"), (102.4, "high"))),
    ],
)  # fmt: skip
def test_abnormal_vital_signs_have_the_words_of_news2(sign, value, word):
    text = told(note({"triage": {sign: value}}), "vitals")
    assert text.endswith(f"at triage ({word})." if word else "at triage.")


@pytest.mark.parametrize(
    ("charted", "written"),
    [
        ("Ondansetron 4mg/2mL 2mL VIAL", "Ondansetron"),
        ("Vancomyci 1000mg/200mL 200mL BAG", "vancomycin"),
        ("HYDROmorphone (D 1mg/1mL 1mL SYR", "hydromorphone"),
        ("MetRONIDAZOLE (Flagyl)", "metronidazole (Flagyl)"),
        ("CefTRIAXone (Mini Bag Plus)", "ceftriaxone"),
        ("Lidocaine 5% Patch 1PTCH PTCH", "Lidocaine 5%"),
        ("Hydrocodone-Acetamin(5mg-325mg)", "Hydrocodone-Acetamin"),
        ("acetaminophen [Mapap (acetaminophen)]", "acetaminophen"),
        ("cyanocobalamin (vitamin B-12) [Vitamin B-12]", "cyanocobalamin (vitamin B-12)"),
        ("polyethylene glycol 3350 [Miralax]", "polyethylene glycol 3350"),
        ("bupropion HCl", "bupropion HCl"),
        ("Zoxitran", "Zoxitran"),
        ("qyvolimab-zz", "qyvolimab-zz"),
        ("[Xylofen]", "[Xylofen]"),
    ],
)
def test_medicine_names(charted, written):
    assert wording.medicine(charted) == written
    assert wording.medicine(written) == written


@pytest.mark.parametrize(
    ("charted", "written"),
    [
        ("CP, SOB", "chest pain, shortness of breath"),
        ("SOB/ABNL LABS", "shortness of breath/abnormal labs"),
        ("Abd pain, n/v/d", "abdominal pain, nausea, vomiting, diarrhea"),
        ("s/p Fall, L Wrist pain", "after Fall, left wrist pain"),
        ("CP w/SOB", "chest pain with shortness of breath"),
        ("PAIN ALL OVER OR IN IT", "pain all over or in it"),
        ("all or nothing, si", "all or nothing, si"),
        ("SI", "suicidal ideation"),
        ("hepatitis B, vitamin B 12, 4 L of oxygen", "hepatitis B, vitamin B 12, 4 L of oxygen"),
        ("93% on RA", "93% on room air"),
        ("RA, MS", "RA, MS"),
        ("Absent, dmg", "Absent, dmg"),
    ],
)
def test_abbreviations(charted, written):
    assert expand(charted) == written


def test_every_abbreviation_has_a_source_and_an_end():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ABBREVIATIONS) >= 150
    assert all(row["source"] and len(row["abbreviation"]) >= 1 for row in rows)
    for row in rows:  # an expansion is not expanded again, so that writing out twice is writing out once
        assert expand(expand(row["abbreviation"])) == expand(row["abbreviation"]), row["abbreviation"]


@given(st.text(max_size=60), st.text(max_size=40), st.text(max_size=40))
def test_any_text_makes_a_note(complaint, medicine, title):
    chart = {"chief_complaint": complaint, "medicines": [{"name": medicine}], "history": [{"code": "A", "version": 9, "title": title}]}
    made = note(chart)
    assert made == note(json.loads(json.dumps(chart))) and {s.name for s in made.segments} <= {"triage", *NOTE_SEGMENTS}


@given(st.sampled_from(sorted(PLAUSIBLE)), st.floats() | st.none() | st.sampled_from(["7/10", "36.5", "UA"]))
def test_a_number_in_range_is_spared_repair_and_comes_out_alike(name, raw):
    """The Chart calls `repair` only where it would change something."""
    values, states = repair(name, np.array([raw], dtype=object))
    where = {"triage": {name: raw}} if name in VITALS else {name: raw}
    chart = Chart.model_validate(where)
    got = getattr(chart.triage if name in VITALS else chart, name)
    assert got == (None if np.isnan(values[0]) else values[0])
    assert len(chart.repaired) + len(chart.implausible) + len(chart.unreadable) == int(states[0] >= 2)


def test_a_row_is_still_validated():
    with pytest.raises(ValidationError, match="less than or equal to 0"):
        Chart.from_row({"chart_labs": [{"name": "Sodium", "value": 1.0, "hours": 2.0}]})


def _emergency_charts(folder: Path) -> list[tuple[Chart, set[str]]]:
    """Every visit of the emergency demo as a chart at its end, with the titles of the diagnoses it ended with."""
    ed = {n: pd.read_csv(folder / "ed" / f"{n}.csv.gz") for n in ("edstays", "triage", "vitalsign", "medrecon", "pyxis", "diagnosis")}
    ed = {n: t.astype(object).where(t.notna(), None) for n, t in ed.items()}
    by_stay: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name, table in ed.items():
        for record in table.to_dict("records"):
            by_stay.setdefault((name, record["stay_id"]), []).append(record)

    def rows(table: str, stay: int) -> list[dict[str, Any]]:
        return by_stay.get((table, stay), [])

    made, stays = [], ed["edstays"].to_dict("records")
    for stay in stays:
        end = pd.Timestamp(stay["outtime"])

        def hours(time: str, end: Any = end) -> float:
            return min(0.0, (pd.Timestamp(time) - end).total_seconds() / 3600)

        [triage] = rows("triage", stay["stay_id"])
        before = [s for s in stays if s["subject_id"] == stay["subject_id"] and s["outtime"] < stay["intime"]]
        chart = Chart.model_validate(
            {
                "sex": stay["gender"],
                "race": stay["race"],
                "transport": stay["arrival_transport"],
                "chief_complaint": triage["chiefcomplaint"],
                "acuity": triage["acuity"],
                "triage": {"hours": hours(stay["intime"]), **{v: triage[v] for v in VITALS}},
                "vitals": [{"hours": hours(r["charttime"]), **{v: r[v] for v in VITALS}} for r in rows("vitalsign", stay["stay_id"])],
                "medicines": [
                    {"name": r["name"], "kind": kind, "hours": hours(r["charttime"])}
                    for table, kind in (("medrecon", "reconciled"), ("pyxis", "dispensed"))
                    for r in rows(table, stay["stay_id"])
                    if r["name"]
                ],
                "history": [
                    {"code": d["icd_code"], "version": d["icd_version"], "title": d["icd_title"], "hours": hours(s["outtime"])}
                    for s in before
                    for d in rows("diagnosis", s["stay_id"])
                ],
            }
        )
        made.append((chart, {d["icd_title"] for d in rows("diagnosis", stay["stay_id"])}))
    return made


def test_every_visit_of_the_emergency_demo_has_a_note_without_its_own_diagnoses(shared_data):
    visits = _emergency_charts(shared_data / "mimic-iv-ed-demo-2.2")
    filtered = write_notes([chart for chart, _ in visits], NoteConfig())
    assert sum(sum(one.removed.values()) for one in filtered) > 50
    assert not any(scan(s.text) for one in filtered for s in one.segments if s.kind == "note")
    made = write_notes([chart for chart, _ in visits], NoteConfig(leakage=LeakageConfig(mode="off")))
    assert len(made) == len(visits) == 222 and sum(len(titles) for _, titles in visits) > 400
    for (chart, titles), one in zip(visits, made, strict=True):
        text = words(one).lower()
        assert UNKNOWN not in words(one) and "nan" not in re.findall(r"\w+", text)
        known = " ".join(
            [chart.chief_complaint or "", expand(chart.chief_complaint or ""), *(d.title or "" for d in chart.history)]
        ).lower()
        known += " " + " ".join(wording.diagnosis(d.title) for d in chart.history if d.title).lower()
        for title in titles:
            for form in {title.lower(), wording.diagnosis(title).lower()}:
                assert form in known or not re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text)


def test_prose_is_not_kept_in_memory_and_of_names_no_more_than_asked(monkeypatch):
    cleaned: list[str] = []

    class Noting:
        def __init__(self, cfg) -> None:
            pass

        def clean(self, text: str) -> tuple[str, dict[str, int]]:
            cleaned.append(text)
            return text, {}

    monkeypatch.setattr(module, "LeakageFilter", Noting)
    write = NoteWriter(NoteConfig(), cached=1)

    def times(*complaints: str) -> int:
        cleaned.clear()
        for complaint in complaints:
            write([Chart(chief_complaint=complaint)])
        return len(cleaned) // 2  # each is cleaned twice

    assert times("cough", "cough") == 1
    assert times("fever", "cough") == 2
    assert times("x" * 201, "x" * 201) == 2 and times("cough") == 0, "nor does it drive out what is kept"
