"""The synthetic MIMIC: what a seed makes, that it is whole, and that the generator's own word on it holds."""

import csv
import gzip
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest

from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from pipelines.synthetic import job
from pipelines.synthetic.lesions import HAZE, LESIONS, ON_LATERAL, picture
from pipelines.synthetic.lexicon import HARD_PAIR, coined_medicines, passages
from pipelines.synthetic.phantom import LEVELS, NOISE, draw_body, official_grey
from pipelines.synthetic.reports import says
from pipelines.synthetic.scene import MEASURES
from pipelines.synthetic.signs import KNOWN_LABS
from pipelines.synthetic.tables import COLUMNS, CXR, ED, HOSP, ICU, JPG, study_folder

REAL = Path(__file__).parents[2] / "shared" / "data"  # the open demo tables, where somebody laid them beside the checkout
REAL_CLASSES = ("mab", "nib", "pril", "olol", "statin", "sartan", "azole", "cillin", "mycin", "vir", "pam", "lam", "tidine",
                "prazole", "dipine", "gliptin", "xaban", "oxetine", "ide", "ine", "one", "cept")  # fmt: skip


@pytest.fixture(scope="session")
def cfg(tmp_path_factory) -> job.SynthConfig:
    return job.SynthConfig(out=str(tmp_path_factory.mktemp("synth")), patients=24, size=256, dicom=True)


@pytest.fixture(scope="session")
def tree(cfg) -> Path:
    job.run(cfg, processes=2)
    return Path(cfg.output().path)


@pytest.fixture(scope="session")
def truth(tree) -> pd.DataFrame:
    return pd.read_parquet(tree / "truth" / "images.parquet")


@pytest.fixture(scope="session")
def many() -> list:
    """The plan of 300 patients, undrawn: for shares that a small set cannot show."""
    return job.plan(job.SynthConfig(out="nowhere"))


def table(tree: Path, name: Path, **kwargs) -> pd.DataFrame:
    return pd.read_csv(tree / name, **kwargs)


def jpg_of(tree: Path, row) -> Path:
    return tree / JPG / study_folder(row.subject_id, row.study_id) / f"{row.dicom_id}.jpg"


def file_bytes(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# --- one folder, whole or not at all ---
def test_same_settings_give_the_same_bytes_on_one_process_or_two(cfg, tree, tmp_path):
    job.run(cfg.model_copy(update={"out": str(tmp_path), "into": "again"}), processes=1)
    assert file_bytes(tmp_path / "again") == file_bytes(tree)


def test_a_second_run_with_the_same_settings_touches_nothing(cfg, tree):
    before = (tree / "synth.json").stat().st_mtime_ns
    assert not job.run(cfg).made
    assert (tree / "synth.json").stat().st_mtime_ns == before


def test_other_settings_and_strange_folders_are_refused(cfg, tree, tmp_path):
    with pytest.raises(CxrayError, match=r"other settings \(seed\)"):
        job.run(cfg.model_copy(update={"seed": 1}))
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(CxrayError, match="not made by synth"):
        job.run(cfg.model_copy(update={"out": str(tmp_path.parent), "into": tmp_path.name}))
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_a_run_that_dies_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    small = job.SynthConfig(out=str(tmp_path), patients=3, size=128)
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_truth", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.run(small, processes=1)
    assert not (tmp_path / "mimic").exists()
    assert job.run(small, processes=1).made
    assert [p.name for p in tmp_path.iterdir()] == ["mimic"]


# --- tables ---
@pytest.mark.parametrize("name", [n for n in COLUMNS if n.parent in (ED, HOSP, ICU)], ids=lambda n: n.name)
def test_columns_are_those_of_the_real_tables(tree, name):
    folder = REAL / ("mimic-iv-ed-demo-2.2" if name.parent == ED else "mimic-iv-demo-2.2") / name.parent.name
    if not (folder / name.name).exists():
        pytest.skip(f"the demo table {name.name} is not here")
    with gzip.open(folder / name.name, "rt") as real, gzip.open(tree / name, "rt") as ours:
        assert next(csv.reader(ours)) == next(csv.reader(real))


def test_subjects_never_cross_splits_and_one_image_has_none(tree):
    split = table(tree, JPG / "mimic-cxr-2.0.0-split.csv.gz")
    assert (split.groupby("subject_id").split.nunique() == 1).all()
    assert set(split.split) == {"train", "validate", "test"}
    metadata = table(tree, JPG / "mimic-cxr-2.0.0-metadata.csv.gz")
    assert len(set(metadata.dicom_id) - set(split.dicom_id)) == 1


def test_no_finding_is_never_zero_and_all_states_occur(tree):
    labels = table(tree, JPG / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert set(labels["No Finding"].dropna()) == {1.0}
    assert set(labels[list(FINDINGS)].stack().dropna()) == {1.0, 0.0, -1.0}
    negbio = table(tree, JPG / "mimic-cxr-2.0.0-negbio.csv.gz")
    differ = (labels.fillna(9) != negbio.fillna(9)).to_numpy().mean()
    assert 0 < differ < 0.02


def test_study_times_lost_their_zeros_and_some_are_blank(tree, truth):
    metadata = table(tree, JPG / "mimic-cxr-2.0.0-metadata.csv.gz").set_index("dicom_id")
    assert metadata.StudyTime.isna().any() and (metadata.StudyTime < 100_000).any()
    for row in truth.itertuples():
        told = metadata.loc[row.dicom_id]
        if pd.isna(row.study_time):
            assert np.isnan(told.StudyTime)
        else:
            assert pd.Timestamp(f"{told.StudyDate} {int(told.StudyTime):06d}") == row.study_time


def test_reports_say_what_the_labels_say(tree, truth):
    studies = truth.drop_duplicates("study_id")
    assert set(studies.report) == {"present", "short", "absent"}
    for row in studies.itertuples():
        path = tree / CXR / f"{study_folder(row.subject_id, row.study_id)}.txt"
        assert path.exists() == (row.report != "absent")
        text = path.read_text() if path.exists() else ""
        assert (len(text.strip()) < 30) == (row.report != "present")
        if row.report == "present" and row.label_row:
            for finding in FINDINGS:
                state = getattr(row, label_column(finding))
                said = {s for s in (1, 0, -1) if not (finding == "No Finding" and s != 1) and says(text, finding, s)}
                assert said == (set() if pd.isna(state) else {int(state)}), (finding, text)


# --- dirt ---
def test_charts_hold_the_known_dirt(tree):
    cells = pd.concat([table(tree, ED / f"{n}.csv.gz", dtype=str) for n in ("triage", "vitalsign")])
    assert cells.temperature.astype(float).between(25, 45).any() and {"9.8", "986"} & set(cells.temperature)
    assert {"879"} <= set(cells.dbp) and {"10"} <= set(cells.o2sat) and {"11"} <= set(cells.sbp)
    assert {"UA", "0/10", "13"} <= set(cells.pain)
    missing = cells[["heartrate", "resprate", "o2sat", "sbp", "dbp", "temperature", "pain"]].isna().to_numpy().mean()
    assert 0.05 < missing < 0.2


def test_charts_hold_what_came_after_the_study(tree, truth):
    linked = truth.dropna(subset=["stay_id"])
    stays = table(tree, ED / "edstays.csv.gz", parse_dates=["intime", "outtime"])
    for name in ("vitalsign", "medrecon", "pyxis"):
        rows = table(tree, ED / f"{name}.csv.gz", parse_dates=["charttime"]).merge(linked[["stay_id", "study_time"]], on="stay_id")
        assert (rows.charttime > rows.study_time).any(), name
    vitals = table(tree, ED / "vitalsign.csv.gz", parse_dates=["charttime"]).merge(stays, on="stay_id")
    assert (vitals.charttime < vitals.intime).any() and (vitals.charttime > vitals.outtime).any()
    labs = table(tree, HOSP / "labevents.csv.gz", parse_dates=["charttime", "storetime"]).merge(truth, on="subject_id")
    assert ((labs.charttime < labs.study_time) & (labs.storetime > labs.study_time)).any(), "drawn, but not yet known"


def test_files_are_what_the_truth_says(tree, truth):
    starts = {"ok": b"\xff\xd8", "rgb": b"\xff\xd8", "truncated": b"\xff\xd8", "png": b"\x89PNG", "png16": b"\x89PNG", "empty": b""}
    for row in truth.itertuples():
        path = jpg_of(tree, row)
        assert path.exists() == (row.file != "missing")
        if path.exists():
            data = path.read_bytes()
            assert data.startswith(starts[row.file]) and (row.file == "empty") == (not data)
            assert data.endswith(b"\xff\xd9") or row.file not in ("ok", "rgb")
    assert set(truth.file) == {*starts, "missing"}


def test_one_picture_stands_under_two_patients(tree, truth):
    good = truth[truth.file == "ok"]
    seen = good.assign(data=[jpg_of(tree, row).read_bytes() for row in good.itertuples()]).groupby("data").subject_id.nunique()
    assert sorted(seen[seen > 1]) == [2]


def test_dicoms_come_in_kinds_and_equal_their_jpegs(tree, truth):
    kinds = set()
    for row in truth[truth.file == "ok"].itertuples():
        ds = pydicom.dcmread(tree / CXR / study_folder(row.subject_id, row.study_id) / f"{row.dicom_id}.dcm")
        syntax = ds.file_meta.get("TransferSyntaxUID")
        kinds |= {ds.PhotometricInterpretation, getattr(syntax, "name", "no syntax"), "window" if "WindowCenter" in ds else "no window"}
        if syntax is None:
            continue
        pixels = LEVELS - ds.pixel_array if ds.PhotometricInterpretation == "MONOCHROME1" else ds.pixel_array
        written = cv2.imread(str(jpg_of(tree, row)), cv2.IMREAD_GRAYSCALE)
        assert np.abs(official_grey(pixels).astype(int) - written).mean() < 2
    assert kinds == {"MONOCHROME1", "MONOCHROME2", "window", "no window", "no syntax", "RLE Lossless", "Explicit VR Little Endian"}


# --- the generator's word ---
def link(stays, t: pd.Timestamp) -> int | None:
    """The written rule, by brute force: smallest distance within a day, then nearest arrival, then lowest id."""
    near = []
    for s in stays.itertuples():
        distance = max((s.intime - t).total_seconds(), (t - s.outtime).total_seconds(), 0)
        if distance <= 24 * 3600:
            near.append((distance, abs((t - s.intime).total_seconds()), s.stay_id))
    return min(near)[2] if near else None


def judge(measure: str, cell: str | float) -> str:
    """The written repair rules, for one cell as the table has it."""
    ranges = {"temperature": (77, 113), "heartrate": (10, 300), "resprate": (3, 80), "o2sat": (40, 100), "sbp": (40, 300),
              "dbp": (10, 200), "pain": (0, 10)}  # fmt: skip
    if not isinstance(cell, str):
        return "missing"
    tenths = measure == "pain" and cell.endswith("/10")
    try:
        value = float(cell.removesuffix("/10") if tenths else cell)
    except ValueError:
        return "unreadable"
    if ranges[measure][0] <= value <= ranges[measure][1]:
        return "repaired" if tenths else "ok"
    return "repaired" if measure == "temperature" and 25 <= value <= 45 else "implausible"


def test_the_truth_knows_every_spoilt_cell(tree, truth):
    triage = table(tree, ED / "triage.csv.gz", dtype=dict.fromkeys(MEASURES, str)).set_index("stay_id")
    vitals = table(tree, ED / "vitalsign.csv.gz", dtype=dict.fromkeys(MEASURES, str), parse_dates=["charttime"])
    for row in truth.itertuples():
        for m in MEASURES:
            assert getattr(row, f"triage_{m}") == (judge(m, triage.loc[row.stay_id, m]) if row.triage_known else "missing")
        known = vitals[(vitals.stay_id == row.stay_id) & (vitals.charttime <= row.study_time)]
        verdicts = [judge(m, cell) for m in MEASURES for cell in known[m]]
        for status in ("repaired", "implausible", "unreadable"):
            assert getattr(row, f"vitals_{status}") == verdicts.count(status)


def test_the_truth_follows_the_written_rules(tree, truth):
    stays = table(tree, ED / "edstays.csv.gz", parse_dates=["intime", "outtime"])
    admissions = table(tree, HOSP / "admissions.csv.gz", parse_dates=["admittime", "dischtime", "deathtime"])
    icu = table(tree, ICU / "icustays.csv.gz", parse_dates=["intime"]).set_index("hadm_id").intime
    labs = table(tree, HOSP / "labevents.csv.gz", parse_dates=["storetime"])
    labs = labs[labs.itemid.isin(KNOWN_LABS)]
    codes = table(tree, HOSP / "diagnoses_icd.csv.gz", dtype={"icd_code": str}).merge(admissions[["hadm_id", "dischtime"]])
    codes = pd.concat([codes.rename(columns={"dischtime": "known"}), table(tree, ED / "diagnosis.csv.gz", dtype={"icd_code": str}).merge(
        stays[["stay_id", "hadm_id", "outtime"]]).rename(columns={"outtime": "known"})])  # fmt: skip
    series = {n: table(tree, ED / f"{n}.csv.gz", parse_dates=["charttime"]) for n in ("vitalsign", "medrecon", "pyxis")}
    for row in truth.dropna(subset=["study_time"]).itertuples():
        t, own = row.study_time, stays[stays.subject_id == row.subject_id]
        stay_id = link(own, t)
        assert stay_id == (None if pd.isna(row.stay_id) else row.stay_id)
        for name, count in (("vitalsign", row.known_vitals), ("medrecon", row.known_reconciled), ("pyxis", row.known_dispensed)):
            assert count == ((series[name].stay_id == stay_id) & (series[name].charttime <= t)).sum()
        drawn = labs[labs.subject_id == row.subject_id].storetime
        assert row.known_labs == ((drawn <= t) & (drawn > t - pd.Timedelta(hours=24))).sum()
        hadm = own.set_index("stay_id").hadm_id.get(stay_id)
        during = admissions[(admissions.subject_id == row.subject_id) & (admissions.admittime <= t) & (admissions.dischtime >= t)]
        hadm = hadm if pd.notna(hadm) else next(iter(during.hadm_id), None)
        history = codes[(codes.subject_id == row.subject_id) & (codes.known < t) & (codes.stay_id != stay_id) & ~(codes.hadm_id == hadm)]
        assert row.known_history == len(history[["icd_code", "icd_version"]].drop_duplicates())
        assert hadm == (None if pd.isna(row.hadm_id) else row.hadm_id) and row.target_hospitalised == (hadm is not None)
        assert row.target_icu == (hadm in icu.index and icu[hadm] > t)
        assert row.target_death == ((admissions.hadm_id == hadm) & (admissions.deathtime > t)).any()


def test_one_frontal_a_study_is_chosen_and_sometimes_not_the_first(truth):
    assert (truth.groupby("study_id").chosen.sum() <= 1).all()
    assert truth[truth.chosen].frontal.all() and truth[truth.chosen].split.notna().all()
    pairs = truth[truth.frontal].groupby("study_id").filter(lambda s: len(s) > 1)
    assert pairs[pairs.study_time.isna() | pairs.split.isna()].groupby("study_id").size().size >= 2


def test_visits_lie_around_studies_as_planned(many):
    kinds = [e.kind for p in many for e in p.episodes for _ in e.studies]
    assert 0.65 < np.mean([k in ("inside", "overlap", "same_start", "inside_and_near") for k in kinds]) < 0.8
    assert 0.05 < np.mean([k in ("near_before", "near_after", "between") for k in kinds]) < 0.15
    assert any(not p.stays for p in many)


def test_views_findings_and_outcomes_have_plausible_shares(many):
    studies = [s for p in many for s in p.studies]
    listed = [i.listed_view for s in studies for i in s.images]
    views = {view: listed.count(view) / len(listed) for view in set(listed)}
    assert views["AP"] > 0.3 and views["PA"] > 0.2 and views["LATERAL"] > 0.1 and views["LL"] > 0.04 and 0.03 < views[""] < 0.1
    stated = {f: np.mean([s.case.states.get(f) == 1 for s in studies]) for f in FINDINGS}
    assert all(0.008 < stated[f] < 0.045 for f in ("Pleural Other", "Fracture", "Lung Lesion", "Pneumothorax"))
    assert all(stated[f] > 0.2 for f in ("Support Devices", "Pleural Effusion", "Lung Opacity"))
    admissions = [e.admission for p in many for e in p.episodes if e.admission]
    assert 0.08 < np.mean([a.icu is not None for a in admissions]) < 0.35
    assert 0.02 < np.mean([a.death is not None for a in admissions]) < 0.15


def test_vitals_foretell_the_intensive_care_unit(many):
    rates = {True: [], False: []}
    for episode in (e for p in many for e in p.episodes if e.admission and e.admission.stay):
        rows = episode.admission.stay.vitals
        rates[episode.admission.icu is not None] += [int(v.cells["heartrate"]) for v in rows if v.status["heartrate"] == "ok"]
    assert np.mean(rates[True]) > np.mean(rates[False]) + 8


def test_hard_cases_look_alike_and_only_the_chart_tells(many):
    studies = [s for p in many for s in p.studies]
    told = [s.case.clue for s in studies]
    clues = {clue: told.count(clue) / len(told) for clue in set(told)}
    assert 0.20 < clues["name"] < 0.30 and 0.15 < clues["chart"] < 0.25 and clues["picture"] > 0.15
    for study in studies:
        if study.case.clue in ("name", "chart"):
            assert len(set(HARD_PAIR) & set(study.case.present)) == 1
            assert all(i.signs[HAZE] == 1 and not set(HARD_PAIR) & set(i.signs) for i in study.images)
        if study.case.clue == "name":
            known = [m.name for m in study.linked.reconciled + study.linked.dispensed if m.time <= study.time]
            assert study.case.drug.name in known and study.case.drug.finding in study.case.present


# --- coined words ---
def test_most_coined_names_of_the_test_split_never_occur_in_train(many):
    names = {split: {s.case.drug.name for p in many if p.split == split for s in p.studies if s.case.drug} for split in ("train", "test")}
    assert len(names["test"]) > 20
    assert len(names["test"] - names["train"]) >= 0.7 * len(names["test"])


def test_coined_names_are_no_real_medicines_and_their_passages_say_so():
    drugs = coined_medicines(0)
    assert coined_medicines(0) == drugs and len({d.name for d in drugs}) == len(drugs)
    assert not any(d.name.endswith(REAL_CLASSES) for d in drugs)
    for drug, passage in zip(drugs, passages(0)):
        text = passage["text"].lower()
        assert drug.name in text and drug.finding.lower() in text and "made up for synthetic data" in text


# --- pictures ---
@pytest.mark.parametrize("finding", LESIONS)
def test_every_finding_can_be_seen(finding):
    for seed in range(4):
        body = draw_body(np.random.default_rng(seed))
        for view in ("AP", "PA", "LATERAL") if finding in ON_LATERAL else ("AP", "PA"):
            healthy, _ = picture(body, view, (270, 320), seed, {})
            ill, boxes = picture(body, view, (270, 320), seed, {finding: 1.0})
            x0, y0, x1, y1 = boxes[finding]
            change = np.abs(ill[y0:y1, x0:x1].astype(float) - healthy[y0:y1, x0:x1]) / LEVELS
            assert change.mean() > NOISE and np.quantile(change, 0.95) > 5 * NOISE, (finding, view, seed)


def test_regions_lie_inside_their_images(tree, truth):
    regions = table(tree, Path("regions.csv.gz"))
    metadata = table(tree, JPG / "mimic-cxr-2.0.0-metadata.csv.gz")
    both = regions.merge(metadata, on="dicom_id", validate="many_to_one")
    assert len(both) == len(regions) > 50
    assert ((both.x0 >= 0) & (both.y0 >= 0) & (both.x1 <= both.Columns) & (both.y1 <= both.Rows)).all()
    assert (both.x1 > both.x0).all() and (both.y1 > both.y0).all()
    assert set(regions.finding) < set(FINDINGS) and "No Finding" not in set(regions.finding)


def test_an_ap_heart_is_broader_than_a_pa_heart():
    body = draw_body(np.random.default_rng(0))
    boxes = {view: picture(body, view, (270, 320), 3, {"Cardiomegaly": 1.0})[0] for view in ("AP", "PA")}
    assert boxes["AP"].shape == boxes["PA"].shape == (320, 270)
    lungs = slice(120, 260)
    assert boxes["AP"][lungs].mean() > boxes["PA"][lungs].mean()
