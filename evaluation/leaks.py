"""`cxray leaks CONFIG`: how much of the answer the notes hold, before and after the leakage filter.

The output is a run folder: metrics.json holds all numbers, report.html shows them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contracts.chart import CHART_COLUMNS, Chart
from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from contracts.pages import Page
from contracts.runs import record
from contracts.schema import SPLITS
from contracts.storage import Place
from evaluation.intervals import Interval
from evaluation.metrics import plain
from evaluation.plots import dots
from evaluation.probes import VIEWS, in_words, measure
from pipelines.inputs.clinical import clinical
from pipelines.inputs.leakage import scanned
from pipelines.inputs.notes import NoteConfig, NoteWriter
from pipelines.job import VerbConfig

POLICY = (
    "A finding is positive where its label is 1, negative where it is 0 or blank in a study that has a label row, and left out where it is "
    "uncertain (-1) or the study has no label row. One row a study: the first by its id."
)
LABELS = [label_column(f) for f in FINDINGS]
GIVEN_AWAY = 0.9  # AUROC of a bag of words; vital signs and complaints alone do not come near it
ROWS = 5_000  # charts held as Python objects at once


class LeaksConfig(VerbConfig):
    texts: str = "texts/minilm"
    cohort: str = "cohort"
    into: str = "leaks"
    resamples: int = 500
    seed: int = 0

    def inputs(self) -> dict[str, Place]:
        return {"cohort": self.at(self.cohort), "texts": self.at(self.texts)}


@dataclass
class LeaksSummary:
    where: str
    found: dict[str, Any]

    def __str__(self) -> str:
        studies, left = self.found["studies"], sum(self.found["terms_left"].values())
        scanned = f"{left:,} segments still hold a term" if left else "none holds a term that it knows"
        return "\n".join(
            [
                f"leaks: {studies['train']:,} studies to read, {studies['validate']:,} to ask -> {self.where}",
                f"  {in_words(self.found)}",
                f"  of {self.found['segments']:,} segments that passed the filter ({self.found['notes']['leakage']['mode']}), {scanned}",
                f"  the whole of it: {self.where}/report.html",
            ]
        )


def run(cfg: LeaksConfig) -> LeaksSummary:
    """Raises CxrayError where an input is not there, where they are not of the same rows, or train or validate has no studies."""
    cohort, texts = open_dataset(cfg.at(cfg.cohort), "cohort"), open_dataset(cfg.at(cfg.texts), "texts")
    settings = NoteConfig.model_validate(texts.manifest["reading"]["notes"])
    segments = note_segments(texts)
    rows = studies(cohort, segments.keys())
    before, structured = unfiltered(cohort, rows, settings)
    found = measure(
        before,
        [" ".join(segments[i]) for i in rows["row_id"].to_pylist()],
        structured,
        targets(rows),
        rows["group_id"].to_numpy(),
        rows["split"].to_numpy(),
        resamples=cfg.resamples,
        seed=cfg.seed,
    )
    found |= {
        "policy": POLICY,
        "notes": settings.model_dump(mode="json"),
        "segments": sum(len(own) for own in segments.values()),
        "terms_left": terms_left(segments.values(), settings),
        "filtered": filtered(texts),
        "lengths": lengths(texts),
    }
    out = cfg.output()
    (out / "metrics.json").write(json.dumps(plain(found), indent=1, allow_nan=False).encode())
    (out / "report.html").write(page(found).html().encode())
    told = {"exceeding": found["exceeding"], "terms_left": sum(found["terms_left"].values()), "studies": found["studies"]}
    record(out, "leaks", cfg, cfg.inputs(), plain(told | {"macro": {view: found["macro"][view] for view in VIEWS}}))
    return LeaksSummary(str(out), found)


def note_segments(texts: Dataset) -> dict[str, list[str]]:
    """{row_id: the texts of its filtered segments, in their order}."""
    table = texts.leaves(["row_id", "segments.list.element.kind", "segments.list.element.text"])
    return {
        row["row_id"]: [s["text"] for s in row["segments"] if s["kind"] == "note"]
        for batch in table.to_batches(max_chunksize=ROWS)
        for row in batch.to_pylist()
    }


def studies(cohort: Dataset, there: Set[str]) -> pa.Table:
    """Keys and labels of the rows that are probed: of each study of train and validate the first row, in the order of row ids.

    there: the row ids that have a text. Raises CxrayError where one of them is not in the cohort.
    """
    table = cohort.table(["row_id", "group_id", "study_id", "split", "label_row", *LABELS])
    if strangers := there - set(table["row_id"].to_pylist()):
        raise CxrayError(
            f"{cohort.place}: {len(strangers):,} rows of the texts are not in this cohort; name the cohort they were made from"
        )
    table = table.filter(pc.is_in(table["row_id"], value_set=pa.array(list(there), pa.string())))
    table = table.filter(pc.is_in(table["split"], value_set=pa.array(["train", "validate"]))).sort_by("row_id")
    first: dict[str, int] = {}
    for i, study in enumerate(table["study_id"].to_pylist()):
        first.setdefault(study, i)
    return table.take(pa.array(list(first.values()), pa.int64()))


def targets(rows: pa.Table) -> np.ndarray:
    """Labels by POLICY, float64 [n, 14]: 1, 0, NaN."""
    values = np.stack([rows[c].cast(pa.float64()).to_numpy() for c in LABELS], axis=1)
    values = np.where(np.isnan(values), 0, np.where(values == -1, np.nan, values))
    return np.where(rows["label_row"].to_numpy()[:, None], values, np.nan)


def unfiltered(cohort: Dataset, rows: pa.Table, settings: NoteConfig) -> tuple[list[str], np.ndarray]:
    """(notes as they would stand without the filter, all else as set; structured features [n, D], NaN where missing) of these rows."""
    write = NoteWriter(settings.unfiltered())
    notes: list[str] = []
    features = []
    for charts in _charts(cohort, rows, settings.indication):
        notes += [" ".join(s.text for s in note.segments if s.kind == "note") for note in write(charts)]
        features.append(clinical(charts)[0])
    return notes, np.concatenate(features) if features else np.zeros((0, 1))


def _charts(cohort: Dataset, rows: pa.Table, indication: bool) -> Iterator[list[Chart]]:
    """The charts of these rows, in their order, some thousand at a time."""
    table = cohort.table(["row_id", *CHART_COLUMNS, *(["report_indication"] if indication else [])])
    places = pc.index_in(rows["row_id"], value_set=table["row_id"].combine_chunks())
    for start in range(0, len(places), ROWS):
        yield [Chart.from_row(row, indication=indication) for row in table.take(places.slice(start, ROWS)).to_pylist()]


def terms_left(segments: Iterable[Sequence[str]], settings: NoteConfig) -> dict[str, int]:
    """In how many filtered segments the scan still finds a term, by finding; all should be 0 unless the filter was off."""
    found = scanned((text for own in segments for text in own), settings.leakage.peripheral_edema)
    return {finding: found[finding] for finding in FINDINGS}


def filtered(texts: Dataset) -> dict[str, Any]:
    """What the filter took out of all notes: {'rows', 'touched', 'rules': {rule: times}}."""
    removed = texts.table(["removed"])["removed"].to_pylist()
    rules: Counter[str] = Counter()
    for own in removed:
        rules.update({r["rule"]: r["count"] for r in own or []})
    return {"rows": len(removed), "touched": sum(bool(own) for own in removed), "rules": dict(rules.most_common())}


def lengths(texts: Dataset) -> dict[str, dict[str, float]]:
    """Tokens of the notes by split, and how many notes were cut."""
    table = texts.table(["split", "note_tokens", "note_cut"])
    split, tokens, cut = (table[c].to_numpy() for c in table.column_names)
    return {
        s: {
            "notes": int((split == s).sum()),
            **{name: float(np.quantile(tokens[split == s], q)) for name, q in (("median", 0.5), ("p95", 0.95), ("longest", 1))},
            "cut": int((cut[split == s] > 0).sum()),
        }
        for s in SPLITS
        if (split == s).any()
    }


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What the content of metrics.json gives cause to doubt: whoever reads a model's AUROC should know that its notes told the answer.

    A finding counts where the filtered notes are above the structured features on nearly all resamples, and nearly give it away.
    """
    told = []
    given = [
        name
        for name, one in found["findings"].items()
        if one["why_not"] is None and (one["after_less_structured"]["low"] or 0) > 0 and (one["after"]["value"] or 0) >= GIVEN_AWAY
    ]
    if given:
        told.append(
            f"The notes may give the answer away for {', '.join(given)}: a bag of words reads it off the filtered notes with an AUROC of "
            f"{GIVEN_AWAY} or more, and the structured features do not. Look at what gives it before believing what a model reaches there."
        )
    if left := [name for name, n in found["terms_left"].items() if n]:
        told.append(f"Filtered notes still hold terms that state {', '.join(left)}: make the texts again.")
    if found["notes"]["leakage"]["mode"] == "off":
        told.append("The notes were made with the leakage filter off: complaints and histories may state any finding.")
    return told


def page(found: Mapping[str, Any]) -> Page:
    p = Page("What the notes give away", in_words(dict(found)))
    said = {"before": "notes, unfiltered", "after": "notes, filtered", "structured": "structured features alone"}
    measured = {f: one for f, one in found["findings"].items() if one["why_not"] is None}
    every = measured | ({"mean of them": found["macro"]} if measured else {})
    p.text("How this was measured", f"{_HOW} {POLICY}")
    p.table(
        "AUROC on validate, by finding",
        ("finding", "train +", "validate +", "validate -", *said.values(), "filtered less structured", ""),
        [_row(f, one) for f, one in found["findings"].items()] + ([_row("mean of the measured", found["macro"])] if measured else []),
        "With 95 % intervals over patients. 'Above': the filtered notes lie above the interval of the structured features.",
    )
    if measured:
        drawn = {f: {words: Interval(**one[view]) for view, words in said.items()} for f, one in every.items()}
        p.picture(dots(drawn, "AUROC", 0.5), "Filtered notes should lie near the structured features, well under the unfiltered ones.")
    left = {f: n for f, n in found["terms_left"].items() if n}
    p.table(
        "Terms that are still there",
        ("finding", "segments"),
        list(left.items()) or [("none", 0)],
        f"Each of {found['segments']:,} filtered segments of all splits was looked through for every term of the filter's table. "
        f"The filter was set to '{found['notes']['leakage']['mode']}'.",
    )
    f = found["filtered"]
    p.table("What the filter took", ("rule", "times"), list(f["rules"].items()), f"In {f['touched']:,} of {f['rows']:,} notes.")
    p.table(
        "How long the notes are",
        ("split", "notes", "median tokens", "95th percentile", "longest", "cut"),
        [(s, *one.values()) for s, one in found["lengths"].items()],
        "Filtered notes as they are stored. The unfiltered ones are read whole, even where a stored note was cut.",
    )
    return p


_HOW = (
    "Three simple readers learn the labels on train and are asked on validate: a bag of words on the notes as they would stand without the "
    "filter, the same on the filtered notes, and a logistic regression on the structured features, which hold no words. What the first "
    "reads and the second does not is what the filter took. What the second reads above the third stands in words that passed it."
)


def _row(name: str, one: Mapping[str, Any]) -> Sequence[Any]:
    counts = [one[s][n] if s in one else "" for s, n in (("train", "n_pos"), ("validate", "n_pos"), ("validate", "n_neg"))]
    if one.get("why_not"):
        return (name, *counts, *[""] * (len(VIEWS) + 1), f"not measured: {one['why_not']}")
    less = Interval(**one["after_less_structured"])
    shown = f"{less.value:+.3f} ({less.low:+.3f} to {less.high:+.3f})"
    return (name, *counts, *(str(Interval(**one[view])) for view in VIEWS), shown, "above" if one["exceeds"] else "")
