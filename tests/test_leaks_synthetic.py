"""The leak meter on the synthetic cohort's own charts: answers are written into the complaints, as people write them, and filtered out."""

import numpy as np
import pytest
from trees import cohort

from contracts.chart import Chart
from contracts.config import load
from contracts.findings import FINDINGS, label_column
from evaluation.probes import measure
from pipelines.inputs.clinical import clinical
from pipelines.inputs.leakage import LeakageConfig
from pipelines.inputs.notes import NoteConfig, NoteWriter
from pipelines.synthetic.job import SynthConfig, plan
from pipelines.synthetic.records import TABLES
from pipelines.synthetic.tables import write_table

WRITTEN = {
    "Pneumonia": ("PNA", "?pneumonia", "pnuemonia on CXR"), "Edema": ("pulm edema", "fluid on lungs", "pulmonary oedema"),
    "Pleural Effusion": ("pl effusion", "plueral effusion", "effusion on xray"), "Fracture": ("rib fx", "fractured ribs", "clavicle fx"),
    "Cardiomegaly": ("enlarged heart", "cardiomegally", "big heart on film"), "Pneumothorax": ("PTX", "pneumothorx", "collapsed lung"),
}  # fmt: skip
CHOSEN = list(WRITTEN)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A synthetic cohort, made of its tables alone: no picture is drawn."""
    out = tmp_path_factory.mktemp("synthetic")
    patients = plan(load(SynthConfig, {"out": str(out), "patients": 700}))
    for name, of in TABLES.items():
        write_table(out / "mimic", name, of(patients))
    (out / "mimic/mimic-cxr-jpg/2.1.0/files").mkdir()
    return cohort(out / "mimic", out)[0]


def test_the_meter_is_near_one_on_answers_and_falls_to_the_structured_interval_after(rows):
    rng = np.random.default_rng(0)
    labels = np.array([[row[label_column(f)] == 1 for f in CHOSEN] for row in rows], float)
    charts = []
    for row, own in zip(rows, labels, strict=True):
        said = [str(rng.choice(WRITTEN[f])) for f, there in zip(CHOSEN, own, strict=True) if there]
        # Medicines and complaints know things honestly: here they are left out, so that only what was planted tells.
        charts.append(Chart.from_row(row | {"chart_chief_complaint": ", ".join(["Dyspnea", *said]), "chart_medicines": []}))

    def notes(mode):
        written = NoteWriter(NoteConfig(leakage=LeakageConfig(mode=mode)))(charts)
        return [" ".join(s.text for s in note.segments if s.kind == "note") for note in written]

    groups, split = (np.array([row[key] for row in rows]) for key in ("group_id", "split"))
    structured = clinical(charts)[0]
    found = measure(notes("off"), notes("standard"), structured, labels, groups, split, CHOSEN, resamples=200)
    assert set(CHOSEN) < set(FINDINGS)
    before, after, alone = (found["macro"][view] for view in ("before", "after", "structured"))
    assert before["value"] > 0.95
    assert alone["low"] <= after["value"] <= alone["high"], (after, alone)
