"""What became of the patient after the study: never an input. NULL where no visit is known, so that nothing can be said."""

from pipelines.cohort.sources import Found, Table, Tables


def read_targets(tables: Tables, found: Found) -> None:
    """-> `targets`: by row ICU transfer, death and hospitalisation with their hours from the study; `target_codes`: the visit's codes."""
    ours = "SEMI JOIN rows USING (subject_id)"
    icu = {"subject_id": "BIGINT", "hadm_id": "BIGINT", "intime": "TIMESTAMP"}
    tables.read(Table("icustays", found.mimic_iv, "icu/icustays", icu, ours))
    tables.con.execute("""
        CREATE TABLE target_codes AS
        SELECT v.n, d.icd_code AS code, d.icd_version AS version FROM visits v JOIN ed_diagnoses d USING (stay_id)
        UNION SELECT v.n, d.icd_code, d.icd_version FROM visits v JOIN hosp_diagnoses d USING (hadm_id)""")
    # Without MIMIC-IV nothing is known of intensive care or death: that is not the same as 'did not happen'.
    seen = "known" if found.mimic_iv else "false"
    hours = "(epoch({}) - epoch(v.study_time)) / 3600"
    tables.con.execute(f"""
        CREATE TABLE targets AS
        WITH icu AS (
            SELECT v.n, min(i.intime) AS intime FROM visits v JOIN icustays i USING (hadm_id)
            WHERE i.intime > v.study_time GROUP BY v.n
        )
        SELECT v.n,
               CASE WHEN {seen} THEN icu.intime IS NOT NULL END AS target_icu,
               {hours.format("icu.intime")} AS target_icu_hours,
               CASE WHEN {seen} THEN coalesce(a.deathtime > v.study_time, false) END AS target_death,
               CASE WHEN a.deathtime > v.study_time THEN {hours.format("a.deathtime")} END AS target_death_hours,
               CASE WHEN known THEN v.hadm_id IS NOT NULL END AS target_hospitalised,
               {hours.format("a.admittime")} AS target_hospitalised_hours,
               v.disposition AS target_disposition
        FROM (SELECT *, stay_id IS NOT NULL OR hadm_id IS NOT NULL AS known FROM visits) v
        LEFT JOIN icu USING (n) LEFT JOIN admissions a USING (hadm_id)""")
