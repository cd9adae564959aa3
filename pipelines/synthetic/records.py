"""The plan as rows: the tables of MIMIC-CXR, of the emergency department and of the hospital, in PhysioNet's own columns."""

from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np

from contracts.findings import FINDINGS
from pipelines.synthetic.scene import Admission, Case, Image, Patient, Study
from pipelines.synthetic.signs import ICD_TITLES, LAB_ITEMS
from pipelines.synthetic.tables import CXR, ED, HOSP, ICU, JPG, Row, study_folder
from pipelines.synthetic.timeline import spread

_SPOKEN = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral", "LL": "left lateral", "AP AXIAL": "axial"}
_UNIT = "Medical Intensive Care Unit (MICU)"
_DIFFERS = 0.02  # share of the filled cells in which the two labellers differ


def _pictures(patients: list[Patient]) -> Iterator[tuple[Patient, Study, Image]]:
    return ((p, s, i) for p in patients for s in p.studies for i in s.images)


# --- MIMIC-CXR ---
def metadata(patients: list[Patient]) -> Iterator[Row]:
    for p, s, i in _pictures(patients):
        procedure = "CHEST (PORTABLE AP)" if i.view == "AP" else "CHEST (PA AND LAT)"
        # StudyTime is a float HHMMSS.frac: midnight's zeros are lost, as in the real table
        time = f"{float(f'{i.time:%H%M%S}') + i.fraction:.3f}" if i.time else None
        yield [i.dicom_id, p.subject_id, s.study_id, procedure, i.listed_view, i.size[1], i.size[0], f"{i.date:%Y%m%d}", time,
               procedure, _SPOKEN.get(i.listed_view, ""), "Erect" if i.view == "PA" else ""]  # fmt: skip


def split(patients: list[Patient]) -> Iterator[Row]:
    return ([i.dicom_id, s.study_id, p.subject_id, i.split] for p, s, i in _pictures(patients) if i.split)


def _label_cells(case: Case) -> list[str]:
    return [f"{case.states[f]:.1f}" if f in case.states else "" for f in FINDINGS]


def chexpert(patients: list[Patient]) -> Iterator[Row]:
    return ([p.subject_id, s.study_id, *_label_cells(s.case)] for p in patients for s in p.studies if s.labelled)


def negbio(patients: list[Patient]) -> Iterator[Row]:
    """As CheXpert's, but for the odd cell that this labeller missed or found doubtful."""
    rng = np.random.default_rng(len(patients))
    for row in chexpert(patients):
        missed = [k for k in range(2, len(row)) if row[k] and FINDINGS[k - 2] != "No Finding" and rng.random() < _DIFFERS]
        yield [("-1.0" if value == "1.0" else "") if k in missed else value for k, value in enumerate(row)]


def test_set(patients: list[Patient]) -> Iterator[Row]:
    """What radiologists said of every other study of the test split: no doubts left."""
    studies = [s for p in patients if p.split == "test" for s in p.studies]
    for s in studies[::2]:
        yield [s.study_id, *("1.0" if value == "-1.0" else value for value in _label_cells(s.case))]


def record_list(patients: list[Patient]) -> Iterator[Row]:
    for p, s, i in _pictures(patients):
        yield [p.subject_id, s.study_id, i.dicom_id, f"{study_folder(p.subject_id, s.study_id)}/{i.dicom_id}.dcm"]


def study_list(patients: list[Patient]) -> Iterator[Row]:
    return ([p.subject_id, s.study_id, study_folder(p.subject_id, s.study_id) + ".txt"] for p in patients for s in p.studies)


# --- the emergency department ---
def edstays(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for s in p.stays:
            arrival = "AMBULANCE" if s.acuity in ("1", "2") else "WALK IN"
            yield [p.subject_id, s.hadm_id, s.stay_id, s.intime, s.outtime, p.sex, p.race, arrival, s.disposition]


def triage(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for s in p.stays:
            if s.triage:
                yield [p.subject_id, s.stay_id, *s.triage.cells.values(), s.acuity, s.complaint.upper()]


def vitalsign(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for s in p.stays:
            for v in s.vitals:
                *measures, pain = v.cells.values()
                yield [p.subject_id, s.stay_id, v.time, *measures, v.rhythm, pain]


def medrecon(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for s in p.stays:
            for m in s.reconciled:  # what the pharmacy does not know has no codes, as '*acuvite' has none in MIMIC
                code = f"{sum(map(ord, m.group)):08d}" if m.group else None
                yield [p.subject_id, s.stay_id, m.time, m.name, "0", "0", 1, code, m.group or None]


def pyxis(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for s in p.stays:
            for i, m in enumerate(s.dispensed, 1):
                yield [p.subject_id, s.stay_id, m.time, i, m.name, 1, None]


def diagnosis(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for s in p.stays:
            for i, code in enumerate(s.diagnoses, 1):
                yield [p.subject_id, s.stay_id, i, *code, ICD_TITLES[code].upper()]


# --- the hospital ---
def people(patients: list[Patient]) -> Iterator[Row]:
    return ([p.subject_id, p.sex, p.age, p.anchor_year, p.anchor_group, p.dod] for p in patients)


def _admitted(patients: list[Patient]) -> Iterator[tuple[Patient, Admission]]:
    return ((p, a) for p in patients for a in p.admissions)


def admissions(patients: list[Patient]) -> Iterator[Row]:
    for p, a in _admitted(patients):
        place = "EMERGENCY ROOM" if a.stay else "PHYSICIAN REFERRAL"
        yield [p.subject_id, a.hadm_id, a.admittime, a.dischtime, a.death, "EW EMER." if a.stay else "DIRECT EMER.", "P0000X", place,
               "DIED" if a.death else "HOME", "Medicare" if p.age >= 65 else "Other", "ENGLISH", None, p.race,
               a.stay and a.stay.intime, a.stay and a.stay.outtime, int(a.death is not None)]  # fmt: skip


def diagnoses_icd(patients: list[Patient]) -> Iterator[Row]:
    return ([p.subject_id, a.hadm_id, i, *code] for p, a in _admitted(patients) for i, code in enumerate(a.codes, 1))


def labevents(patients: list[Patient]) -> Iterator[Row]:
    number = 0
    for p in patients:
        for lab in p.labs:
            number += 1
            item = LAB_ITEMS[lab.itemid]
            hadm = next((a.hadm_id for a in p.admissions if a.admittime <= lab.charttime <= a.dischtime), None)
            text = f"{lab.value:.{item.digits}f}"
            flag = None if item.low <= lab.value <= item.high else "abnormal"
            yield [number, p.subject_id, hadm, lab.specimen, lab.itemid, None, lab.charttime, lab.storetime, text, text, item.unit,
                   item.low, item.high, flag, "STAT", None]  # fmt: skip


def body_measures(p: Patient) -> Iterator[tuple[date, int, int]]:
    """(day, pounds, inches), measured in clinics before, between and after the studies."""
    rng = np.random.default_rng(p.subject_id)
    inches = round(rng.normal(64 if p.sex == "F" else 69, 2.5))
    pounds = (19 + 16 * p.body.fat) * inches**2 / 703
    for s in p.studies:
        day = s.time.date() + timedelta(days=int(rng.integers(-50, 20)))
        yield day, round(pounds * rng.uniform(0.95, 1.05)), inches


def omr(patients: list[Patient]) -> Iterator[Row]:
    for p in patients:
        for day, pounds, inches in body_measures(p):
            yield [p.subject_id, day, 1, "Weight (Lbs)", pounds]
            yield [p.subject_id, day, 1, "Height (Inches)", inches]
            yield [p.subject_id, day, 1, "BMI (kg/m2)", f"{pounds * 703 / inches**2:.1f}"]


def services(patients: list[Patient]) -> Iterator[Row]:
    return ([p.subject_id, a.hadm_id, a.admittime, None, "MED"] for p, a in _admitted(patients))


def transfers(patients: list[Patient]) -> Iterator[Row]:
    numbers = spread(30_000_000)
    for p, a in _admitted(patients):
        moves: list[tuple[str, str | None, datetime, datetime | None]] = []
        if a.stay:
            moves.append(("ED", "Emergency Department", a.stay.intime, a.admittime))
        moves.append(("admit", "Medicine", a.admittime, a.icu[1] if a.icu else a.dischtime))
        if a.icu:
            moves.append(("transfer", _UNIT, a.icu[1], a.icu[2]))
            moves.append(("transfer", "Medicine", a.icu[2], a.dischtime))
        moves.append(("discharge", None, a.dischtime, None))
        yield from ([p.subject_id, a.hadm_id, next(numbers), *move] for move in moves)


def icustays(patients: list[Patient]) -> Iterator[Row]:
    for p, a in _admitted(patients):
        if a.icu:
            stay_id, start, end = a.icu
            yield [p.subject_id, a.hadm_id, stay_id, _UNIT, _UNIT, start, end, (end - start) / timedelta(days=1)]


TABLES: dict[Path, Callable[[list[Patient]], Iterator[Row]]] = {
    JPG / "mimic-cxr-2.0.0-metadata.csv.gz": metadata,
    JPG / "mimic-cxr-2.0.0-split.csv.gz": split,
    JPG / "mimic-cxr-2.0.0-chexpert.csv.gz": chexpert,
    JPG / "mimic-cxr-2.0.0-negbio.csv.gz": negbio,
    JPG / "mimic-cxr-2.1.0-test-set-labeled.csv": test_set,
    CXR / "cxr-record-list.csv.gz": record_list,
    CXR / "cxr-study-list.csv.gz": study_list,
    ED / "edstays.csv.gz": edstays,
    ED / "triage.csv.gz": triage,
    ED / "vitalsign.csv.gz": vitalsign,
    ED / "medrecon.csv.gz": medrecon,
    ED / "pyxis.csv.gz": pyxis,
    ED / "diagnosis.csv.gz": diagnosis,
    HOSP / "patients.csv.gz": people,
    HOSP / "admissions.csv.gz": admissions,
    HOSP / "diagnoses_icd.csv.gz": diagnoses_icd,
    HOSP / "d_icd_diagnoses.csv.gz": lambda _: ([*code, title] for code, title in ICD_TITLES.items()),
    HOSP / "labevents.csv.gz": labevents,
    HOSP / "d_labitems.csv.gz": lambda _: ([item, lab.label, "Blood", lab.category] for item, lab in LAB_ITEMS.items()),
    HOSP / "omr.csv.gz": omr,
    HOSP / "services.csv.gz": services,
    HOSP / "transfers.csv.gz": transfers,
    ICU / "icustays.csv.gz": icustays,
    ICU / "d_items.csv.gz": lambda _: iter(
        [[220045, "Heart Rate", "HR", "chartevents", "Routine Vital Signs", "bpm", "Numeric", None, None]]
    ),
}
