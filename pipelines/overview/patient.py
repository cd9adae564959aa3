"""One patient for the page: the chart, the note made of it, what the filter took out, and the passages that each sentence fetched."""

from collections.abc import Mapping
from typing import Any

import pyarrow.dataset as ds

from contracts.chart import Chart
from contracts.dataset import Dataset
from contracts.pages import Page
from contracts.storage import Place
from pipelines.inputs.notes import NoteWriter
from pipelines.inputs.reading import InputsConfig
from pipelines.knowledge.retrieve import Knowledge

LEAVES = ("kind", "name", "text", "id", "asked_by", "score")
REMOVED = ("rule", "count")
SHOWN = 6  # entries of a list in a chart
LOOKED_AT = 5_000  # rows among which the patient is chosen


def show(p: Page, cohort: Dataset, texts: Dataset, knowledge: Place, synthetic: bool) -> None:
    """synthetic: only then are the words shown that the filter took out."""
    chosen = _choose(texts)
    row = cohort.table(where=ds.field("row_id") == chosen["row_id"]).to_pylist()[0]
    reading = InputsConfig.model_validate(texts.manifest["reading"])
    chart = Chart.from_row(row, indication=reading.notes.indication)
    p.text("One patient", "What was known before the X-ray was taken, as it goes into a model.")
    p.table("The chart", ("what", "value"), _chart(chart))
    said = [(s["name"], s["text"]) for s in chosen["segments"] if s["kind"] == "note"]
    p.table("The note", ("segment", "text"), said, "The narrative that is embedded, a segment by itself; after the leakage filter.")
    removed = ", ".join(f"{r['rule']} ({r['count']})" for r in chosen["removed"]) or "nothing"
    whole = {text for _, text in said}
    before = [s.text for s in NoteWriter(reading.notes.unfiltered())([chart])[0].segments if s.kind == "note"] if synthetic else []
    before = [text for text in before if text not in whole]
    p.text("What the filter took out", f"Rules that fired: {removed}.", "Before the filter:\n" + "\n".join(before) if before else "")
    known = Knowledge(knowledge)
    found = [s for s in chosen["segments"] if s["kind"] == "passage"]
    rows = [(s["asked_by"], s["score"], known.topic(s["id"]), known.text(s["id"]), s["id"]) for s in found]
    p.table("What it fetched", ("asked by", "score", "topic", "passage", "id"), rows, "Passages are about findings, and are not filtered.")


def _choose(texts: Dataset) -> dict[str, Any]:
    """The row that shows most: something was taken out, and a segment fetched a passage that fits it well."""
    table = texts.leaves(["row_id", *(f"segments.list.element.{leaf}" for leaf in LEAVES), *(f"removed.list.element.{r}" for r in REMOVED)])

    def shows(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        return bool(row["removed"]), max((s["score"] for s in row["segments"] if s["kind"] == "passage"), default=0), row["row_id"]

    return max(table.slice(0, LOOKED_AT).to_pylist(), key=shows)


def _chart(chart: Chart) -> list[tuple[str, str]]:
    """(what, value) of all that is known; lists shortened to what fits a page."""
    rows = []
    for name, value in chart.model_dump(exclude_none=True).items():
        if isinstance(value, dict):
            rows.append((name, _line(value)))
        elif isinstance(value, list):
            rows += [(name, _line(v) if isinstance(v, dict) else str(v)) for v in value[:SHOWN]]
            rows += [(name, f"and {len(value) - SHOWN} more")] if len(value) > SHOWN else []
        else:
            rows.append((name, str(value)))
    return rows


def _line(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None)
