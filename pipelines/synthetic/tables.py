"""Column names exactly as PhysioNet's files have them, and a writer of tables that gives the same bytes for the same rows."""

import csv
import gzip
import io
from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path

from contracts.findings import FINDINGS

JPG = Path("mimic-cxr-jpg/2.1.0")
CXR = Path("mimic-cxr/2.1.0")
ED = Path("mimic-iv-ed/2.2/ed")
HOSP = Path("mimiciv/3.1/hosp")
ICU = Path("mimiciv/3.1/icu")

COLUMNS: dict[Path, str] = {
    JPG / "mimic-cxr-2.0.0-metadata.csv.gz": (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
        "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
    ),
    JPG / "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split",
    JPG / "mimic-cxr-2.0.0-chexpert.csv.gz": "subject_id,study_id," + ",".join(FINDINGS),
    JPG / "mimic-cxr-2.0.0-negbio.csv.gz": "subject_id,study_id," + ",".join(FINDINGS),
    JPG / "mimic-cxr-2.1.0-test-set-labeled.csv": "study_id," + ",".join(FINDINGS).replace("Lung Opacity", "Airspace Opacity"),
    CXR / "cxr-record-list.csv.gz": "subject_id,study_id,dicom_id,path",
    CXR / "cxr-study-list.csv.gz": "subject_id,study_id,path",
    ED / "edstays.csv.gz": "subject_id,hadm_id,stay_id,intime,outtime,gender,race,arrival_transport,disposition",
    ED / "triage.csv.gz": "subject_id,stay_id,temperature,heartrate,resprate,o2sat,sbp,dbp,pain,acuity,chiefcomplaint",
    ED / "vitalsign.csv.gz": "subject_id,stay_id,charttime,temperature,heartrate,resprate,o2sat,sbp,dbp,rhythm,pain",
    ED / "medrecon.csv.gz": "subject_id,stay_id,charttime,name,gsn,ndc,etc_rn,etccode,etcdescription",
    ED / "pyxis.csv.gz": "subject_id,stay_id,charttime,med_rn,name,gsn_rn,gsn",
    ED / "diagnosis.csv.gz": "subject_id,stay_id,seq_num,icd_code,icd_version,icd_title",
    HOSP / "patients.csv.gz": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    HOSP / "admissions.csv.gz": (
        "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,admission_location,discharge_location,"
        "insurance,language,marital_status,race,edregtime,edouttime,hospital_expire_flag"
    ),
    HOSP / "diagnoses_icd.csv.gz": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    HOSP / "d_icd_diagnoses.csv.gz": "icd_code,icd_version,long_title",
    HOSP / "labevents.csv.gz": (
        "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,valueuom,"
        "ref_range_lower,ref_range_upper,flag,priority,comments"
    ),
    HOSP / "d_labitems.csv.gz": "itemid,label,fluid,category",
    HOSP / "omr.csv.gz": "subject_id,chartdate,seq_num,result_name,result_value",
    HOSP / "services.csv.gz": "subject_id,hadm_id,transfertime,prev_service,curr_service",
    HOSP / "transfers.csv.gz": "subject_id,hadm_id,transfer_id,eventtype,careunit,intime,outtime",
    ICU / "icustays.csv.gz": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    ICU / "d_items.csv.gz": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,highnormalvalue",
    Path("regions.csv.gz"): "dicom_id,finding,x0,y0,x1,y1",
}

Row = list[object]


def cell(value: object) -> str:
    """None is blank; times and dates as MIMIC writes them."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return value.isoformat() if isinstance(value, date) else str(value)


def write_table(root: Path, name: Path, rows: Iterable[Row]) -> int:
    """Writes one table under its column names; returns the number of rows. The same rows give the same bytes."""
    columns = COLUMNS[name].split(",")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    written = 0
    for row in rows:
        assert len(row) == len(columns), f"{name}: {row}"
        writer.writerow([cell(value) for value in row])
        written += 1
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
    return written


def study_folder(subject_id: int, study_id: int) -> str:
    """'files/p10/p10000032/s50414267'"""
    return f"files/p{str(subject_id)[:2]}/p{subject_id}/s{study_id}"
