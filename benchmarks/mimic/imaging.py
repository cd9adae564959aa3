"""MIMIC-CXR-JPG's tables, and the reports of MIMIC-CXR."""

import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from mimic.world import DAY, Sizes, World, blank, pick, stream, words, world

from contracts.findings import FINDINGS


def metadata(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    study = np.sort(np.concatenate([np.arange(len(w.study_id)), rng.integers(0, len(w.study_id), max(0, s.images - len(w.study_id)))]))
    first = np.concatenate([[True], study[1:] != study[:-1]])
    letters = np.frombuffer(rng.bytes(20 * len(study)).hex().encode(), np.uint8).reshape(-1, 5, 8)
    dashed = np.concatenate([letters, np.full((len(study), 5, 1), ord("-"), np.uint8)], axis=2).reshape(-1, 45)[:, :44]
    frontal, view = pick(rng, ["AP", "PA"], len(study), [6, 4]), pick(rng, ["LATERAL", "LL", "AP", "PA"], len(study), [52, 22, 16, 10])
    when = w.study_time[study].astype("datetime64[s]")
    date = pa.array(when.astype("datetime64[D]"))
    clock = w.study_time[study] % DAY
    return pa.table({
        "dicom_id": np.ascontiguousarray(dashed).view("S44").ravel().astype(str),
        "subject_id": w.patients[w.study_of[study]], "study_id": w.study_id[study],
        "PerformedProcedureStepDescription": pick(rng, ["CHEST (PORTABLE AP)", "CHEST (PRE-OP PA AND LAT)"], len(study)),
        "ViewPosition": blank(rng, pc.if_else(pa.array(first & (rng.random(len(study)) < 0.95)), frontal, view), 0.042),
        "Rows": 2000 + rng.integers(0, 1100, len(study)), "Columns": 1900 + rng.integers(0, 1200, len(study)),
        "StudyDate": pc.strftime(date, "%Y%m%d"),
        "StudyTime": clock // 3600 * 10_000 + clock // 60 % 60 * 100 + clock % 60 + rng.integers(0, 1000, len(study)) / 1000,
        "ProcedureCodeSequence_CodeMeaning": pick(rng, ["CHEST (PORTABLE AP)", "CHEST (PA AND LAT)"], len(study)),
        "ViewCodeSequence_CodeMeaning": pick(rng, ["antero-posterior", "postero-anterior", "lateral"], len(study)),
        "PatientOrientationCodeSequence_CodeMeaning": pick(rng, ["Erect", "Recumbent"], len(study), [9, 1]),
    })  # fmt: skip


def split(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    images = metadata(w, s, stream(s, "metadata"))
    of = pick(rng, ["train", "validate", "test"], len(w.patients), [977, 8, 15])
    at = np.searchsorted(w.patients, images["subject_id"].to_numpy())
    return pa.table({**{n: images[n] for n in ("dicom_id", "study_id", "subject_id")}, "split": of.take(pa.array(at))})


def chexpert(w: World, s: Sizes, rng: np.random.Generator) -> pa.Table:
    has = rng.random(len(w.study_id)) > 0.011
    n = int(has.sum())
    labels = {f: pick(rng, pa.array([None, 1.0, 0.0, -1.0]), n, [75, 15, 6, 4]) for f in FINDINGS}
    return pa.table({"subject_id": w.patients[w.study_of[has]], "study_id": w.study_id[has], **labels})


def write_reports(folder: Path, sizes: Sizes) -> None:
    """The first `sizes.reports` studies' reports (about 1,000 characters each), as PhysioNet's zip has them."""
    w, rng = world(sizes), stream(sizes, "reports")
    sentences = [s.capitalize() + "." for s in words(5_000, 11, 5, 16).to_pylist()]
    lengths = {"EXAMINATION": 1, "INDICATION": 1, "TECHNIQUE": 1, "COMPARISON": 1, "FINDINGS": 6, "IMPRESSION": 2}
    (folder / "reports").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "reports/mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
        for study in range(min(sizes.reports, len(w.study_id))):
            at = iter(rng.integers(0, len(sentences), sum(lengths.values())).tolist())
            text = "\n \n".join(f" {name}:  " + "\n ".join(sentences[next(at)] for _ in range(n)) for name, n in lengths.items())
            subject = str(w.patients[w.study_of[study]])
            archive.writestr(f"files/p{subject[:2]}/p{subject}/s{w.study_id[study]}.txt", " " * 33 + "FINAL REPORT\n" + text + "\n")
