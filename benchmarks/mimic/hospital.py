"""MIMIC-IV's tables, of the hospital and of intensive care."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from mimic.emergency import coded, codes, numbered
from mimic.world import DAY, FIRST, Sizes, World, blank, pick, stamp, words

from pipelines.cohort.charts import LABS

CHUNK = 1_000_000  # rows of labevents at a time


def diagnoses_icd(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    visit = np.sort(rng.integers(0, len(w.hadm_id), s.of(6_364_488)))
    icd = coded(rng, w.hadm_of[visit])
    return pa.table({
        "subject_id": w.patients[w.hadm_of[visit]], "hadm_id": w.hadm_id[visit], "seq_num": numbered(visit),
        "icd_code": icd["icd_code"], "icd_version": icd["icd_version"],
    })  # fmt: skip


def d_icd_diagnoses(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    return pa.table(codes())


def patients(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = len(w.patients)
    return pa.table({
        "subject_id": w.patients, "gender": pick(rng, ["F", "M"], n, [52, 48]), "anchor_age": rng.integers(18, 92, n),
        "anchor_year": 2110 + (w.born - FIRST) // (365 * DAY), "anchor_year_group": pick(rng, ["2008 - 2010", "2014 - 2016"], n),
        "dod": blank(rng, stamp(FIRST + rng.integers(0, 90 * 365, n) * DAY).cast(pa.date32()), 0.9),
    })  # fmt: skip


def admissions(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = len(w.hadm_id)
    dead = rng.random(n) < 0.02
    return pa.table({
        "subject_id": w.patients[w.hadm_of], "hadm_id": w.hadm_id, "admittime": stamp(w.hadm_in), "dischtime": stamp(w.hadm_out),
        "deathtime": stamp(w.hadm_out, ~dead), "admission_type": pick(rng, ["EW EMER.", "EU OBSERVATION", "URGENT"], n),
        "admit_provider_id": pick(rng, [f"P{i:05d}" for i in range(2000)], n), "admission_location": pick(rng, words(11, 7), n),
        "discharge_location": pick(rng, words(13, 8), n), "insurance": pick(rng, ["Medicare", "Private", "Medicaid", "Other"], n),
        "language": pick(rng, ["English", "Spanish", "Other"], n), "marital_status": pick(rng, ["MARRIED", "SINGLE", "WIDOWED"], n),
        "race": pick(rng, ["WHITE", "BLACK/AFRICAN AMERICAN", "ASIAN", "OTHER"], n), "edregtime": stamp(w.hadm_in, dead),
        "edouttime": stamp(w.hadm_in, dead), "hospital_expire_flag": dead.astype(np.int8),
    })  # fmt: skip


def omr(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = s.of(7_753_027)
    visit = np.sort(rng.integers(0, len(w.hadm_id), n))
    names = ["Blood Pressure", "Weight (Lbs)", "BMI (kg/m2)", "Height (Inches)", "eGFR", "BMI"]
    name = pick(rng, names, n, [37, 27, 26, 9, 0.5, 0.5])
    mean = pc.if_else(pc.equal(name, "Weight (Lbs)"), 175.0, pc.if_else(pc.equal(name, "Height (Inches)"), 66.0, 29.0)).to_numpy()
    value = pa.array(np.round(mean * rng.normal(1, 0.15, n), 1)).cast(pa.string())
    pressure = pa.array([f"{a}/{a - 45}" for a in range(90, 200)])
    when = pa.array(((w.hadm_in[visit] - rng.integers(0, 700, n) * DAY) // DAY).astype("datetime64[D]"))
    value = pc.if_else(pc.equal(name, "Blood Pressure"), pick(rng, pressure, n), value)
    return pa.table({
        "subject_id": w.patients[w.hadm_of[visit]], "chartdate": when, "seq_num": rng.integers(1, 6, n), "result_name": name,
        "result_value": value,
    })  # fmt: skip


ITEMS = np.concatenate([np.array(LABS), 52_000 + np.arange(1_650 - len(LABS))])  # those that a chart reads come first


def d_labitems(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = len(ITEMS)
    return pa.table({
        "itemid": ITEMS, "label": pc.utf8_title(words(n, 9, 1, 3)), "fluid": pick(rng, ["Blood", "Urine", "Pleural"], n),
        "category": pick(rng, ["Chemistry", "Hematology", "Blood Gas"], n),
    })  # fmt: skip


def labevents(w: World, s: Sizes, rng: np.random.Generator) -> Iterator[pa.Table]:
    """A quarter of the rows are of the chart's items, as in MIMIC-IV, where electrolytes and blood counts are that frequent."""
    of, id_ = np.concatenate([w.stay_of, w.hadm_of]), np.concatenate([w.stay_hadm, w.hadm_id])
    start, end = np.concatenate([w.stay_in, w.hadm_in]), np.concatenate([w.stay_out, w.hadm_out])
    order = np.lexsort((start, of))
    of, id_, start, end = of[order], id_[order], start[order], end[order]
    counts = rng.multinomial(s.labs, (end - start) ** 0.5 / np.sum((end - start) ** 0.5))  # longer visits have more, and not in proportion
    chart = np.r_[4, 5, 4, 4, np.full(7, 21), np.full(3, 21), 1, 2, 1, 1, 12, 6, 9] / 1000
    share = np.concatenate([chart, np.full(len(ITEMS) - len(chart), (1 - chart.sum()) / (len(ITEMS) - len(chart)))])
    units, notes = pa.array(["mg/dL", "mEq/L", "%", "K/uL", "g/dL", "mmol/L"]), words(3_000, 10, 4, 14)
    rows = np.cumsum(counts)
    for low in range(0, s.labs, CHUNK):
        n = min(CHUNK, s.labs - low)
        tube = np.arange(low, low + n) // 8  # a specimen: its tests share their times
        visit = np.searchsorted(rows, tube * 8, side="right")
        drawn, stored, specimen = (rng.random(n // 8 + 2)[tube - tube[0]] for _ in range(3))
        taken = start[visit] + (drawn * (end - start)[visit]).astype(np.int64) // 60 * 60
        item = ITEMS[np.searchsorted(np.cumsum(share), rng.random(n)).clip(max=len(ITEMS) - 1)]
        value = pa.array(np.round(rng.lognormal(2.5, 1, n), 1), mask=rng.random(n) < 0.1)
        yield pa.table({
            "labevent_id": np.arange(low + 1, low + n + 1), "subject_id": w.patients[of[visit]],
            "hadm_id": pa.array(id_[visit], mask=id_[visit] == 0), "specimen_id": (specimen * 9e7).astype(np.int64), "itemid": item,
            "order_provider_id": blank(rng, pick(rng, [f"P{i:05d}" for i in range(2000)], n), 0.8), "charttime": stamp(taken),
            "storetime": stamp(taken + (600 + stored * 8400).astype(np.int64), rng.random(n) < 0.01),
            "value": value.cast(pa.string()), "valuenum": value,
            "valueuom": blank(rng, units.take(pa.array(item % len(units))), 0.12), "ref_range_lower": blank(rng, pa.array(item % 40), 0.15),
            "ref_range_upper": blank(rng, pa.array(item % 40 + 40), 0.15), "flag": blank(rng, pa.array(["abnormal"] * n), 0.7),
            "priority": blank(rng, pick(rng, ["ROUTINE", "STAT"], n), 0.1), "comments": blank(rng, pick(rng, notes, n), 0.83),
        })  # fmt: skip


def icustays(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    n = min(s.of(94_458), len(w.hadm_id))
    visit = np.sort(rng.choice(len(w.hadm_id), n, replace=False))
    start = w.hadm_in[visit] + (rng.random(n) * 0.5 * (w.hadm_out - w.hadm_in)[visit]).astype(np.int64)
    unit = pick(rng, ["Medical Intensive Care Unit (MICU)", "Trauma SICU (TSICU)"], n)
    return pa.table({
        "subject_id": w.patients[w.hadm_of[visit]], "hadm_id": w.hadm_id[visit], "stay_id": 30_000_000 + np.arange(n),
        "first_careunit": unit,
        "last_careunit": unit, "intime": stamp(start), "outtime": stamp(w.hadm_out[visit]), "los": (w.hadm_out[visit] - start) / DAY,
    })  # fmt: skip
