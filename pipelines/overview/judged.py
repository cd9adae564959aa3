"""What `cxray leaks` and `cxray evaluate` found, for a page. Their own pages have the rest."""

import json
from typing import Any

from contracts.pages import Page
from contracts.storage import Place

MEASURES = {"auroc": "AUROC", "auprc": "AUPRC", "sensitivity": "sensitivity", "specificity": "specificity"}
ERRORS = {"ece_before": "ECE before", "ece": "ECE after", "brier_before": "Brier before", "brier": "Brier after"}
MEAN = "mean over findings"


def leak_meter(p: Page, where: Place) -> None:
    """where: an output of `cxray leaks`."""
    found = json.loads((where / "metrics.json").read())

    def line(name: str, of: dict[str, Any]) -> tuple[str, ...]:
        return name, *(_span(of[view]) for view in ("before", "after", "structured"))

    rows = [line(MEAN, found["macro"]), *(line(name, of) for name, of in found["findings"].items())]
    p.table(
        "The leak meter",
        ("finding", "notes before the filter", "notes after it", "structured features alone"),
        rows,
        "AUROC on validate of a bag of words that reads the notes, with 95 % intervals over patients.",
    )


def network(p: Page, where: Place) -> None:
    """How good the network is, and how far its probabilities can be believed. where: an output of `cxray evaluate`."""
    found = json.loads((where / "metrics.json").read())
    test, fitted = found["test"], found["calibration"]
    every = {MEAN: test["macro"]} | test["findings"]
    warned = " ".join(found["warnings"])
    p.table(
        "The fusion network, judged",
        ("finding", "positive studies", *MEASURES.values()),
        [(name, of.get("n_pos"), *(_span(of[measure]) for measure in MEASURES)) for name, of in every.items()],
        f"On {test['studies']:,} test studies of {test['patients']:,} patients, with 95 % intervals over patients. {warned}",
    )
    temperatures = {name: one["temperature"] if one["fitted"] else "not fitted" for name, one in fitted.items()}
    p.table(
        "Its calibration",
        ("finding", "temperature", *ERRORS.values()),
        [(name, temperatures.get(name), *(_span(of[error]) for error in ERRORS)) for name, of in every.items()],
        "Temperatures are fitted on validate, errors measured on test, before and after; smaller is better, and 95 % intervals are over "
        "patients. 'Not fitted': validate has one class. Reliability diagrams are on the page of `cxray evaluate`.",
    )


def _span(interval: dict[str, float | None]) -> str:
    return "not measured" if interval["value"] is None else "{value:.2f} ({low:.2f} to {high:.2f})".format(**interval)
