"""The joins of `cxray cohort` as a notebook would hold them: the plain rival of `cohort.py`.

Tables are read as they are, joined, and then filtered; a value is mended by a function that looks at it; a list is what `groupby` makes of
its rows. Nothing is done to be slow, and nothing to be quick: that is `in_pandas.py`. Both make the same rows with the same entries.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from contracts.chart import CELSIUS, PLAUSIBLE, VITALS
from pipelines.cohort.charts import LABS, MEASURES

DAY = pd.Timedelta(hours=24)


def make(folder: Path, out: Path) -> dict[str, Any]:
    """Read the tables below `folder`, write OUT/cohort.parquet, and say how many rows and entries it has."""
    ed, hosp, icu = folder / "mimic-iv-ed/2.2/ed", folder / "mimiciv/3.1/hosp", folder / "mimiciv/3.1/icu"
    stays = pd.read_csv(ed / "edstays.csv.gz", parse_dates=["intime", "outtime"])
    admissions = pd.read_csv(hosp / "admissions.csv.gz", parse_dates=["admittime", "dischtime", "deathtime"])
    rows = choose(folder / "mimic-cxr-jpg/2.1.0")
    visits = link(rows, stays, admissions)
    at = visits[["n", "study_time", "subject_id", "stay_id", "hadm_id"]]
    lists = {
        "vitals": vitals(ed, at),
        "medicines": medicines(ed, at),
        "labs": labs(hosp, at),
        "history": history(ed, hosp, at, stays, admissions),
    }
    done = visits.merge(triage(ed, visits), on="n", how="left").merge(body(hosp, at), on="n", how="left")
    done = done.merge(targets(icu, at, admissions), on="n", how="left")
    for name, entries in lists.items():
        fields = [column for column in entries if column != "n"]
        listed = entries.groupby("n")[fields].apply(lambda group: group.to_dict("records"))
        done = done.merge(listed.rename(name), left_on="n", right_index=True, how="left")
    done.to_parquet(out / "cohort.parquet")
    return {"rows": len(done), **{name: len(entries) for name, entries in lists.items()}}


def choose(cxr: Path) -> pd.DataFrame:
    """One frontal image a study, with its split and labels."""
    rows = pd.read_csv(cxr / "mimic-cxr-2.0.0-metadata.csv.gz")
    time = rows["StudyTime"].apply(lambda t: f"{int(t):06d}")
    rows["study_time"] = pd.to_datetime(rows["StudyDate"].astype(str) + time, format="%Y%m%d%H%M%S")
    rows = rows.merge(pd.read_csv(cxr / "mimic-cxr-2.0.0-split.csv.gz"), on=["dicom_id", "subject_id", "study_id"])
    rows = rows[rows["ViewPosition"].isin(["AP", "PA"])].copy()
    rows["pixels"] = rows["Rows"] * rows["Columns"]
    rows["other"] = rows["ViewPosition"] != "PA"
    rows = rows.sort_values(["study_id", "other", "pixels", "dicom_id"], ascending=[True, True, False, True])
    rows = rows.drop_duplicates("study_id").drop(columns="other")
    rows = rows.merge(pd.read_csv(cxr / "mimic-cxr-2.0.0-chexpert.csv.gz"), on=["subject_id", "study_id"], how="left")
    rows = rows.sort_values(["subject_id", "study_id"]).reset_index(drop=True)
    rows["n"] = rows.index
    return rows


def link(rows: pd.DataFrame, stays: pd.DataFrame, admissions: pd.DataFrame) -> pd.DataFrame:
    """Each row with its emergency stay and its admission."""
    near = rows[["n", "subject_id", "study_time"]].merge(stays, on="subject_id")
    near["before"] = near["intime"] - near["study_time"]
    near["after"] = near["study_time"] - near["outtime"].fillna(near["intime"])
    near["distance"] = near[["before", "after"]].max(axis=1).clip(lower=pd.Timedelta(0))
    near["away"] = near["before"].abs()
    near = near[near["distance"] <= DAY].sort_values(["n", "distance", "away", "stay_id"]).drop_duplicates("n")
    inside = rows[["n", "subject_id", "study_time"]].merge(admissions, on="subject_id")
    inside = inside[(inside["study_time"] >= inside["admittime"]) & (inside["study_time"] <= inside["dischtime"])]
    inside = inside.sort_values(["n", "admittime", "hadm_id"], ascending=[True, False, True]).drop_duplicates("n")
    visits = rows.merge(near.drop(columns=["subject_id", "study_time", "before", "after", "distance", "away"]), on="n", how="left")
    visits = visits.merge(inside[["n", "hadm_id"]], on="n", how="left", suffixes=("", "_inside"))
    visits["hadm_id"] = visits["hadm_id"].fillna(visits["hadm_id_inside"])
    visits["offset"] = hours(visits["study_time"] - visits["intime"])
    return visits.drop(columns="hadm_id_inside")


def hours(span: pd.Series) -> pd.Series:
    return span.dt.total_seconds() / 3600


def mend(name: str, value: Any) -> float | None:
    """Celsius to Fahrenheit, '5/10' to 5; None for what is no number or out of bounds."""
    try:
        number = float(str(value).replace("/10", "")) if name == "pain" else float(value)
    except ValueError:
        return None
    if name == "temperature" and CELSIUS[0] <= number <= CELSIUS[1]:
        number = round(number * 9 / 5 + 32, 1)
    low, high = PLAUSIBLE[name]
    return number if low <= number <= high else None


def mended(table: pd.DataFrame) -> pd.DataFrame:
    for name in PLAUSIBLE:
        if name in table:
            table[name] = table[name].apply(lambda value, name=name: mend(name, value))
    return table


def triage(ed: Path, visits: pd.DataFrame) -> pd.DataFrame:
    table = mended(pd.read_csv(ed / "triage.csv.gz"))
    known = visits.loc[visits["intime"] <= visits["study_time"], ["n", "stay_id"]].merge(table, on="stay_id")
    return known[["n", *VITALS, "acuity", "chiefcomplaint"]]


def vitals(ed: Path, at: pd.DataFrame) -> pd.DataFrame:
    table = mended(pd.read_csv(ed / "vitalsign.csv.gz", parse_dates=["charttime"], dtype={"pain": str}))
    table = at.merge(table, on="stay_id")
    table = table[table["charttime"] <= table["study_time"]].copy()
    table["hours"] = hours(table["charttime"] - table["study_time"])
    return table.sort_values(["n", "hours"])[["n", "hours", *VITALS]]


def medicines(ed: Path, at: pd.DataFrame) -> pd.DataFrame:
    home = pd.read_csv(ed / "medrecon.csv.gz", parse_dates=["charttime"])
    given = pd.read_csv(ed / "pyxis.csv.gz", parse_dates=["charttime"])
    home["kind"], given["kind"] = "reconciled", "dispensed"
    table = at.merge(pd.concat([home, given]), on="stay_id")
    table = table[table["charttime"] <= table["study_time"]].copy()
    table["hours"] = hours(table["charttime"] - table["study_time"])
    table = table[["n", "name", "kind", "hours"]].drop_duplicates()
    return table.sort_values(["n", "hours", "kind", "name"])


def labs(hosp: Path, at: pd.DataFrame) -> pd.DataFrame:
    table = pd.read_csv(hosp / "labevents.csv.gz", parse_dates=["charttime", "storetime"])
    table = table[table["itemid"].isin(LABS)].merge(pd.read_csv(hosp / "d_labitems.csv.gz"), on="itemid", how="left")
    table = at.merge(table, on="subject_id", suffixes=("", "_lab"))
    table = table[(table["storetime"] <= table["study_time"]) & (table["storetime"] > table["study_time"] - DAY)].copy()
    table["hours"] = hours(table["storetime"] - table["study_time"])
    table["abnormal"] = table["flag"] == "abnormal"
    table = table.sort_values(["n", "hours", "itemid", "valuenum"])
    return table[["n", "label", "valuenum", "valueuom", "abnormal", "hours"]]


def history(ed: Path, hosp: Path, at: pd.DataFrame, stays: pd.DataFrame, admissions: pd.DataFrame) -> pd.DataFrame:
    code = {"icd_code": str}
    told = pd.read_csv(hosp / "diagnoses_icd.csv.gz", dtype=code).merge(admissions[["hadm_id", "dischtime"]], on="hadm_id")
    told = told.merge(pd.read_csv(hosp / "d_icd_diagnoses.csv.gz", dtype=code), on=["icd_code", "icd_version"], how="left")
    told = told.rename(columns={"dischtime": "ended", "long_title": "title"})
    also = pd.read_csv(ed / "diagnosis.csv.gz", dtype=code).merge(stays[["stay_id", "hadm_id", "outtime"]], on="stay_id")
    also = also.rename(columns={"outtime": "ended", "icd_title": "title"})
    table = at.merge(pd.concat([told, also]), on="subject_id", suffixes=("", "_then"))
    earlier = table["ended"] < table["study_time"]
    table = table[earlier & (table["hadm_id"] != table["hadm_id_then"]) & (table["stay_id"] != table["stay_id_then"])].copy()
    table["hours"] = hours(table["ended"] - table["study_time"])
    table = table.sort_values(["n", "hours", "icd_version", "icd_code", "title"], ascending=[True, False, True, True, True])
    table = table.drop_duplicates(["n", "icd_version", "icd_code"])  # the latest mention of a code
    return table[["n", "icd_code", "icd_version", "title", "hours"]]


def body(hosp: Path, at: pd.DataFrame) -> pd.DataFrame:
    made = at[["n", "subject_id", "study_time"]].merge(pd.read_csv(hosp / "patients.csv.gz"), on="subject_id", how="left")
    made["age"] = made["anchor_age"] + made["study_time"].dt.year - made["anchor_year"]
    omr = pd.read_csv(hosp / "omr.csv.gz", parse_dates=["chartdate"])
    omr = at[["n", "subject_id", "study_time"]].merge(omr, on="subject_id")
    omr = omr[omr["chartdate"] < omr["study_time"].dt.normalize()].sort_values(["chartdate", "seq_num"])
    omr["result"] = pd.to_numeric(omr["result_value"], errors="coerce")
    for quantity, (name, factor) in MEASURES.items():
        last = omr[omr["result_name"] == name].groupby("n")["result"].last()
        made[quantity] = made["n"].map((last * factor).round(1))
    return mended(made[["n", "gender", "age", *MEASURES]].rename(columns={"gender": "sex"}))


def targets(icu: Path, at: pd.DataFrame, admissions: pd.DataFrame) -> pd.DataFrame:
    care = at.merge(pd.read_csv(icu / "icustays.csv.gz", parse_dates=["intime"]), on="hadm_id")
    first = care[care["intime"] > care["study_time"]].groupby("n")["intime"].min()
    made = at[["n", "hadm_id", "study_time"]].merge(admissions.drop(columns="subject_id"), on="hadm_id", how="left")
    made["icu_hours"] = hours(made["n"].map(first) - made["study_time"])
    made["death_hours"] = hours(made["deathtime"] - made["study_time"]).where(made["deathtime"] > made["study_time"])
    made["hospitalised_hours"] = hours(made["admittime"] - made["study_time"])
    return made[["n", "icu_hours", "death_hours", "hospitalised_hours"]]
