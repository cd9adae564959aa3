"""A MIMIC of a few rows, written by hand: each test says only the cells that it is about."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from contracts.config import load
from contracts.findings import FINDINGS
from contracts.storage import place
from pipelines.cohort.job import CohortConfig, run

# Every table's columns, as PhysioNet has them (those that the cohort reads), with a value for a cell that a test does not name.
TABLES: dict[str, dict[str, Any]] = {
    "mimic-cxr-jpg/2.1.0/mimic-cxr-2.0.0-metadata": {
        "dicom_id": "d1", "subject_id": 10000001, "study_id": 50000001, "PerformedProcedureStepDescription": "CHEST", "ViewPosition": "PA",
        "Rows": 100, "Columns": 100, "StudyDate": 21500101, "StudyTime": 120000.0,
    },
    "mimic-cxr-jpg/2.1.0/mimic-cxr-2.0.0-split": {"dicom_id": "d1", "study_id": 50000001, "subject_id": 10000001, "split": "train"},
    "mimic-cxr-jpg/2.1.0/mimic-cxr-2.0.0-chexpert": {"subject_id": 10000001, "study_id": 50000001, **dict.fromkeys(FINDINGS)},
    "mimic-iv-ed/2.2/ed/edstays": {
        "subject_id": 10000001, "hadm_id": None, "stay_id": 30000001, "intime": "2150-01-01 10:00:00", "outtime": "2150-01-01 18:00:00",
        "gender": "F", "race": "WHITE", "arrival_transport": "WALK IN", "disposition": "HOME",
    },
    "mimic-iv-ed/2.2/ed/triage": {
        "subject_id": 10000001, "stay_id": 30000001, "temperature": 98.6, "heartrate": 80, "resprate": 16, "o2sat": 98, "sbp": 120,
        "dbp": 80, "pain": "0", "acuity": 3, "chiefcomplaint": "COUGH",
    },
    "mimic-iv-ed/2.2/ed/vitalsign": {
        "subject_id": 10000001, "stay_id": 30000001, "charttime": "2150-01-01 11:00:00", "temperature": None, "heartrate": 80,
        "resprate": 16, "o2sat": 98, "sbp": 120, "dbp": 80, "rhythm": None, "pain": "0",
    },
    "mimic-iv-ed/2.2/ed/medrecon": {"subject_id": 10000001, "stay_id": 30000001, "charttime": "2150-01-01 10:30:00", "name": "aspirin"},
    "mimic-iv-ed/2.2/ed/pyxis": {"subject_id": 10000001, "stay_id": 30000001, "charttime": "2150-01-01 11:30:00", "name": "Furosemide"},
    "mimic-iv-ed/2.2/ed/diagnosis": {
        "subject_id": 10000001, "stay_id": 30000001, "seq_num": 1, "icd_code": "J189", "icd_version": 10, "icd_title": "PNEUMONIA",
    },
    "mimiciv/3.1/hosp/patients": {"subject_id": 10000001, "gender": "F", "anchor_age": 60, "anchor_year": 2148},
    "mimiciv/3.1/hosp/admissions": {
        "subject_id": 10000001, "hadm_id": 20000001, "admittime": "2150-01-01 17:00:00", "dischtime": "2150-01-05 12:00:00",
        "deathtime": None,
    },
    "mimiciv/3.1/hosp/diagnoses_icd": {
        "subject_id": 10000001, "hadm_id": 20000001, "seq_num": 1, "icd_code": "4280", "icd_version": 9,
    },
    "mimiciv/3.1/hosp/d_icd_diagnoses": {"icd_code": "4280", "icd_version": 9, "long_title": "Congestive heart failure"},
    "mimiciv/3.1/hosp/labevents": {
        "subject_id": 10000001, "itemid": 50813, "charttime": "2150-01-01 10:30:00", "storetime": "2150-01-01 11:00:00", "valuenum": 2.1,
        "valueuom": "mmol/L", "flag": "abnormal",
    },
    "mimiciv/3.1/hosp/d_labitems": {"itemid": 50813, "label": "Lactate"},
    "mimiciv/3.1/hosp/omr": {
        "subject_id": 10000001, "chartdate": "2149-12-01", "seq_num": 1, "result_name": "BMI (kg/m2)", "result_value": "25.0",
    },
    "mimiciv/3.1/icu/icustays": {"subject_id": 10000001, "hadm_id": 20000001, "stay_id": 1, "intime": "2150-01-02 12:00:00"},
}  # fmt: skip
NAMES = {path.rpartition("/")[2].removeprefix("mimic-cxr-2.0.0-"): path for path in TABLES}


def write_tree(folder: Path, reports: Mapping[int, str] = {}, **tables: Iterable[Mapping[str, Any]]) -> Path:
    """Write the named tables (metadata, split, chexpert, edstays, ...), a mapping a row of what is not the default.

    metadata and split are always there; a split row is made for each metadata row that has none. reports: study_id -> text.
    """
    tables.setdefault("metadata", [{}])
    of = NAMES["metadata"]
    tables.setdefault("split", [{k: {**TABLES[of], **m}[k] for k in ("dicom_id", "study_id", "subject_id")} for m in tables["metadata"]])
    tables.setdefault("chexpert", [])
    for proof in ("edstays", "patients"):  # a source without its first table is absent
        if any(NAMES[name].partition("/")[0] == NAMES[proof].partition("/")[0] for name in tables):
            tables.setdefault(proof, [])
    for name, rows in tables.items():
        path = folder / f"{NAMES[name]}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([{**TABLES[NAMES[name]], **row} for row in rows], columns=list(TABLES[NAMES[name]])).to_csv(path, index=False)
    (folder / "mimic-cxr-jpg/2.1.0/files").mkdir(exist_ok=True)
    for study, text in reports.items():
        subject = next(({**TABLES[of], **m}["subject_id"] for m in tables["metadata"] if {**TABLES[of], **m}["study_id"] == study), 0)
        file = folder / f"mimic-cxr/2.1.0/files/p{str(subject)[:2]}/p{subject}/s{study}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def cohort(folder: Path, out: Path, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows by row_id, data card) of the cohort of a tree."""
    from contracts.dataset import open_dataset

    summary = run(load(CohortConfig, {"root": str(folder), "out": str(out), **settings}))
    rows = open_dataset(place(out / "cohort"), "cohort").table().to_pylist()
    return sorted(rows, key=lambda r: r["row_id"]), summary.card
