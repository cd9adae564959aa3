"""What was known of the patient before the study: the `chart_*` columns. Time is a wall, and this is where it stands.

A thing counts from when it became *known*: triage from arrival, a vital sign and a medicine from its charttime, a lab from its
storetime (not from when the blood was drawn), a diagnosis from the end of an earlier visit. This visit's own diagnoses never do.
"""

import numpy as np
import pyarrow as pa

from contracts.chart import MISSING, PLAUSIBLE, STATES, VITALS, repair
from pipelines.cohort.sources import Found, Table, Tables, literal

TIME = "TIMESTAMP"

# The labs that go into a chart: MIMIC-IV's item ids (hosp/d_labitems), blood, those an emergency department orders for a chest complaint.
LABS = (
    50813, 50820, 50821, 50818,  # lactate, pH, pO2, pCO2
    50882, 50902, 50912, 50931, 50971, 50983, 51006,  # bicarbonate, chloride, creatinine, glucose, potassium, sodium, urea nitrogen
    51222, 51265, 51301,  # haemoglobin, platelets, white cells
    50963, 51003, 51196, 50889, 51237, 50862, 50885,  # NT-proBNP, troponin T, D-dimer, CRP, INR, albumin, total bilirubin
)  # fmt: skip

# Body measures: their name in hosp/omr, and what makes kilograms and centimetres of them.
MEASURES = {"bmi": ("BMI (kg/m2)", 1.0), "height_cm": ("Height (Inches)", 2.54), "weight_kg": ("Weight (Lbs)", 0.45359237)}


def read_charts(tables: Tables, found: Found, lab_items: tuple[int, ...], lab_hours: float) -> None:
    """MIMIC-IV-ED's and MIMIC-IV's tables, of the patients and visits in `visits` alone; of the 158 million labs, those that were known."""
    stays = "SEMI JOIN visits USING (stay_id)"
    ours = "SEMI JOIN rows USING (subject_id)"
    # As a subquery with EXISTS this would hold all the labs in memory.
    in_time = f"l SEMI JOIN visits v ON v.subject_id = l.subject_id AND {_lab_known(lab_hours)}"
    ed, iv = found.mimic_iv_ed, found.mimic_iv
    number, text = "BIGINT", "VARCHAR"
    whose, code, signs = {"subject_id": number}, {"icd_code": text, "icd_version": "TINYINT"}, dict.fromkeys(VITALS, text)
    given = {"stay_id": number, "charttime": TIME, "name": text}
    lab = {**whose, "itemid": number, "storetime": TIME, "valuenum": "DOUBLE", "valueuom": text, "flag": text}
    measure = {**whose, "chartdate": "DATE", "seq_num": number, "result_name": text, "result_value": text}
    measures = ", ".join(literal(name) for name, _ in MEASURES.values())
    tables.read(
        Table("labevents", iv, "hosp/labevents", lab, f"{in_time} WHERE itemid IN ({', '.join(map(str, lab_items))})"),
        Table("omr", iv, "hosp/omr", measure, f"{ours} WHERE result_name IN ({measures})"),
        Table("medrecon", ed, "ed/medrecon", given, stays),
        Table("hosp_diagnoses", iv, "hosp/diagnoses_icd", {**whose, "hadm_id": number, **code}, ours),
        Table("vitalsign", ed, "ed/vitalsign", {"stay_id": number, "charttime": TIME, **signs}, stays),
        Table("pyxis", ed, "ed/pyxis", given, stays),
        Table("ed_diagnoses", ed, "ed/diagnosis", {**whose, "stay_id": number, **code, "icd_title": text}, ours),
        Table("triage", ed, "ed/triage", {"stay_id": number, **signs, "acuity": text, "chiefcomplaint": text}, stays),
        Table("patients", iv, "hosp/patients", {**whose, "gender": text, "anchor_age": "DOUBLE", "anchor_year": number}, ours),
        Table("icd_titles", iv, "hosp/d_icd_diagnoses", {**code, "long_title": text}),
        Table("lab_items", iv, "hosp/d_labitems", {"itemid": number, "label": text}),
    )


def build_charts(tables: Tables, lab_hours: float) -> None:
    """-> `charts`, by row the `chart_*` columns that are no lists of entries, and of those that are their entries, `*_known`."""
    _vitals(tables)
    _triage(tables)
    _medicines(tables)
    _labs(tables, lab_hours)
    _history(tables)
    _body(tables)
    tables.con.execute("""
        CREATE TABLE charts AS
        SELECT v.n, b.age AS chart_age, coalesce(b.sex, v.gender) AS chart_sex,
               CASE WHEN t.n IS NOT NULL THEN v.race END AS chart_race,
               CASE WHEN t.n IS NOT NULL THEN v.arrival_transport END AS chart_transport,
               t.chiefcomplaint AS chart_chief_complaint, t.acuity AS chart_acuity,
               b.bmi AS chart_bmi, b.height_cm AS chart_height_cm, b.weight_kg AS chart_weight_kg, t.vitals AS chart_triage,
               list_concat(b.repaired, t.repaired, s.repaired) AS chart_repaired,
               list_concat(b.implausible, t.implausible, s.implausible) AS chart_implausible,
               list_concat(b.unreadable, t.unreadable, s.unreadable) AS chart_unreadable
        FROM visits v LEFT JOIN body b USING (n) LEFT JOIN triage_known t USING (n) LEFT JOIN vitals_mended s USING (n)""")


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


def _vitals(tables: Tables) -> None:
    tables.con.execute(f"""
        CREATE TABLE vitals_charted AS
        SELECT v.n, (epoch(s.charttime) - epoch(v.study_time)) / 3600 AS hours, {", ".join(VITALS)}
        FROM visits v JOIN vitalsign s USING (stay_id) WHERE s.charttime <= v.study_time""")
    tables.con.execute(f"CREATE TABLE vitals_known AS SELECT * FROM {_mended(tables, 'vitals_charted', VITALS, 'vitals.')}")
    order = ", ".join(("hours", *VITALS))
    tables.con.execute(f"""
        CREATE TABLE vitals_mended AS
        SELECT n, flatten(list(repaired ORDER BY {order})) AS repaired, flatten(list(implausible ORDER BY {order})) AS implausible,
               flatten(list(unreadable ORDER BY {order})) AS unreadable
        FROM vitals_known WHERE len(repaired) + len(implausible) + len(unreadable) > 0 GROUP BY n""")


def _triage(tables: Tables) -> None:
    tables.con.execute(f"""
        CREATE TABLE triage_known AS
        SELECT v.n, {{'hours': (epoch(v.intime) - epoch(v.study_time)) / 3600, {", ".join(f"'{q}': {q}" for q in VITALS)}}} AS vitals,
               acuity, chiefcomplaint, repaired, implausible, unreadable
        FROM visits v JOIN {_mended(tables, "triage", (*VITALS, "acuity"), "triage.")} t USING (stay_id)
        WHERE v.intime <= v.study_time
        QUALIFY row_number() OVER (PARTITION BY v.n ORDER BY chiefcomplaint) = 1""")


def _medicines(tables: Tables) -> None:
    # Both tables repeat a medicine once for each class it belongs to.
    tables.con.execute("""
        CREATE TABLE medicines_known AS
        SELECT DISTINCT v.n, m.name, m.kind, (epoch(m.charttime) - epoch(v.study_time)) / 3600 AS hours
        FROM visits v JOIN (
            SELECT *, 'reconciled' AS kind FROM medrecon UNION ALL SELECT *, 'dispensed' AS kind FROM pyxis
        ) m USING (stay_id)
        WHERE m.charttime <= v.study_time AND m.name IS NOT NULL""")


def _lab_known(lab_hours: float) -> str:
    """SQL: whether a lab `l` became known in the last hours before the study of `visits v`."""
    return f"l.storetime <= v.study_time AND l.storetime > v.study_time - to_seconds({lab_hours * 3600})"


def _labs(tables: Tables, lab_hours: float) -> None:
    tables.con.execute(f"""
        CREATE TABLE labs_known AS
        SELECT v.n, l.itemid, coalesce(i.label, l.itemid::VARCHAR) AS name, l.valuenum AS value, l.valueuom AS unit,
               l.flag = 'abnormal' AS abnormal, (epoch(l.storetime) - epoch(v.study_time)) / 3600 AS hours
        FROM visits v JOIN labevents l USING (subject_id) LEFT JOIN lab_items i USING (itemid)
        WHERE {_lab_known(lab_hours)}""")


def _history(tables: Tables) -> None:
    """-> the view `history_known`. It is by far the longest: so it names each code by its `id` in `codes`, from 0 on.

    A visit is earlier where it had ended by the study and is not the one that the study belongs to.
    """
    tables.con.execute("""
        CREATE TEMP TABLE coded AS
        SELECT d.subject_id, a.hadm_id, NULL::BIGINT AS stay_id, a.dischtime AS ended, d.icd_code, d.icd_version, t.long_title AS title
        FROM hosp_diagnoses d JOIN admissions a ON a.hadm_id = d.hadm_id
        LEFT JOIN icd_titles t ON t.icd_code = d.icd_code AND t.icd_version = d.icd_version
        UNION ALL
        SELECT d.subject_id, s.hadm_id, s.stay_id, s.outtime AS ended, d.icd_code, d.icd_version, d.icd_title AS title
        FROM ed_diagnoses d JOIN edstays s ON s.stay_id = d.stay_id""")
    # `icd` numbers the codes in their order, `id` the titles of each as well: the lowest id of a code is its first title.
    tables.con.execute("""
        CREATE TABLE codes AS
        SELECT (row_number() OVER (ORDER BY icd_version, icd_code, title) - 1)::INTEGER AS id,
               dense_rank() OVER (ORDER BY icd_version, icd_code)::INTEGER AS icd, icd_code AS code, icd_version AS version, title
        FROM (SELECT DISTINCT icd_code, icd_version, title FROM coded)""")
    tables.con.execute("""
        CREATE TABLE diagnosed AS
        SELECT d.subject_id, d.hadm_id, d.stay_id, d.ended, c.id, c.icd
        FROM coded d JOIN codes c ON d.icd_code = c.code AND d.icd_version = c.version AND d.title IS NOT DISTINCT FROM c.title""")
    tables.con.execute("DROP TABLE coded")
    tables.con.execute("""
        CREATE VIEW history_known AS
        SELECT v.n, d.icd, min(d.id) AS id, max((epoch(d.ended) - epoch(v.study_time)) / 3600) AS hours
        FROM visits v JOIN diagnosed d USING (subject_id)
        WHERE d.ended < v.study_time AND (d.hadm_id IS NULL OR d.hadm_id IS DISTINCT FROM v.hadm_id)
              AND (d.stay_id IS NULL OR d.stay_id IS DISTINCT FROM v.stay_id)
        GROUP BY v.n, d.icd""")


def _body(tables: Tables) -> None:
    """Age and sex; body measures from before the day of the study (they carry a date and no time)."""
    tables.con.execute("""
        CREATE TABLE last_measure AS
        SELECT v.n, o.result_name, max({
            'date': o.chartdate, 'number': o.seq_num, 'result': TRY_CAST(o.result_value AS DOUBLE)
        }).result AS result
        FROM visits v JOIN omr o USING (subject_id) WHERE o.chartdate < v.study_time::DATE GROUP BY v.n, o.result_name""")
    picks = ", ".join(
        f"round(max(result * {factor}) FILTER (result_name = {literal(name)}), 1) AS {q}" for q, (name, factor) in MEASURES.items()
    )
    names = ("age", *MEASURES)
    tables.con.execute(f"""
        CREATE TABLE body_raw AS
        SELECT v.n, p.gender AS sex, p.anchor_age + year(v.study_time) - p.anchor_year AS age, m.* EXCLUDE (n)
        FROM visits v LEFT JOIN patients p USING (subject_id)
        LEFT JOIN (SELECT n, {picks} FROM last_measure GROUP BY n) m USING (n)""")
    tables.con.execute(f"CREATE TABLE body AS SELECT * FROM {_mended(tables, 'body_raw', names, '')}")
    assert set(names) <= PLAUSIBLE.keys()
