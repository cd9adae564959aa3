"""Images and studies: which image becomes a row, when its study was, its view, split and labels. No image vanishes without a reason."""

from collections.abc import Sequence

from contracts.findings import FINDINGS, label_column
from pipelines.cohort.sources import Found, Table, Tables, literal, quoted

TABLE = "mimic-cxr-2.0.0-"  # the tables keep this name in release 2.1.0


def read_studies(tables: Tables, found: Found, labeler: str) -> None:
    """MIMIC-CXR-JPG's tables -> `metadata`, `split`, `labels`."""
    images = {
        "dicom_id": "VARCHAR", "subject_id": "BIGINT", "study_id": "BIGINT", "ViewPosition": "VARCHAR",
        "Rows": "BIGINT", "Columns": "BIGINT", "StudyDate": "VARCHAR", "StudyTime": "DOUBLE",
    }  # fmt: skip
    known = "WHERE dicom_id IS NOT NULL AND subject_id IS NOT NULL AND study_id IS NOT NULL"
    tables.read(
        Table("metadata", found.cxr, TABLE + "metadata", images, known),
        Table("split", found.cxr, TABLE + "split", {"dicom_id": "VARCHAR", "split": "VARCHAR"}),
        Table("label_table", found.cxr, TABLE + labeler, {"study_id": "BIGINT", **dict.fromkeys(FINDINGS, "DOUBLE")}),
    )
    findings = ", ".join(f"any_value({quoted(f)}::TINYINT) AS {label_column(f)}" for f in FINDINGS)
    tables.con.execute(f"CREATE TABLE labels AS SELECT study_id, {findings} FROM label_table GROUP BY study_id")


def read_images(tables: Tables, found: Found, image_format: str, frontal_views: Sequence[str]) -> None:
    """`metadata` -> `images`: one row an image of the table, its study time, view, frontal or not, and where its file is.

    StudyTime is a float HHMMSS.frac that lost its leading zeros; seconds are kept, the fraction is not.
    """
    views = ", ".join(literal(v) for v in frontal_views)
    folder = "'p' || substr(subject_id::VARCHAR, 1, 2) || '/p' || subject_id || '/s' || study_id || '/' || dicom_id"
    tables.con.execute(f"""
        CREATE TABLE images AS
        SELECT dicom_id AS row_id, subject_id, study_id, coalesce(ViewPosition, '') AS view, view IN ({views}) AS frontal,
               "Rows" * "Columns" AS pixels,
               try_strptime(StudyDate || printf('%06d', floor(StudyTime)::BIGINT), '%Y%m%d%H%M%S') AS study_time,
               {literal(found.images.uri.rstrip("/") + "/files/")} || {folder} || '.{image_format}' AS image_uri,
               row_number() OVER (PARTITION BY dicom_id ORDER BY subject_id, study_id) > 1 AS again
        FROM metadata""")


def choose_rows(tables: Tables, keep: str, reports_required: bool, images_needed: Sequence[str] = ()) -> None:
    """`images`, `splits` (row_id, split), `reports` -> `rows`, the images that stay, numbered `n` from 0, and `dropped` (row_id, reason).

    keep: 'one_frontal' a study (PA before AP, then the larger, then the lower id), 'frontal', or 'all'. An image is dropped for the
    first reason that holds.
    """
    reasons = ["WHEN again THEN 'duplicate_id'", "WHEN study_time IS NULL THEN 'no_study_time'", "WHEN split IS NULL THEN 'no_split'"]
    if keep != "all":
        reasons += ["WHEN view = '' THEN 'view_blank'", "WHEN NOT frontal THEN 'view_not_frontal'"]
    if reports_required:
        reasons += ["WHEN status = 'absent' THEN 'report_absent'", "WHEN status = 'short' THEN 'report_short'"]
    tables.con.execute(f"""
        CREATE TABLE judged AS
        SELECT i.*, s.split, s.official, coalesce(r.status, 'absent') AS report_status, CASE {" ".join(reasons)} END AS reason
        FROM images i LEFT JOIN splits s USING (row_id) LEFT JOIN reports r USING (study_id)""")
    if keep == "one_frontal":
        tables.con.execute("""
            UPDATE judged SET reason = 'not_chosen' FROM (
                SELECT row_id FROM judged WHERE reason IS NULL
                QUALIFY row_number() OVER (PARTITION BY study_id ORDER BY view <> 'PA', view, pixels DESC, row_id) > 1
            ) other WHERE judged.row_id = other.row_id AND judged.reason IS NULL""")
    # All that follows joins by this number, which is the order of the cohort too: an id is a text of 44 letters.
    tables.con.execute("""
        CREATE TABLE rows AS
        SELECT row_number() OVER (ORDER BY subject_id::VARCHAR, study_id::VARCHAR, row_id)::INTEGER - 1 AS n, *
        FROM judged WHERE reason IS NULL""")
    tables.con.execute("CREATE TABLE dropped AS SELECT row_id, study_id, reason FROM judged WHERE reason IS NOT NULL")
