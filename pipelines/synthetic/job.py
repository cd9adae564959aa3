"""`cxray synth OUT --patients N --seed S [--dicom]`: a synthetic MIMIC in a folder.

In: how many patients, and a seed. Out: the trees of MIMIC-CXR-JPG 2.1.0, MIMIC-CXR 2.1.0, MIMIC-IV-ED 2.2 and MIMIC-IV 3.1,
regions.csv.gz (where each finding was drawn) and truth/images.parquet (what the generator says it made). The same
settings give the same bytes, on one process or many.
"""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from pydantic import Field

from contracts.errors import CxrayError
from pipelines.job import VerbConfig
from pipelines.synthetic.chart import Charts
from pipelines.synthetic.lexicon import passages
from pipelines.synthetic.oddities import put_oddities
from pipelines.synthetic.pictures import Drawing, draw_study
from pipelines.synthetic.records import TABLES
from pipelines.synthetic.reports import report
from pipelines.synthetic.scene import Patient
from pipelines.synthetic.tables import CXR, study_folder, write_table
from pipelines.synthetic.timeline import Lives
from pipelines.synthetic.truth import write_truth

_VERSION = 2  # of what a seed means: raise it when the same settings give other bytes
_README = """All of this is synthetic. No patient, picture, report, visit or value in these folders is real.

They were made by `cxray synth` to have the layout, the column names and the dirt of MIMIC-CXR-JPG, MIMIC-CXR, MIMIC-IV-ED
and MIMIC-IV (PhysioNet), and hold nothing of theirs. Nothing learnt here is true of people. Some medicines are coined
words that mean nothing outside these folders.

regions.csv.gz         dicom_id, finding, x0, y0, x1, y1: where each finding was drawn, in pixels of the image, x1 and y1 outside.
                       Doubted findings are drawn faintly. 'No Finding' is not drawn and has no box. On a lateral picture
                       only some findings are drawn.
knowledge/             passages on the coined words, a corpus for `cxray knowledge`.
truth/images.parquet   what the generator says it made, a row an image of the metadata table.
synth.json             the settings that made this folder; written last.
"""


class SynthConfig(VerbConfig):
    """A synthetic MIMIC."""

    into: str = Field(default="mimic", description="folder to write, local")
    patients: int = Field(default=300, ge=3, description="number of patients; 2 studies each on average")
    seed: int = Field(default=0, ge=0, description="the same seed gives the same bytes")
    dicom: bool = Field(default=False, description="write DICOM files too")
    size: int = Field(default=640, ge=128, le=4096, description="longest side of the pictures, in pixels")


@dataclass(frozen=True)
class Summary:
    """What a run made."""

    out: str
    patients: int
    studies: int
    images: int
    stays: int
    admissions: int
    splits: dict[str, int]  # images a split
    findings: dict[str, int]  # studies that state a finding
    made: bool  # False: it was there already

    def __str__(self) -> str:
        head = "made" if self.made else "already there, made by the same settings:"
        splits = ", ".join(f"{name} {n:,}" for name, n in self.splits.items())
        common = ", ".join(f"{name} {n:,}" for name, n in sorted(self.findings.items(), key=lambda kv: -kv[1])[:5])
        return (
            f"synthetic MIMIC {head} {self.out}\n"
            f"  {self.patients:,} patients, {self.studies:,} studies, {self.images:,} images ({splits})\n"
            f"  {self.stays:,} emergency stays, {self.admissions:,} hospital admissions\n"
            f"  studies that state: {common}"
        )


def run(cfg: SynthConfig, processes: int | None = None) -> Summary:
    """Makes the folder, or says that it is there. `processes` draw the pictures (all cores unless told).

    Raises CxrayError if the folder holds anything else.
    """
    out = cfg.output().local
    if out is None:
        raise CxrayError(f"synth writes local folders only, not {cfg.output()}: copy it there afterwards")
    settings = {"version": _VERSION, **cfg.model_dump(exclude=set(cfg.outside_fingerprint))}
    there = _made_before(out, settings)
    patients = plan(cfg)
    summary = _summary(cfg, patients, made=not there)
    if there:
        return summary
    partial_out = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_out, ignore_errors=True)  # of a run that was killed
    partial_out.mkdir(parents=True)
    _write(partial_out, cfg, patients, processes or os.cpu_count() or 1)
    (partial_out / "synth.json").write_text(json.dumps(settings, indent=1) + "\n")
    if out.exists():
        out.rmdir()  # empty, as seen above
    partial_out.rename(out)
    return summary


def plan(cfg: SynthConfig) -> list[Patient]:
    """The patients with all that will be written of them; nothing is drawn yet."""
    lives = Lives(cfg.patients, cfg.seed, cfg.size)
    patients = lives.all()
    put_oddities(lives, patients)
    charts = Charts(cfg.seed)
    for patient in patients:
        charts.fill(patient)
    return patients


def _made_before(out: Path, settings: dict[str, object]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made_by = json.loads((out / "synth.json").read_text())
    except (OSError, ValueError):
        raise CxrayError(f"{out} is not empty and was not made by synth: choose another folder, or remove it") from None
    if made_by != settings:
        changed = ", ".join(k for k in settings if settings[k] != made_by.get(k))
        raise CxrayError(f"{out} was made with other settings ({changed}): choose another folder, or remove it")
    return True


def _write(root: Path, cfg: SynthConfig, patients: list[Patient], processes: int) -> None:
    for name, rows in TABLES.items():
        write_table(root, name, rows(patients))
    _write_reports(root, cfg.seed, patients)
    write_truth(root / "truth" / "images.parquet", patients)
    (root / "knowledge").mkdir()
    (root / "knowledge" / "coined.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages(cfg.seed)))
    (root / "README.txt").write_text(_README)
    drawings: list[Drawing] = [
        (study_folder(p.subject_id, s.study_id), s.case.present, s.images, cfg.dicom) for p in patients for s in p.studies
    ]
    draw = partial(draw_study, root)
    if processes == 1:
        regions = [row for drawing in drawings for row in draw(drawing)]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            regions = [row for rows in pool.map(draw, drawings, chunksize=8) for row in rows]
    write_table(root, Path("regions.csv.gz"), regions)


def _write_reports(root: Path, seed: int, patients: list[Patient]) -> None:
    for p in patients:
        for s in p.studies:
            text = report(np.random.default_rng([seed, 4, s.study_id]), p, s)
            if text:
                path = root / CXR / f"{study_folder(p.subject_id, s.study_id)}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)


def _summary(cfg: SynthConfig, patients: list[Patient], made: bool) -> Summary:
    studies = [s for p in patients for s in p.studies]
    images = [i for s in studies for i in s.images]
    return Summary(
        out=str(cfg.output()),
        patients=len(patients),
        studies=len(studies),
        images=len(images),
        stays=sum(len(p.stays) for p in patients),
        admissions=sum(len(p.admissions) for p in patients),
        splits=dict(Counter(i.split or "none" for i in images)),
        findings=dict(Counter(f for s in studies for f, state in s.case.states.items() if state == 1)),
        made=made,
    )
