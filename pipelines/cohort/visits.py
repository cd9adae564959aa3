"""The emergency stay and the admission that a study belongs to."""

from pipelines.cohort.sources import Found, Table, Tables

TIME = "TIMESTAMP"


def read_visits(tables: Tables, found: Found) -> None:
    """-> `edstays`, `admissions`, of the patients in `rows` alone."""
    ours = "SEMI JOIN rows USING (subject_id)"
    stays = {
        "subject_id": "BIGINT", "hadm_id": "BIGINT", "stay_id": "BIGINT", "intime": TIME, "outtime": TIME, "gender": "VARCHAR",
        "race": "VARCHAR", "arrival_transport": "VARCHAR", "disposition": "VARCHAR",
    }  # fmt: skip
    admissions = {"subject_id": "BIGINT", "hadm_id": "BIGINT", "admittime": TIME, "dischtime": TIME, "deathtime": TIME}
    tables.read(
        Table("admissions", found.mimic_iv, "hosp/admissions", admissions, ours),
        Table("edstays", found.mimic_iv_ed, "ed/edstays", stays, ours),
    )


def link_visits(tables: Tables, window_hours: float) -> None:
    """`rows` x `edstays` -> `visits`: n, stay_id, hadm_id, the stay's times and the study's offset from arrival.

    A study may fall in no stay, or near two. Of those within the window the one it lies inside wins over one it lies near, then the
    nearer, then the nearer arrival, then the lower stay_id. The admission is the stay's, or else the one that the study lies in.
    """
    tables.con.execute(
        """
        CREATE TABLE linked AS
        SELECT r.n, s.*, r.study_time,
               greatest(0, epoch(s.intime) - epoch(r.study_time), epoch(r.study_time) - epoch(coalesce(s.outtime, s.intime))) AS distance
        FROM rows r JOIN edstays s USING (subject_id)
        WHERE distance <= $seconds
        QUALIFY row_number() OVER (
            PARTITION BY r.n ORDER BY distance, abs(epoch(r.study_time) - epoch(s.intime)), s.stay_id) = 1""",
        {"seconds": window_hours * 3600},
    )
    tables.con.execute("""
        CREATE TABLE inside AS
        SELECT r.n, a.hadm_id FROM rows r JOIN admissions a USING (subject_id)
        WHERE r.study_time BETWEEN a.admittime AND a.dischtime
        QUALIFY row_number() OVER (PARTITION BY r.n ORDER BY a.admittime DESC, a.hadm_id) = 1""")
    tables.con.execute("""
        CREATE TABLE visits AS
        SELECT r.n, r.subject_id, r.study_time, l.stay_id, coalesce(l.hadm_id, i.hadm_id) AS hadm_id, l.intime, l.outtime,
               l.race, l.gender, l.arrival_transport, l.disposition,
               (epoch(r.study_time) - epoch(l.intime)) / 3600 AS stay_offset_hours
        FROM rows r LEFT JOIN linked l USING (n) LEFT JOIN inside i USING (n)""")
