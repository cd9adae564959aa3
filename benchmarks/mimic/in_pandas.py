"""The joins of `cxray cohort` as one would write them in pandas: the rival of `cohort.py`.

Only the columns that are needed are read, categories and dates as such; tables are cut to the cohort's patients before they are joined;
repair is vectorised, and nothing is done row by row (`apply`). It makes the same rows with the same entries, and leaves out the data
card and the lists of what was repaired.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contracts.chart import CELSIUS, PLAUSIBLE, VITALS
from contracts.findings import FINDINGS
from pipelines.cohort.charts import LABS, MEASURES


def make(folder: Path, out: Path) -> dict[str, Any]:
    """Read the tables below `folder`, write OUT/cohort.parquet, and say how many rows and entries it has."""
    rows = choose(folder)
    visits = link(folder, rows)
    ed = folder / "mimic-iv-ed/2.2/ed"
    triage = repair(pd.read_csv(ed / "triage.csv.gz", usecols=["stay_id", *VITALS, "acuity", "chiefcomplaint"], dtype={"pain": str}))
    known = visits.loc[visits.intime <= visits.study_time, ["n", "stay_id"]].merge(triage, on="stay_id").drop(columns="stay_id")
    lists = {
        "vitals": vitals(ed, visits),
        "medicines": medicines(ed, visits),
        "labs": labs(folder, visits),
        "history": history(folder, visits),
    }
    done = visits.drop(columns=["subject_id", "study_time", "gender"]).merge(known, on="n", how="left")
    done = rows.merge(done, on="n").merge(body(folder, visits), on="n", how="left").merge(targets(folder, visits), on="n", how="left")
    done = done.set_index("n")
    for name, entries in lists.items():
        records = pd.Series(entries.drop(columns="n").to_dict("records"), index=entries["n"])
        done[name] = records.groupby(level=0).agg(list)
    done.to_parquet(out / "cohort.parquet", compression="zstd")
    return {"rows": len(done), **{name: len(entries) for name, entries in lists.items()}}


def choose(folder: Path) -> pd.DataFrame:
    """One frontal image a study, with its split and labels."""
    table = str(folder / "mimic-cxr-jpg/2.1.0/mimic-cxr-2.0.0-{}.csv.gz")
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns", "StudyDate", "StudyTime"]
    rows = pd.read_csv(table.format("metadata"), usecols=columns, dtype={"ViewPosition": "category", "StudyDate": str})
    rows["study_time"] = pd.to_datetime(rows.StudyDate + rows.StudyTime.astype(int).astype(str).str.zfill(6), format="%Y%m%d%H%M%S")
    rows["pixels"] = rows.Rows * rows.Columns
    rows = rows.merge(pd.read_csv(table.format("split"), usecols=["dicom_id", "split"], dtype={"split": "category"}), on="dicom_id")
    rows = rows[rows.ViewPosition.isin(["AP", "PA"])]
    rows = rows.assign(other=rows.ViewPosition != "PA").sort_values(
        ["study_id", "other", "pixels", "dicom_id"], ascending=[True, True, False, True]
    )
    rows = rows.drop_duplicates("study_id").drop(columns=["other", "StudyDate", "StudyTime", "Rows", "Columns"])
    labels = pd.read_csv(table.format("chexpert"), usecols=["study_id", *FINDINGS], dtype=dict.fromkeys(FINDINGS, "float32"))
    rows = rows.merge(labels, on="study_id", how="left").sort_values(["subject_id", "study_id"])
    return rows.assign(n=np.arange(len(rows)))


def link(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Each row's emergency stay and admission."""
    kinds = dict.fromkeys(("gender", "race", "arrival_transport", "disposition"), "category")
    columns = ["subject_id", "hadm_id", "stay_id", "intime", "outtime", *kinds]
    stays = pd.read_csv(folder / "mimic-iv-ed/2.2/ed/edstays.csv.gz", usecols=columns, dtype=kinds, parse_dates=["intime", "outtime"])
    near = rows[["n", "subject_id", "study_time"]].merge(stays, on="subject_id")
    before, after = near.intime - near.study_time, near.study_time - near.outtime.fillna(near.intime)
    near["distance"] = np.maximum(np.maximum(before, after), pd.Timedelta(0))
    near["away"] = before.abs()
    near = near[near.distance <= pd.Timedelta(hours=24)].sort_values(["n", "distance", "away", "stay_id"]).drop_duplicates("n")
    inside = rows[["n", "subject_id", "study_time"]].merge(read_admissions(folder), on="subject_id")
    inside = inside[(inside.study_time >= inside.admittime) & (inside.study_time <= inside.dischtime)]
    inside = inside.sort_values(["n", "admittime", "hadm_id"], ascending=[True, False, True]).drop_duplicates("n")
    near = near.drop(columns=["subject_id", "study_time", "distance", "away"])
    visits = rows[["n", "subject_id", "study_time"]].merge(near, on="n", how="left")
    visits["hadm_id"] = visits.hadm_id.fillna(visits.n.map(inside.set_index("n").hadm_id))
    return visits.assign(offset=hours(visits.study_time - visits.intime))


def read_admissions(folder: Path) -> pd.DataFrame:
    times = ["admittime", "dischtime", "deathtime"]
    return pd.read_csv(folder / "mimiciv/3.1/hosp/admissions.csv.gz", usecols=["subject_id", "hadm_id", *times], parse_dates=times)


def hours(span: pd.Series) -> pd.Series:
    return span.dt.total_seconds() / 3600


def repair(table: pd.DataFrame) -> pd.DataFrame:
    """Celsius to Fahrenheit, '5/10' to 5, what is no number or out of bounds to NaN."""
    for name in [q for q in PLAUSIBLE if q in table]:
        values = table[name]
        if name == "pain":
            values = values.str.replace("/10", "", regex=False)
        values = pd.to_numeric(values, errors="coerce")
        if name == "temperature":
            values = values.mask(values.between(*CELSIUS), (values * 9 / 5 + 32).round(1))
        table[name] = values.where(values.between(*PLAUSIBLE[name]))
    return table


def vitals(ed: Path, visits: pd.DataFrame) -> pd.DataFrame:
    columns = ["stay_id", "charttime", *VITALS]
    table = pd.read_csv(ed / "vitalsign.csv.gz", usecols=columns, dtype={"pain": str}, parse_dates=["charttime"])
    table = visits[["n", "stay_id", "study_time"]].merge(table, on="stay_id")
    table = repair(table[table.charttime <= table.study_time].copy())
    table["hours"] = hours(table.charttime - table.study_time)
    return table[["n", "hours", *VITALS]].sort_values(["n", "hours"])


def medicines(ed: Path, visits: pd.DataFrame) -> pd.DataFrame:
    given = []
    for file, kind in (("medrecon", "reconciled"), ("pyxis", "dispensed")):
        table = pd.read_csv(ed / f"{file}.csv.gz", usecols=["stay_id", "charttime", "name"], parse_dates=["charttime"])
        given.append(table[table.stay_id.isin(visits.stay_id)].assign(kind=kind))
    table = visits[["n", "stay_id", "study_time"]].merge(pd.concat(given), on="stay_id")
    table = table[table.charttime <= table.study_time].drop_duplicates(["n", "name", "kind", "charttime"])
    table["hours"] = hours(table.charttime - table.study_time)
    return table[["n", "name", "kind", "hours"]].sort_values(["n", "hours", "kind", "name"])


def labs(folder: Path, visits: pd.DataFrame) -> pd.DataFrame:
    hosp = folder / "mimiciv/3.1/hosp"
    kinds = {"valueuom": "category", "flag": "category"}
    columns = ["subject_id", "itemid", "storetime", "valuenum", *kinds]
    table = pd.read_csv(hosp / "labevents.csv.gz", usecols=columns, dtype=kinds, parse_dates=["storetime"])
    table = table[table.itemid.isin(LABS) & table.subject_id.isin(visits.subject_id)]
    table = visits[["n", "subject_id", "study_time"]].merge(table, on="subject_id")
    table = table[(table.storetime <= table.study_time) & (table.storetime > table.study_time - pd.Timedelta(hours=24))]
    table = table.merge(pd.read_csv(hosp / "d_labitems.csv.gz", usecols=["itemid", "label"]), on="itemid", how="left")
    table = table.assign(hours=hours(table.storetime - table.study_time), abnormal=table.flag == "abnormal")
    table = table.rename(columns={"label": "name", "valuenum": "value", "valueuom": "unit"}).sort_values(["n", "hours", "itemid", "value"])
    return table[["n", "name", "value", "unit", "abnormal", "hours"]]


def history(folder: Path, visits: pd.DataFrame) -> pd.DataFrame:
    hosp, ed = folder / "mimiciv/3.1/hosp", folder / "mimic-iv-ed/2.2/ed"
    code = {"icd_code": str, "icd_version": "int8"}
    of_hosp = pd.read_csv(hosp / "diagnoses_icd.csv.gz", usecols=["subject_id", "hadm_id", *code], dtype=code)
    of_hosp = of_hosp[of_hosp.subject_id.isin(visits.subject_id)].merge(read_admissions(folder)[["hadm_id", "dischtime"]], on="hadm_id")
    of_hosp = of_hosp.merge(pd.read_csv(hosp / "d_icd_diagnoses.csv.gz", dtype=code), on=[*code], how="left")
    of_ed = pd.read_csv(ed / "diagnosis.csv.gz", usecols=["subject_id", "stay_id", *code, "icd_title"], dtype=code)
    stays = pd.read_csv(ed / "edstays.csv.gz", usecols=["stay_id", "hadm_id", "outtime"], parse_dates=["outtime"])
    of_ed = of_ed[of_ed.subject_id.isin(visits.subject_id)].merge(stays, on="stay_id")
    of_hosp = of_hosp.rename(columns={"dischtime": "ended", "long_title": "title"})
    told = pd.concat([of_hosp, of_ed.rename(columns={"outtime": "ended", "icd_title": "title"})])
    table = visits[["n", "subject_id", "study_time", "hadm_id", "stay_id"]].merge(told, on="subject_id", suffixes=("", "_then"))
    earlier = (table.ended < table.study_time) & (table.hadm_id != table.hadm_id_then) & (table.stay_id != table.stay_id_then)
    table = table[earlier]
    table["hours"] = hours(table.ended - table.study_time)
    # The latest mention of a code is the one that counts; sorting and dropping is quicker than grouping by three keys.
    table = table.sort_values(["n", "hours", "icd_version", "icd_code", "title"], ascending=[True, False, True, True, True])
    table = table.drop_duplicates(["n", "icd_version", "icd_code"])
    return table.rename(columns={"icd_code": "code", "icd_version": "version"})[["n", "code", "version", "title", "hours"]]


def body(folder: Path, visits: pd.DataFrame) -> pd.DataFrame:
    hosp = folder / "mimiciv/3.1/hosp"
    people = pd.read_csv(hosp / "patients.csv.gz", usecols=["subject_id", "gender", "anchor_age", "anchor_year"])
    made = visits[["n", "subject_id", "study_time"]].merge(people, on="subject_id", how="left")
    made["age"] = made.anchor_age + made.study_time.dt.year - made.anchor_year
    omr = pd.read_csv(hosp / "omr.csv.gz", dtype={"result_name": "category"})
    omr = omr[omr.result_name.isin([name for name, _ in MEASURES.values()]) & omr.subject_id.isin(visits.subject_id)]
    omr = omr.assign(chartdate=pd.to_datetime(omr.chartdate), result=pd.to_numeric(omr.result_value, errors="coerce"))
    omr = visits[["n", "subject_id", "study_time"]].merge(omr.drop(columns="result_value"), on="subject_id")
    omr = omr[omr.chartdate < omr.study_time.dt.normalize()].sort_values(["chartdate", "seq_num"])
    last = omr.drop_duplicates(["n", "result_name"], keep="last").pivot(index="n", columns="result_name", values="result")
    for quantity, (name, factor) in MEASURES.items():
        made[quantity] = made.n.map((last[name] * factor).round(1))
    return repair(made[["n", "gender", "age", *MEASURES]])


def targets(folder: Path, visits: pd.DataFrame) -> pd.DataFrame:
    icu = pd.read_csv(folder / "mimiciv/3.1/icu/icustays.csv.gz", usecols=["hadm_id", "intime"], parse_dates=["intime"])
    icu = visits[["n", "hadm_id", "study_time"]].merge(icu, on="hadm_id")
    first = icu[icu.intime > icu.study_time].groupby("n").intime.min()
    made = visits[["n", "hadm_id", "study_time"]].merge(read_admissions(folder).drop(columns="subject_id"), on="hadm_id", how="left")
    made["icu_hours"] = hours(made.n.map(first) - made.study_time)
    made["death_hours"] = hours(made.deathtime - made.study_time).where(made.deathtime > made.study_time)
    made["hospitalised_hours"] = hours(made.admittime - made.study_time)
    return made[["n", "icu_hours", "death_hours", "hospitalised_hours"]]
