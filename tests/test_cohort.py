"""The cohort on tables of a few rows: one thing at a time."""

import gzip

import pytest
from trees import cohort, write_tree

from contracts.chart import Chart
from contracts.errors import CxrayError
from contracts.storage import place
from pipelines.cohort.reports import sections
from pipelines.lease import Lease
from pipelines.verify import verify

ADMITTED = [{"hadm_id": 20000001}]


def one(tmp_path, settings=None, **tables):
    rows, _ = cohort(write_tree(tmp_path / "tree", **tables), tmp_path / "out", **(settings or {}))
    assert len(rows) == 1
    return rows[0]


def test_study_time_gets_its_leading_zeros_back(tmp_path):
    row = one(tmp_path, metadata=[{"StudyTime": 905.456}])
    assert str(row["study_time"]) == "2150-01-01 00:09:05"


def test_image_uri_follows_physionet(tmp_path):
    row = one(tmp_path)
    assert row["image_uri"].endswith("/mimic-cxr-jpg/2.1.0/files/p10/p10000001/s50000001/d1.jpg")


def test_of_a_studys_frontals_pa_comes_first_then_the_larger_then_the_lower_id(tmp_path):
    images = [
        {"dicom_id": "a", "ViewPosition": "AP", "Rows": 900},
        {"dicom_id": "b", "ViewPosition": "PA"},
        {"dicom_id": "c", "ViewPosition": "PA", "Rows": 200},
        {"dicom_id": "d", "ViewPosition": "PA", "Rows": 200},
        {"dicom_id": "e", "ViewPosition": "LATERAL", "Rows": 999},
        {"dicom_id": "f", "ViewPosition": None},
    ]
    tree = write_tree(tmp_path / "tree", metadata=images)
    rows, card = cohort(tree, tmp_path / "one")
    assert [r["row_id"] for r in rows] == ["c"]
    assert card["images"] == {"in_table": 6, "rows": 1, "dropped": {"not_chosen": 3, "view_blank": 1, "view_not_frontal": 1}}
    assert [r["row_id"] for r in cohort(tree, tmp_path / "frontal", images="frontal")[0]] == ["a", "b", "c", "d"]
    assert len(cohort(tree, tmp_path / "all", images="all")[0]) == 6


def test_an_odd_frontal_view_is_not_frontal_unless_named(tmp_path):
    tree = write_tree(tmp_path / "tree", metadata=[{"ViewPosition": "AP AXIAL"}, {"dicom_id": "d2", "study_id": 50000002}])
    assert cohort(tree, tmp_path / "a")[1]["images"]["dropped"] == {"view_not_frontal": 1}
    assert cohort(tree, tmp_path / "b", frontal_views=["AP", "PA", "AP AXIAL"])[1]["images"]["rows"] == 2


def test_no_row_vanishes_without_a_reason(tmp_path):
    images = [
        {"dicom_id": "ok"},
        {"dicom_id": "ok"},
        {"dicom_id": "when", "study_id": 50000002, "StudyTime": None},
        {"dicom_id": "whose", "study_id": 50000003},
    ]
    split = [{"dicom_id": "ok"}, {"dicom_id": "when"}]
    _, card = cohort(write_tree(tmp_path / "tree", metadata=images, split=split), tmp_path / "out")
    assert card["images"] == {"in_table": 4, "rows": 1, "dropped": {"duplicate_id": 1, "no_split": 1, "no_study_time": 1}}


def test_labels_keep_three_states_blank_and_no_row_apart(tmp_path):
    images = [{"dicom_id": f"d{i}", "study_id": 50000000 + i} for i in (1, 2)]
    row, bare = cohort(
        write_tree(tmp_path / "tree", metadata=images, chexpert=[{"Edema": 1.0, "Fracture": 0.0, "Pneumonia": -1.0}]), tmp_path / "out"
    )[0]
    assert (row["label_edema"], row["label_fracture"], row["label_pneumonia"], row["label_atelectasis"]) == (1, 0, -1, None)
    assert row["label_row"] and not bare["label_row"] and bare["label_edema"] is None


def test_inside_a_stay_beats_near_one_then_the_nearer_then_the_nearer_arrival_then_the_lower_id(tmp_path):
    def linked(where, *stays):
        rows = [{"stay_id": i, "intime": a, "outtime": b} for i, a, b in stays]
        return one(tmp_path / where, edstays=rows)["stay_id"]

    day = "2150-01-01 "
    assert linked("inside", (1, day + "12:30:00", day + "13:00:00"), (2, day + "02:00:00", day + "12:00:00")) == "2"
    assert linked("nearer", (1, day + "15:00:00", day + "16:00:00"), (2, day + "09:00:00", day + "10:00:00")) == "2"
    assert linked("arrival", (1, day + "01:00:00", day + "20:00:00"), (2, day + "11:00:00", day + "20:00:00")) == "2"
    assert linked("id", (7, day + "11:00:00", day + "20:00:00"), (5, day + "11:00:00", day + "20:00:00")) == "5"
    assert linked("far", (1, "2150-01-02 12:00:01", "2150-01-02 13:00:00")) is None
    assert linked("just", (1, "2150-01-02 12:00:00", "2150-01-02 13:00:00")) == "1"


def test_nothing_known_after_the_study_enters_the_chart(tmp_path):
    late = "2150-01-01 12:00:01"
    row = one(
        tmp_path,
        edstays=[{}],
        triage=[{}],
        vitalsign=[{"heartrate": 70}, {"heartrate": 71, "charttime": "2150-01-01 12:00:00"}, {"heartrate": 150, "charttime": late}],
        medrecon=[{}, {"name": "late", "charttime": late}],
        pyxis=[{}, {"name": "late", "charttime": late}],
        # drawn before the study but stored after it: not yet known
        labevents=[{}, {"storetime": late, "valuenum": 9.0}, {"storetime": None, "valuenum": 8.0}, {"storetime": "2149-12-31 11:59:00"}],
        d_labitems=[{}],
    )
    chart = Chart.from_row(row)
    assert [v.heartrate for v in chart.vitals] == [70, 71]
    assert [v.hours for v in chart.vitals] == [-1, 0]
    assert {(m.name, m.kind) for m in chart.medicines} == {("aspirin", "reconciled"), ("Furosemide", "dispensed")}
    assert [(lab.name, lab.value, lab.abnormal) for lab in chart.labs] == [("Lactate", 2.1, True)]


def test_triage_is_not_known_before_arrival(tmp_path):
    row = one(tmp_path, edstays=[{"intime": "2150-01-01 13:00:00"}], triage=[{}])
    assert row["stay_id"] == "30000001" and row["stay_offset_hours"] == -1
    chart = Chart.from_row(row)
    assert chart.triage is None and chart.chief_complaint is None and chart.transport is None


def test_history_is_of_earlier_visits_and_never_of_this_one(tmp_path):
    row = one(
        tmp_path,
        # the study comes three hours after its own visit ended
        edstays=[
            {"hadm_id": 20000001, "outtime": "2150-01-01 09:00:00", "intime": "2150-01-01 05:00:00"},
            {"stay_id": 30000000, "intime": "2140-05-05 00:00:00", "outtime": "2140-05-05 05:00:00"},
        ],
        diagnosis=[{}, {"stay_id": 30000000, "icd_code": "4019", "icd_version": 9, "icd_title": "HYPERTENSION"}],
        admissions=[
            {"admittime": "2150-01-01 06:00:00", "dischtime": "2150-01-01 08:00:00"},
            {"hadm_id": 20000000, "admittime": "2145-01-01 00:00:00", "dischtime": "2145-01-03 00:00:00"},
        ],
        diagnoses_icd=[{"icd_code": "486"}, {"hadm_id": 20000000}, {"hadm_id": 20000000, "icd_version": 10}],
        d_icd_diagnoses=[{}],
    )
    history = {(d.code, d.version): d.title for d in Chart.from_row(row).history}
    assert history == {("4019", 9): "HYPERTENSION", ("4280", 9): "Congestive heart failure", ("4280", 10): None}
    assert {(c["code"], c["version"]) for c in row["target_icd"]} == {("J189", 10), ("486", 9)}


def test_a_medicine_listed_once_for_each_of_its_classes_counts_once(tmp_path):
    assert len(one(tmp_path, edstays=[{}], medrecon=[{}, {}])["chart_medicines"]) == 1


def test_dirty_values_are_repaired_or_missing_and_counted(tmp_path):
    tree = write_tree(
        tmp_path / "tree",
        edstays=[{}],
        triage=[{"temperature": 36.5, "dbp": 879, "pain": "Critical"}],
        vitalsign=[{"o2sat": 10, "temperature": 38.0}, {"pain": "0/10", "charttime": "2150-01-01 11:05:00"}],
    )
    (row,), card = cohort(tree, tmp_path / "out")
    chart = Chart.from_row(row)
    assert chart.triage is not None
    assert (chart.triage.temperature, chart.triage.dbp, chart.triage.pain) == (97.7, None, None)
    assert (chart.vitals[0].o2sat, chart.vitals[0].temperature, chart.vitals[1].pain) == (None, 100.4, 0)
    assert card["repairs"] == {
        "repaired": {"triage.temperature": 1, "vitals.pain": 1, "vitals.temperature": 1},
        "implausible": {"triage.dbp": 1, "vitals.o2sat": 1},
        "unreadable": {"triage.pain": 1},
    }


def test_age_sex_and_body_measures(tmp_path):
    measures = [
        {"result_value": "31.0", "chartdate": "2149-01-01"},
        {"result_value": "25.5", "chartdate": "2149-12-01"},
        {"result_value": "99.0", "chartdate": "2150-01-01"},  # of the study's own day: perhaps after it
        {"result_name": "Height (Inches)", "result_value": "70"},
        {"result_name": "Weight (Lbs)", "result_value": "9999"},
    ]
    chart = Chart.from_row(one(tmp_path, patients=[{}], omr=measures))
    assert (chart.age, chart.sex, chart.bmi, chart.height_cm, chart.weight_kg) == (62, "F", 25.5, 177.8, None)
    assert chart.implausible == ["weight_kg"]


def test_outcomes_come_after_the_study_with_their_hours(tmp_path):
    row = one(
        tmp_path, edstays=ADMITTED, admissions=[{"deathtime": "2150-01-03 12:00:00"}], icustays=[{}, {"intime": "2150-01-01 11:00:00"}],
    )  # fmt: skip
    assert (row["target_icu"], row["target_icu_hours"]) == (True, 24)
    assert (row["target_death"], row["target_death_hours"]) == (True, 48)
    assert (row["target_hospitalised"], row["target_hospitalised_hours"]) == (True, 5)


def test_what_is_not_known_is_not_called_no(tmp_path):
    no_iv = one(tmp_path / "a", edstays=ADMITTED)
    assert no_iv["target_icu"] is None and no_iv["target_death"] is None and no_iv["target_hospitalised"]
    no_visit = one(tmp_path / "b", patients=[{}])
    assert no_visit["target_hospitalised"] is None and no_visit["target_icu"] is None


def test_sections_of_a_report():
    text = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough // eval
   pneumonia

 COMPARISON:  None.

 FINDINGS:

 The lungs are clear: no effusion.

 IMPRESSION:

 No acute process.
"""
    found = sections(text)
    assert found["indication"] == "___ year old woman with cough // eval pneumonia"
    assert found["findings"] == "The lungs are clear: no effusion." and found["impression"] == "No acute process."
    assert found["technique"] is None
    assert sections(" WET READ: ___ ___ 9:40 PM\n  No pneumonia.")["findings"] == "___ ___ 9:40 PM No pneumonia."
    assert sections("Heart size is normal. The lungs are clear.")["findings"] == "Heart size is normal. The lungs are clear."


def test_a_short_report_is_left_out_and_said_to_be(tmp_path):
    images = [{"dicom_id": f"d{i}", "study_id": 50000000 + i} for i in (1, 2, 3)]
    reports = {50000001: "FINDINGS: Lungs are clear, heart is normal.", 50000002: " IMPRESSION: ___\n"}
    tree = write_tree(tmp_path / "tree", reports=reports, metadata=images)
    rows, card = cohort(tree, tmp_path / "out")
    assert [r["report_status"] for r in rows] == ["present", "short", "absent"]
    assert rows[1]["report_impression"] is None
    assert card["reports"] == {"present": 1, "short": 1, "absent": 1}
    rows, card = cohort(tree, tmp_path / "strict", reports_required=True)
    assert [r["row_id"] for r in rows] == ["d1"] and card["images"]["dropped"] == {"report_absent": 1, "report_short": 1}


def test_reports_come_from_physionets_zip_too(tmp_path):
    import zipfile

    tree = write_tree(tmp_path / "tree")
    (tree / "mimic-cxr/2.1.0").mkdir(parents=True)
    with zipfile.ZipFile(tree / "mimic-cxr/2.1.0/mimic-cxr-reports.zip", "w") as archive:
        archive.writestr("files/p10/p10000001/s50000001.txt", "IMPRESSION: No acute cardiopulmonary process.")
    (row,), _ = cohort(tree, tmp_path / "out")
    assert row["report_impression"] == "No acute cardiopulmonary process."


def test_own_splits_are_by_patient_stratified_and_kept_when_the_cohort_grows(tmp_path):
    def images(count):
        return [{"dicom_id": f"d{i:04d}", "study_id": 5 * 10**7 + i, "subject_id": 10**7 + i // 2} for i in range(count)]

    def labels(count):
        return [{"study_id": 5 * 10**7 + i, "Pneumothorax": 1.0 if i // 2 % 10 == 0 else 0.0} for i in range(count)]

    settings = {"splits": {"kind": "own", "seed": 3}}
    small = write_tree(tmp_path / "small", metadata=images(400), chexpert=labels(400))
    rows, card = cohort(small, tmp_path / "out", **settings)
    before = {r["group_id"]: r["split"] for r in rows}
    assert {s: v["patients"] for s, v in card["splits"].items()} == {"train": 140, "validate": 30, "test": 30}
    positives = card["findings"]["Pneumothorax"]
    assert {s: n["positive"] for s, n in positives.items()} == {"train": 28, "validate": 6, "test": 6}
    assert card["audit"]["patients_in_two_splits"] == 0
    large = write_tree(tmp_path / "large", metadata=images(600), chexpert=labels(600))
    after = {r["group_id"]: r["split"] for r in cohort(large, tmp_path / "out", **settings)[0]}
    assert len(after) == 300 and {p: after[p] for p in before} == before
    with pytest.raises(CxrayError, match="another seed"):
        cohort(large, tmp_path / "out", splits={"kind": "own", "seed": 4})


def test_plain_csv_serves_as_well(tmp_path):
    tree = write_tree(tmp_path / "tree", edstays=[{}])
    for file in tree.rglob("*.csv.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert cohort(tree, tmp_path / "out")[0][0]["stay_id"] == "30000001"


def test_a_rebuilt_cohort_takes_the_old_ones_place_and_verifies(tmp_path):
    tree = write_tree(tmp_path / "tree", edstays=[{}], triage=[{}])
    cohort(tree, tmp_path / "out")
    (tmp_path / "out/cohort/data/left-by-a-killed-one.parquet").write_bytes(b"half")
    with Lease(place(tmp_path / "out/cohort/_lease")), pytest.raises(CxrayError, match="another job"):
        cohort(tree, tmp_path / "out")
    cohort(tree, tmp_path / "out")
    assert len(list((tmp_path / "out/cohort/data").iterdir())) == 1
    assert verify(place(tmp_path / "out/cohort")).clean
    assert "For research, not for diagnosis." in (tmp_path / "out/cohort/cohort.html").read_text()


def test_a_named_source_that_is_not_there_is_an_error_and_an_unnamed_one_is_absent(tmp_path):
    tree = write_tree(tmp_path / "tree")
    _, card = cohort(tree, tmp_path / "out")
    assert card["absent"] == ["reports", "mimic_iv", "mimic_iv_ed"]
    for name in ("cxr", "images", "reports", "mimic_iv", "mimic_iv_ed"):
        with pytest.raises(CxrayError, match=r"check the path|set sources"):
            cohort(tree, tmp_path / "bad", sources={name: str(tmp_path / "nowhere")})
    assert not (tmp_path / "bad").exists()


def test_each_source_may_lie_somewhere_else(tmp_path):
    cxr, ed = write_tree(tmp_path / "a"), write_tree(tmp_path / "b", edstays=[{}])
    sources = {"cxr": str(cxr / "mimic-cxr-jpg/2.1.0"), "mimic_iv_ed": str(ed / "mimic-iv-ed/2.2")}
    from contracts.config import load
    from pipelines.cohort.job import CohortConfig, run

    card = run(load(CohortConfig, {"out": str(tmp_path / "out"), "sources": sources})).card
    assert card["ed"]["linked"] == 1 and card["sources"]["mimic_iv"] == "absent"


def test_a_table_without_a_needed_column_is_named(tmp_path):
    tree = write_tree(tmp_path / "tree", edstays=[{}])
    file = tree / "mimic-iv-ed/2.2/ed/edstays.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode().replace("intime", "in_time")
    file.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(CxrayError, match=r"edstays\.csv\.gz: lacks the column intime"):
        cohort(tree, tmp_path / "out")
    assert not (tmp_path / "out/cohort/dataset.json").exists()


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08\x00broken", gzip.compress(b"", mtime=0)])
def test_a_table_that_is_no_table_is_one_sentence(tmp_path, data):
    tree = write_tree(tmp_path / "tree", edstays=[{}])
    (tree / "mimic-iv-ed/2.2/ed/edstays.csv.gz").write_bytes(data)
    with pytest.raises(CxrayError, match="edstays"):
        cohort(tree, tmp_path / "out")


def test_an_empty_cohort_is_an_error_that_says_why(tmp_path):
    with pytest.raises(CxrayError, match="the cohort is empty: 1 images dropped as view_not_frontal"):
        cohort(write_tree(tmp_path / "tree", metadata=[{"ViewPosition": "LL"}]), tmp_path / "out")
    with pytest.raises(CxrayError, match="no MIMIC-CXR-JPG tables"):
        cohort(tmp_path / "nowhere", tmp_path / "out")
