"""Studies to try the service on. They show reports and labels: serve them only where whoever has a key may see the data."""

import base64
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.dataset as ds

from contracts.chart import CHART_COLUMNS, Chart
from contracts.dataset import open_dataset
from contracts.findings import FINDINGS, label_column
from contracts.storage import Place
from serve.messages import Example, ExampleHead
from serve.pictures import Pictures
from serve.settings import Scale

if TYPE_CHECKING:
    from serve.app import Graph


class Settings(Scale):
    cohort: str = "cohort"
    images: str = "images"
    split: Literal["train", "validate", "test"] = "test"
    count: int = 12


def build(graph: "Graph", settings: Settings) -> Any:
    """Raises CxrayError where a data set is not there."""
    cohort, images = (open_dataset(graph.at(getattr(settings, name)), name).place for name in ("cohort", "images"))
    return graph.deploy("examples", Samples, settings, cohort, images)


class Samples:
    """All of them are held: they are few."""

    def __init__(self, settings: Settings, cohort: Place, images: Place) -> None:
        self._examples = _read(settings, cohort, images)

    async def list(self) -> "list[ExampleHead]":
        return [ExampleHead(id=one.id, title=one.title) for one in self._examples.values()]

    async def one(self, id: str) -> Example | None:
        return self._examples.get(id)

    async def about(self) -> dict[str, Any]:
        return {"name": "examples", "studies": len(self._examples)}

    async def check_health(self) -> None:
        """There is nothing here that could break by itself."""


def _read(settings: Settings, cohort: Place, images: Place) -> dict[str, Example]:
    """The studies, by a number: their own ids have no place in an address."""
    pictures = Pictures(open_dataset(images, "images"))
    labels = [label_column(f) for f in FINDINGS]
    columns = ["row_id", "study_id", "view", *labels, "report_findings", "report_impression", *CHART_COLUMNS]
    rows = open_dataset(cohort, "cohort").table(columns, where=ds.field("split") == settings.split).to_pylist()
    studies: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["row_id"]):
        if row["row_id"] in pictures:
            studies.setdefault(row["study_id"], []).append(row)
    chosen = _varied(studies, settings.count)
    stored = pictures.read(row["row_id"] for of in chosen for row in of)
    return {str(n): _example(str(n), of, stored) for n, of in enumerate(chosen, 1)}


def _varied(studies: dict[str, list[dict[str, Any]]], count: int) -> list[list[dict[str, Any]]]:
    """Studies that show between them as many findings as they can, again and again."""
    left, chosen = dict(sorted(studies.items())), []
    times = dict.fromkeys(FINDINGS, 0)
    while left and len(chosen) < count:
        best = max(left, key=lambda study: sum(0.5 ** times[f] for f in _stated(left[study][0])))
        for finding in _stated(left[best][0]):
            times[finding] += 1
        chosen.append(left.pop(best))
    return chosen


def _stated(row: dict[str, Any]) -> list[str]:
    return [f for f in FINDINGS if row[label_column(f)] == 1]


def _example(id: str, rows: list[dict[str, Any]], stored: dict[str, bytes]) -> Example:
    first = rows[0]
    views = ", ".join(row["view"] or "view unknown" for row in rows)
    known = Chart.from_row(first)
    # What was known before: a title that told the findings would tell them before the model does.
    patient = ", ".join(str(x) for x in (known.sex, known.age and round(known.age), known.chief_complaint) if x) or "no chart"
    sections = [f"{name.capitalize()}: {text}" for name in ("findings", "impression") if (text := first[f"report_{name}"])]
    return Example(
        id=id,
        title=f"{views}: {patient}",
        images=[base64.b64encode(stored[row["row_id"]]).decode() for row in rows],
        chart=known.model_dump(mode="json", exclude_defaults=True) or None,
        report="\n\n".join(sections) or None,
        labels={f: state for f in FINDINGS if (state := first[label_column(f)]) is not None},
    )
