"""What was known of the patient before the study: the `chart_*` columns. Time is a wall, and this is where it stands.

A thing counts from when it became *known*: triage from arrival, a vital sign and a medicine from its charttime, a lab from its
storetime (not from when the blood was drawn), a diagnosis from the end of an earlier visit. This visit's own diagnoses never do.
"""

import numpy as np
import pyarrow as pa

from contracts.chart import MISSING, PLAUSIBLE, STATES, VITALS, repair
from pipelines.cohort.sources import Found, Tables, literal

TIME = "TIMESTAMP"

# The labs that go into a chart: MIMIC-IV's item ids (hosp/d_labitems), blood, those an emergency department orders for a chest complaint.
LABS = (
    50813, 50820, 50821, 50818,  # lactate, pH, pO2, pCO2
    50882, 50902, 50912, 50931, 50971, 50983, 51006,  # bicarbonate, chloride, creatinine, glucose, potassium, sodium, urea nitrogen
    51222, 51265, 51301,  # haemoglobin, platelets, white cells
    50963, 51003, 51196, 50889, 51237, 50862, 50885,  # NT-proBNP, troponin T, D-dimer, CRP, INR, albumin, total bilirubin
)  # fmt: skip


def read_charts(tables: Tables, found: Found, lab_items: tuple[int, ...]) -> None:
    """MIMIC-IV-ED's and MIMIC-IV's tables, of the patients and visits in `visits` alone."""
    stays = "stay_id IN (SELECT stay_id FROM visits)"
    ours = "subject_id IN (SELECT subject_id FROM rows)"
    numbers = dict.fromkeys((q for q in VITALS if q != "pain"), "VARCHAR")
    ed, iv = found.mimic_iv_ed, found.mimic_iv
    tables.read(
        "triage",
        ed,
        "ed/triage",
        {"stay_id": "BIGINT", **numbers, "pain": "VARCHAR", "acuity": "VARCHAR", "chiefcomplaint": "VARCHAR"},
        stays,
    )
    tables.read("vitalsign", ed, "ed/vitalsign", {"stay_id": "BIGINT", "charttime": TIME, **numbers, "pain": "VARCHAR"}, stays)
    tables.read("medrecon", ed, "ed/medrecon", {"stay_id": "BIGINT", "charttime": TIME, "name": "VARCHAR"}, stays)
    tables.read("pyxis", ed, "ed/pyxis", {"stay_id": "BIGINT", "charttime": TIME, "name": "VARCHAR"}, stays)
    code = {"icd_code": "VARCHAR", "icd_version": "TINYINT"}
    tables.read("ed_diagnoses", ed, "ed/diagnosis", {"subject_id": "BIGINT", "stay_id": "BIGINT", **code, "icd_title": "VARCHAR"}, ours)
    tables.read("hosp_diagnoses", iv, "hosp/diagnoses_icd", {"subject_id": "BIGINT", "hadm_id": "BIGINT", **code}, ours)
    tables.read("icd_titles", iv, "hosp/d_icd_diagnoses", {**code, "long_title": "VARCHAR"})
    tables.read(
        "patients",
        iv,
        "hosp/patients",
        {"subject_id": "BIGINT", "gender": "VARCHAR", "anchor_age": "DOUBLE", "anchor_year": "BIGINT"},
        ours,
    )
    tables.read(
        "omr",
        iv,
        "hosp/omr",
        {"subject_id": "BIGINT", "chartdate": "DATE", "seq_num": "BIGINT", "result_name": "VARCHAR", "result_value": "VARCHAR"},
        f"{ours} AND result_name IN ('BMI (kg/m2)', 'Height (Inches)', 'Weight (Lbs)')",
    )
    tables.read("lab_items", iv, "hosp/d_labitems", {"itemid": "BIGINT", "label": "VARCHAR"})
    tables.read(
        "labevents",
        iv,
        "hosp/labevents",
        {"subject_id": "BIGINT", "itemid": "BIGINT", "storetime": TIME, "valuenum": "DOUBLE", "valueuom": "VARCHAR", "flag": "VARCHAR"},
        f"itemid IN ({', '.join(map(str, lab_items))}) AND {ours}",
    )


def build_charts(tables: Tables, lab_hours: float) -> None:
    """-> `charts`: by row the `chart_*` columns."""
    _vitals(tables)
    _triage(tables)
    _medicines(tables)
    _labs(tables, lab_hours)
    _history(tables)
    _body(tables)
    tables.con.execute("""
        CREATE TABLE charts AS
        SELECT v.row_id,
               b.age AS chart_age, coalesce(b.sex, v.gender) AS chart_sex,
               CASE WHEN t.row_id IS NOT NULL THEN v.race END AS chart_race,
               CASE WHEN t.row_id IS NOT NULL THEN v.arrival_transport END AS chart_transport,
               t.chiefcomplaint AS chart_chief_complaint, t.acuity AS chart_acuity,
               b.bmi AS chart_bmi, b.height_cm AS chart_height_cm, b.weight_kg AS chart_weight_kg,
               t.vitals AS chart_triage, s.vitals AS chart_vitals, m.medicines AS chart_medicines, l.labs AS chart_labs,
               h.history AS chart_history,
               list_concat(b.repaired, t.repaired, s.repaired) AS chart_repaired,
               list_concat(b.implausible, t.implausible, s.implausible) AS chart_implausible,
               list_concat(b.unreadable, t.unreadable, s.unreadable) AS chart_unreadable
        FROM visits v
        LEFT JOIN body b USING (row_id) LEFT JOIN triage_known t USING (row_id) LEFT JOIN vitals_known s USING (row_id)
        LEFT JOIN medicines_known m USING (row_id) LEFT JOIN labs_known l USING (row_id) LEFT JOIN history_known h USING (row_id)""")


def _mended(tables: Tables, table: str, quantities: tuple[str, ...], prefix: str) -> str:
    """SQL for `table` with its quantities as numbers, and lists of the names that were repaired, implausible or unreadable.

    `repair` itself runs on the distinct entries, of which there are few; they are joined back.
    """
    joins, columns = "", []
    for q in quantities:
        raw = tables.con.sql(f"SELECT DISTINCT {q} FROM {table} WHERE {q} IS NOT NULL").to_arrow_table()[q]
        values, states = repair(q, np.array(raw.to_pylist(), dtype=object))
        fixed = pa.table({"raw": raw, "value": pa.array(values, from_pandas=True), "state": states})
        tables.con.register(f"{table}_{q}", fixed)
        joins += f" LEFT JOIN {table}_{q} ON x.{q} = {table}_{q}.raw"
        columns.append(f"{table}_{q}.value AS {q}")
    for state in STATES[MISSING + 2 :]:
        which = STATES.index(state)
        cases = ", ".join(f"CASE WHEN {table}_{q}.state = {which} THEN {literal(prefix + q)} END" for q in quantities)
        columns.append(f"list_filter([{cases}], lambda n: n IS NOT NULL) AS {state}")
    return f"(SELECT x.* EXCLUDE ({', '.join(quantities)}), {', '.join(columns)} FROM {table} x{joins})"


_STRUCT = "{'hours': %s, " + ", ".join(f"'{q}': {q}" for q in VITALS) + "}"


def _vitals(tables: Tables) -> None:
    hours = "(epoch(s.charttime) - epoch(v.study_time)) / 3600"
    order = ", ".join(("charttime", *VITALS))
    tables.con.execute(f"""
        CREATE TABLE vitals_known AS
        SELECT v.row_id, list({_STRUCT % hours} ORDER BY {order}) AS vitals,
               flatten(list(repaired ORDER BY {order})) AS repaired, flatten(list(implausible ORDER BY {order})) AS implausible,
               flatten(list(unreadable ORDER BY {order})) AS unreadable
        FROM visits v JOIN {_mended(tables, "vitalsign", VITALS, "vitals.")} s USING (stay_id)
        WHERE s.charttime <= v.study_time GROUP BY v.row_id""")


def _triage(tables: Tables) -> None:
    hours = "(epoch(v.intime) - epoch(v.study_time)) / 3600"
    tables.con.execute(f"""
        CREATE TABLE triage_known AS
        SELECT v.row_id, {_STRUCT % hours} AS vitals, acuity, chiefcomplaint, repaired, implausible, unreadable
        FROM visits v JOIN {_mended(tables, "triage", (*VITALS, "acuity"), "triage.")} t USING (stay_id)
        WHERE v.intime <= v.study_time
        QUALIFY row_number() OVER (PARTITION BY v.row_id ORDER BY chiefcomplaint) = 1""")


def _medicines(tables: Tables) -> None:
    # Both tables repeat a medicine once for each class it belongs to.
    tables.con.execute("""
        CREATE TABLE medicines_known AS
        SELECT row_id, list({'name': name, 'kind': kind, 'hours': hours} ORDER BY hours, kind, name) AS medicines
        FROM (
            SELECT DISTINCT v.row_id, m.name, m.kind, (epoch(m.charttime) - epoch(v.study_time)) / 3600 AS hours
            FROM visits v JOIN (
                SELECT *, 'reconciled' AS kind FROM medrecon UNION ALL SELECT *, 'dispensed' AS kind FROM pyxis
            ) m USING (stay_id)
            WHERE m.charttime <= v.study_time AND m.name IS NOT NULL
        ) GROUP BY row_id""")


def _labs(tables: Tables, lab_hours: float) -> None:
    tables.con.execute(
        """
        CREATE TABLE labs_known AS
        SELECT v.row_id, list({
            'name': coalesce(i.label, l.itemid::VARCHAR), 'value': l.valuenum, 'unit': l.valueuom, 'abnormal': l.flag = 'abnormal',
            'hours': (epoch(l.storetime) - epoch(v.study_time)) / 3600
        } ORDER BY l.storetime, l.itemid, l.valuenum) AS labs
        FROM visits v JOIN labevents l USING (subject_id) LEFT JOIN lab_items i USING (itemid)
        WHERE l.storetime <= v.study_time AND l.storetime > v.study_time - to_seconds($seconds)
        GROUP BY v.row_id""",
        {"seconds": lab_hours * 3600},
    )


def _history(tables: Tables) -> None:
    # A visit is earlier where it had ended by the study and is not the one that the study belongs to.
    tables.con.execute("""
        CREATE TABLE history_known AS
        SELECT row_id, list({
            'code': icd_code, 'version': icd_version, 'title': title, 'hours': hours
        } ORDER BY hours DESC, icd_version, icd_code) AS history
        FROM (
            SELECT row_id, icd_code, icd_version, any_value(title ORDER BY title) AS title, max(hours) AS hours FROM (
                SELECT v.row_id, d.icd_code, d.icd_version, t.long_title AS title,
                       (epoch(a.dischtime) - epoch(v.study_time)) / 3600 AS hours
                FROM visits v JOIN admissions a USING (subject_id) JOIN hosp_diagnoses d ON d.hadm_id = a.hadm_id
                LEFT JOIN icd_titles t ON t.icd_code = d.icd_code AND t.icd_version = d.icd_version
                WHERE a.dischtime < v.study_time AND a.hadm_id IS DISTINCT FROM v.hadm_id
                UNION ALL
                SELECT v.row_id, d.icd_code, d.icd_version, d.icd_title AS title,
                       (epoch(s.outtime) - epoch(v.study_time)) / 3600 AS hours
                FROM visits v JOIN edstays s USING (subject_id) JOIN ed_diagnoses d ON d.stay_id = s.stay_id
                WHERE s.outtime < v.study_time AND s.stay_id IS DISTINCT FROM v.stay_id
                      AND (s.hadm_id IS NULL OR s.hadm_id IS DISTINCT FROM v.hadm_id)
            ) GROUP BY row_id, icd_code, icd_version
        ) GROUP BY row_id""")


def _body(tables: Tables) -> None:
    """Age and sex; body measures from before the day of the study (they carry a date and no time)."""
    measures = {"bmi": ("BMI (kg/m2)", 1.0), "height_cm": ("Height (Inches)", 2.54), "weight_kg": ("Weight (Lbs)", 0.45359237)}
    tables.con.execute("""
        CREATE TABLE last_measure AS
        SELECT v.row_id, o.result_name, TRY_CAST(o.result_value AS DOUBLE) AS result
        FROM visits v JOIN omr o USING (subject_id) WHERE o.chartdate < v.study_time::DATE
        QUALIFY row_number() OVER (PARTITION BY v.row_id, o.result_name ORDER BY o.chartdate DESC, o.seq_num DESC, result_value) = 1""")
    picks = ", ".join(
        f"round(max(result * {factor}) FILTER (result_name = {literal(name)}), 1) AS {q}" for q, (name, factor) in measures.items()
    )
    names = ("age", *measures)
    tables.con.execute(f"""
        CREATE TABLE body_raw AS
        SELECT v.row_id, p.gender AS sex, p.anchor_age + year(v.study_time) - p.anchor_year AS age, m.* EXCLUDE (row_id)
        FROM visits v LEFT JOIN patients p USING (subject_id)
        LEFT JOIN (SELECT row_id, {picks} FROM last_measure GROUP BY row_id) m USING (row_id)""")
    tables.con.execute(f"CREATE TABLE body AS SELECT * FROM {_mended(tables, 'body_raw', names, '')}")
    assert set(names) <= PLAUSIBLE.keys()
