"""A cohort of emergency charts, made up: no images, no reports, each chart unlike the others."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.dataset import Dataset, publish
from contracts.schema import COHORT
from contracts.storage import place
from pipelines.synthetic.lexicon import coined_medicines
from pipelines.synthetic.signs import CONDITIONS, ICD_TITLES, LAB_ITEMS, NEUTRAL_COMPLAINTS, NEUTRAL_DISPENSED, NEUTRAL_MEDICINES, SIGNS

NORMAL = {
    "temperature": (98.4, 1),
    "heartrate": (88, 18),
    "resprate": (18, 4),
    "o2sat": (96, 2),
    "sbp": (132, 22),
    "dbp": (76, 13),
    "pain": (4, 3),
}
HOME = [name for name, _ in (*NEUTRAL_MEDICINES, *(medicine for _, medicine in CONDITIONS.values()))]
GIVEN = [*NEUTRAL_DISPENSED, *(name for sign in SIGNS.values() for name, _ in sign.given)]
COMPLAINTS = [*NEUTRAL_COMPLAINTS, *(complaint for sign in SIGNS.values() for complaint in sign.complaints)]


def cohort(folder: Path, studies: int, seed: int = 0) -> Dataset:
    """`folder`/cohort: one row a study, every fifth with a coined medicine."""
    rng = np.random.default_rng(seed)
    coined = [drug.name for drug in coined_medicines(seed)]
    rows = [row(rng, number, coined) for number in range(studies)]
    table = pa.Table.from_pylist(rows, schema=COHORT.columns)
    (folder / "cohort").mkdir(parents=True)
    file = folder / "cohort" / "part-0.parquet"
    pq.write_table(table, file)
    files = [{"path": file.name, "outcome": "row", "rows": studies, "bytes": file.stat().st_size}]
    return publish(place(str(folder / "cohort")), COHORT, f"made up, {studies}, {seed}", files, rows_in=studies)


def row(rng: np.random.Generator, number: int, coined: list[str]) -> dict:
    def vitals(hours: float) -> dict:
        drawn = {name: round(float(rng.normal(mean, spread)), 1 if name == "temperature" else 0) for name, (mean, spread) in NORMAL.items()}
        return {**drawn, "o2sat": min(drawn["o2sat"], 100.0), "pain": float(np.clip(drawn["pain"], 0, 10)), "hours": hours}

    times = np.sort(-rng.uniform(0.1, 6, 6)).round(2).tolist()
    medicines = [{"name": n, "kind": "reconciled", "hours": times[0]} for n in rng.choice(HOME, 6, replace=False).tolist()]
    medicines += [{"name": n, "kind": "dispensed", "hours": times[3]} for n in rng.choice(GIVEN, 2, replace=False).tolist()]
    if number % 5 == 0:
        medicines.append({"name": coined[number // 5 % len(coined)], "kind": "reconciled", "hours": times[0]})
    labs = []
    for code in rng.choice(list(LAB_ITEMS), 12, replace=False).tolist():
        lab = LAB_ITEMS[code]
        value = round(float(rng.uniform(0.7 * lab.low, 1.4 * lab.high)), lab.digits)
        labs.append({"name": lab.label, "value": value, "unit": lab.unit, "abnormal": not lab.low <= value <= lab.high, "hours": times[2]})
    codes = [list(ICD_TITLES)[i] for i in rng.choice(len(ICD_TITLES), 3, replace=False)]
    return {
        "row_id": f"d{number:07d}", "group_id": f"p{number // 2:07d}", "study_id": f"s{number:07d}",
        "split": ("train", "train", "validate", "test")[number // 2 % 4],
        "chart_age": float(rng.integers(20, 91)), "chart_sex": "FM"[number % 2], "chart_transport": "AMBULANCE",
        "chart_chief_complaint": ", ".join(rng.choice(COMPLAINTS, 2, replace=False).tolist()), "chart_acuity": float(rng.integers(1, 6)),
        "chart_triage": vitals(times[0] - 0.2), "chart_vitals": [vitals(t) for t in times],
        "chart_medicines": medicines, "chart_labs": labs,
        "chart_history": [{"code": c, "version": v, "title": ICD_TITLES[c, v], "hours": -float(rng.integers(99, 30000))} for c, v in codes],
        "label_row": False, "report_status": "absent",
    }  # fmt: skip
