"""`cxray overview CONFIG`: one page of what a folder of outputs holds: what was done and how fast, example images, searches, the data card.

.venv/bin/cxray run configs/demo/all.yaml        # its last step; the page is runs/demo/report.html
"""

from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as ds

from contracts.config import Config
from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from contracts.pages import Page
from contracts.runs import read_run, record
from contracts.storage import Place
from pipelines.cohort.card import page as card_page
from pipelines.job import VerbConfig
from pipelines.overview import PATIENTS, SYNTHETIC, explained, is_synthetic, judged, patient
from pipelines.search.ask import Answer, Index

EXAMPLES = 8


class Question(Config):
    """One search to show. like: instead of words, the image of this example (0 is the first)."""

    text: str | None = None
    like: int | None = None
    via: str | None = None
    where: str | None = None
    k: int = 5


class OverviewConfig(VerbConfig):
    root: str | None = None  # of the sources: says whether they are synthetic
    into: str = "overview"  # the page itself is OUT/report.html
    cohort: str = "cohort"
    images: str = "images"
    features: str = "features"
    texts: str | None = None
    index: str = "index"
    knowledge: str | None = None
    leaks: str | None = None
    evaluation: str | None = None
    explained: str | None = None
    searches: tuple[Question, ...] = ()

    def inputs(self) -> dict[str, Place]:
        read = ("cohort", "images", "features", "texts", "index", "knowledge", "leaks", "evaluation", "explained")
        return {name: self.at(where) for name in read if (where := getattr(self, name))}


@dataclass
class OverviewSummary:
    page: str

    def __str__(self) -> str:
        return f"overview: {self.page}"


def run(cfg: OverviewConfig) -> OverviewSummary:
    """Raises CxrayError where one of the outputs is not there."""
    cohort, images = open_dataset(cfg.at(cfg.cohort), "cohort"), open_dataset(cfg.at(cfg.images), "images")
    synthetic = is_synthetic(cfg.root, cfg.storage)
    p = Page("What stands here", SYNTHETIC if synthetic else PATIENTS)
    p.table(
        "What was done", ("verb", "rows", "rejects", "seconds", "rows a second", "KB a row"), [_work(n, w) for n, w in cfg.inputs().items()]
    )
    examples = _examples(cohort, images)
    p.pictures("Example images", [(row["image"], _caption(row)) for row in examples], "As every encoder sees them: 518 x 518, 8-bit grey.")
    index = Index(cfg.at(cfg.index))
    for question in cfg.searches:
        _search(p, index, question, examples, images)
    if cfg.texts and cfg.knowledge:
        patient.show(p, cohort, open_dataset(cfg.at(cfg.texts), "texts"), cfg.at(cfg.knowledge), synthetic)
    if cfg.leaks:
        judged.leak_meter(p, cfg.at(cfg.leaks))
    if cfg.evaluation:
        judged.network(p, cfg.at(cfg.evaluation))
    if cfg.explained:
        explained.show(p, cfg.at(cfg.explained))
    p.add(card_page(cohort.manifest["card"]), "The data card")
    where = cfg.at("report.html")
    where.write(p.html().encode())
    record(cfg.output(), "overview", cfg, cfg.inputs(), {"page": str(where)})
    return OverviewSummary(str(where))


def _work(name: str, where: Place) -> tuple[Any, ...]:
    """A line of the table of work, from an output's run.json."""
    said = (read_run(where) or {"summary": {}})["summary"]
    seconds, new, rows = said.get("seconds"), said.get("new"), said.get("rows")
    rejects = sum(said["rejects"].values()) if "rejects" in said else None
    rate = new / seconds if seconds and new else None
    size = said["bytes_on_disk"] / rows / 1000 if rows and "bytes_on_disk" in said else None
    return name, rows, rejects, seconds, rate, size


def _examples(cohort: Dataset, images: Dataset) -> list[dict[str, Any]]:
    """Images that between them show as many findings as they can, with their labels."""
    labels = cohort.table(["row_id", "split", "view", *map(label_column, FINDINGS)]).to_pylist()
    whole = set(images.table(["row_id"])["row_id"].to_pylist())
    labels = sorted((row for row in labels if row["row_id"] in whole), key=lambda row: row["row_id"])
    chosen: list[dict[str, Any]] = []
    shown: set[str] = set()
    while labels and len(chosen) < EXAMPLES:
        best = max(labels, key=lambda row: len(_positive(row) - shown))
        labels.remove(best)
        chosen.append(best)
        shown |= _positive(best)
    return [row | {"image": data} for row, data in zip(chosen, _bytes(images, [row["row_id"] for row in chosen]), strict=True)]


def _positive(row: dict[str, Any]) -> set[str]:
    return {f for f in FINDINGS if row[label_column(f)] == 1}


def _caption(row: dict[str, Any]) -> str:
    return f"{row['split']}, {row['view'] or 'view unknown'}: {', '.join(sorted(_positive(row))) or 'nothing stated'}"


def _bytes(images: Dataset, ids: list[str]) -> list[bytes]:
    table = images.table(["row_id", "image"], where=ds.field("row_id").isin(ids))
    of = dict(zip(table["row_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    return [of[i] for i in ids]


def _search(p: Page, index: Index, question: Question, examples: list[dict[str, Any]], images: Dataset) -> None:
    if question.like is not None and question.like >= len(examples):
        raise CxrayError(f"searches: there are {len(examples)} examples, so `like` goes from 0 to {len(examples) - 1}")
    like = examples[question.like] if question.like is not None else None
    answers = index.search(question.text, like["image"] if like else None, question.via, question.where, question.k)
    asked = " and ".join(([f"“{question.text}”"] if question.text else []) + ([f"example image {question.like}"] if like else []))
    pictures = zip(_bytes(images, [a.row_id for a in answers]), map(_answer, answers), strict=True)
    p.pictures(f"Search: {asked}" + (f", where {question.where}" if question.where else ""), list(pictures))


def _answer(answer: Answer) -> str:
    stated = ", ".join(f for f, state in answer.labels.items() if state == 1) or "nothing stated"
    return f"{answer.score:.3f}, {answer.split}, {answer.view}: {stated}. {answer.impression or 'No report.'}"
