"""What the generator says it made: one row for each image of the metadata table, told from the plan and from no table.

A cohort built from the tables by its own code must find the same. Study times are whole seconds (the fraction dropped).
Where an image has no study time, nothing can be linked to it: its stay, hospital admission and targets are null, its counts 0.
"""

from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.findings import FINDINGS, label_column
from pipelines.synthetic.records import body_measures
from pipelines.synthetic.reports import report_state
from pipelines.synthetic.scene import MEASURES, Admission, Image, Patient, Stay, Study
from pipelines.synthetic.signs import KNOWN_LABS

_DAY = timedelta(hours=24)
_STATUSES = ("repaired", "implausible", "unreadable")

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("dicom_id",)]
    + [(name, pa.int64()) for name in ("study_id", "subject_id")]
    + [("split", pa.string()), ("view", pa.string()), ("frontal", pa.bool_()), ("chosen", pa.bool_())]
    + [("study_time", pa.timestamp("us")), ("report", pa.string()), ("label_row", pa.bool_())]
    + [(label_column(f), pa.int8()) for f in FINDINGS]
    + [("stay_id", pa.int64()), ("stay_offset_hours", pa.float64()), ("known_vitals", pa.int32())]
    + [(f"vitals_{status}", pa.int32()) for status in _STATUSES]
    + [("vitals_mended", pa.list_(pa.string()))]  # 'temperature repaired', an entry a cell
    + [("triage_known", pa.bool_()), ("acuity_known", pa.bool_()), ("complaint_known", pa.bool_())]
    + [(f"triage_{m}", pa.string()) for m in MEASURES]
    + [(name, pa.int32()) for name in ("known_reconciled", "known_dispensed", "known_labs", "known_history")]
    + [("age", pa.int32()), ("measured", pa.bool_())]  # whether weight, height and body mass index were known
    + [("hadm_id", pa.int64()), ("target_icu", pa.bool_()), ("target_icu_hours", pa.float64())]
    + [("target_death", pa.bool_()), ("target_death_hours", pa.float64()), ("target_hospitalised", pa.bool_())]
    + [("file", pa.string()), ("clue", pa.string()), ("coined", pa.string()), ("coined_finding", pa.string())]
)


def write_truth(path: Path, patients: list[Patient]) -> int:
    """Writes the table; returns the number of its rows."""
    rows = [row(p, s, i) for p in patients for s in p.studies for i in s.images]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    return len(rows)


def chosen(study: Study) -> Image | None:
    """The one frontal of a study: PA before AP, then the larger, then the lower id, among those with a time and a split."""
    able = [i for i in study.images if i.listed_view in ("PA", "AP") and i.time and i.split]
    return min(able, key=lambda i: (i.listed_view != "PA", -i.size[0] * i.size[1], i.dicom_id), default=None)


def row(patient: Patient, study: Study, image: Image) -> dict[str, object]:
    """One image's row, by the columns of SCHEMA."""
    states = study.case.states if study.labelled else {}
    drug = study.case.drug
    return {
        "dicom_id": image.dicom_id,
        "study_id": study.study_id,
        "subject_id": patient.subject_id,
        "split": image.split,
        "view": image.listed_view,
        "frontal": image.listed_view in ("PA", "AP"),
        "chosen": image is chosen(study),
        "study_time": image.time,
        "report": report_state(study),
        "label_row": study.labelled,
        **{label_column(f): states.get(f) for f in FINDINGS},
        **_emergency(study.linked if image.time else None, image),
        **_hospital(patient, study, image),
        "file": image.file,
        "clue": study.case.clue,
        "coined": drug.name if drug else None,
        "coined_finding": drug.finding if drug else None,
    }


def _emergency(stay: Stay | None, image: Image) -> dict[str, object]:
    t = image.time
    vitals = [v for v in stay.vitals if v.time <= t] if stay and t else []
    arrived = bool(stay and t and stay.intime <= t)
    triage = stay.triage.status if stay and stay.triage and arrived else dict.fromkeys(MEASURES, "missing")
    cells = [status for v in vitals for status in v.status.values()]
    return {
        "stay_id": stay.stay_id if stay else None,
        "stay_offset_hours": (t - stay.intime) / timedelta(hours=1) if stay and t else None,
        "known_vitals": len(vitals),
        **{f"vitals_{status}": cells.count(status) for status in _STATUSES},
        "vitals_mended": [f"{m} {status}" for v in vitals for m, status in v.status.items() if status in _STATUSES],
        "triage_known": bool(arrived and stay and stay.triage),
        "acuity_known": bool(arrived and stay and stay.triage and stay.acuity),
        "complaint_known": bool(arrived and stay and stay.triage and stay.complaint),
        **{f"triage_{m}": triage[m] for m in MEASURES},
        "known_reconciled": sum(m.time <= t for m in stay.reconciled) if stay and t else 0,
        "known_dispensed": sum(m.time <= t for m in stay.dispensed) if stay and t else 0,
    }


def _admission(patient: Patient, study: Study, image: Image) -> Admission | None:
    """The linked stay's admission, or else the one during which the image was taken."""
    t = image.time
    if t is None:
        return None
    own = study.linked.hadm_id if study.linked else None
    by_stay = (a for a in patient.admissions if a.hadm_id == own)
    by_time = (a for a in patient.admissions if a.admittime <= t <= a.dischtime)
    return next(by_stay if own else by_time, None)


def _hospital(patient: Patient, study: Study, image: Image) -> dict[str, object]:
    t = image.time
    if t is None:
        return {"known_labs": 0, "known_history": 0}
    admission = _admission(patient, study, image)
    icu = admission.icu[1] if admission and admission.icu and admission.icu[1] > t else None
    death = admission.death if admission and admission.death and admission.death > t else None
    # Of earlier visits alone: what this visit was coded as is what a model is asked for.
    own = admission.hadm_id if admission else None
    history = {code for a in patient.admissions if a.dischtime < t and a.hadm_id != own for code in a.codes}
    earlier = (s for s in patient.stays if s.outtime < t and s is not study.linked and (s.hadm_id is None or s.hadm_id != own))
    history |= {code for s in earlier for code in s.diagnoses}
    return {
        "known_labs": sum(t - _DAY < lab.storetime <= t and lab.itemid in KNOWN_LABS for lab in patient.labs),
        "known_history": len(history),
        "age": patient.age + t.year - patient.anchor_year,
        "measured": any(day < t.date() for day, _, _ in body_measures(patient)),
        "hadm_id": admission.hadm_id if admission else None,
        "target_icu": icu is not None,
        "target_icu_hours": (icu - t) / timedelta(hours=1) if icu else None,
        "target_death": death is not None,
        "target_death_hours": (death - t) / timedelta(hours=1) if death else None,
        "target_hospitalised": admission is not None,
    }
