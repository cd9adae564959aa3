"""The page of `cxray evaluate`: what was judged, how good it is and for whom, in words, tables and pictures."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from contracts.pages import Page
from evaluation.calibration import apply, thresholds
from evaluation.charts import confusions, precision_recall, reliabilities, roc
from evaluation.intervals import Interval
from evaluation.judged import AT_SPECIFICITY, IN_PARTS
from evaluation.plots import dots
from evaluation.predictions import Predictions

RANKING = {"auroc": "AUROC", "auprc": "AUPRC"}
CALLS = {"f1": "F1", "sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV"}
FIXED = {f"{m}_at_{s}": f"{m} at {s}" for s in AT_SPECIFICITY for m in ("sensitivity", "specificity")}
SURE = {"ece_before": "ECE before", "ece": "ECE after", "brier_before": "Brier before", "brier": "Brier after"}


def page(found: Mapping[str, Any], test: Predictions, calibration: Mapping[str, Any]) -> Page:
    """found: the content of metrics.json, with NaN where nothing is defined; test: what was judged."""
    judged, protocol = found["test"], found["protocol"]
    p = Page(f"How good {found['model']} is", in_words(found))
    if found["warnings"]:
        p.table("Warnings: read these first", ("warning",), [(warning,) for warning in found["warnings"]])
    p.table("What was judged, and how", ("", ""), _protocol_rows(protocol))
    if not protocol["leak_meter"]:
        p.text("", "No leak meter was named, so whether notes give the answer away was not looked into.")
    p.table("Ranking, on test", ("finding", "+", "-", "unknown", *RANKING.values()), _rows(judged, RANKING), _UNDEFINED)
    if defined := _defined(judged):
        p.picture(dots(defined, "AUROC on test", 0.5), "AUROC by finding with 95 % intervals over patients; the dashed line is a coin.")
    p.table("Calls at the fitted thresholds, on test", ("finding", "+", "-", "unknown", *CALLS.values()), _rows(judged, CALLS), _UNDEFINED)
    p.table(
        "Calls at a fixed specificity, on test",
        ("finding", "+", "-", "unknown", *FIXED.values()),
        _rows(judged, FIXED),
        "At the thresholds that have these specificities on validate. How near test comes to them stands beside each sensitivity: where it "
        "has less, the sensitivity is so much the easier.",
    )
    p.table(
        "Calibration: fitted on validate, measured on test",
        ("finding", "temperature", "threshold", "", *SURE.values()),
        [
            (
                name,
                one["temperature"],
                one["threshold"],
                "" if one["fitted"] else "not fitted: one class in validate",
                *_cells(judged["findings"][name], SURE),
            )
            for name, one in found["calibration"].items()
        ]
        + [(name, "", "", "", *_cells(judged[name], SURE)) for name in ("macro", "micro")],
        "ECE and Brier: smaller is better. A temperature above 1 takes confidence away, one below 1 adds it; no ranking changes.",
    )
    _pictures(p, test, calibration)
    counts = ("tp", "fp", "fn", "tn")
    p.table(
        "Confusion counts, on test",
        ("finding", "true positive", "false positive", "false negative", "true negative"),
        [(name, *(one[c] for c in counts)) for name, one in judged["findings"].items()],
    )
    _subgroups(p, found["subgroups"])
    if found["radiologists"]:
        _radiologists(p, found["radiologists"])
    return p


def on_card(card: str, found: Mapping[str, Any]) -> str:
    """A model card (Markdown) with this judgement at its end, in place of an earlier one."""
    measures = {"auroc": "AUROC", "auprc": "AUPRC", "sensitivity": "sensitivity", "specificity": "specificity", "ece": "ECE"}
    rows = [*found["test"]["findings"].items(), *((name, found["test"][name]) for name in ("macro", "micro"))]
    lines = [
        card.partition(_ON_CARD)[0].rstrip(),
        _ON_CARD,
        in_words(found).removeprefix(_WARNED.format(len(found["warnings"]))),
        *(f"**Warning.** {warning}" for warning in found["warnings"]),
        "\n".join(
            [f"| finding | {' | '.join(measures.values())} |", "|---" * (len(measures) + 1) + "|"]
            + [f"| {name} | {' | '.join(_cells(one, measures))} |" for name, one in rows]
        ),
        "\n".join(f"- {name}: {found['protocol'][name]}" for name in ("policy", "threshold", "calibration", "intervals")),
    ]
    return "\n\n".join(lines) + "\n"


_ON_CARD = "## On the test split, as `cxray evaluate` judged it"
_WARNED = "There are warnings ({}), below. "


def in_words(found: Mapping[str, Any]) -> str:
    """The few numbers that matter, in sentences."""
    judged, fitted_on = found["test"], found["protocol"]["splits"]["validate"]
    over = judged["macro"]["auroc"]["over"]
    said = (
        f"{judged['studies']:,} studies of {judged['patients']:,} patients of the test split were judged against the labels of their "
        f"reports; temperatures and thresholds were fitted on {fitted_on['studies']:,} studies of validate. "
    )
    if found["warnings"]:
        said = _WARNED.format(len(found["warnings"])) + said
    if not over:
        return said + "No finding has both classes in test, so no ranking can be measured."
    auroc, auprc, ece, before = (judged["macro"][m] for m in ("auroc", "auprc", "ece", "ece_before"))
    return said + (
        f"Averaged over the {over} of {len(judged['findings'])} findings that have both classes, AUROC is {Interval.of(auroc)} and AUPRC "
        f"{Interval.of(auprc)}. The calibration error (ECE) is {before['value']:.3f} before calibration and {ece['value']:.3f} after."
    )


_UNDEFINED = (
    "In brackets 95 % intervals over patients. 'Not defined': the labels leave no such number, as of one class. Macro is the mean over the "
    "findings where it is defined, micro pools all pairs of study and finding. Intervals of findings with few positives are wide, and too "
    "narrow where resamples without any of them had to be left out."
)


def _pictures(p: Page, test: Predictions, calibration: Mapping[str, Any]) -> None:
    after = apply(test.scores, test.targets, dict(calibration))
    called = after >= thresholds(test.targets, dict(calibration))
    p.picture(roc(after, test.labels, test.targets, called), "ROC curves on test; the dot is the fitted threshold.")
    p.picture(precision_recall(after, test.labels, test.targets, called), "Precision and recall on test; dashed: the share of positives.")
    p.picture(reliabilities(test.scores, after, test.labels, test.targets), "Reliability on test: grey before calibration, red after.")
    p.picture(confusions(after, test.labels, test.targets, called), "Confusion on test at the fitted thresholds, shaded by row.")


def _subgroups(p: Page, subgroups: Mapping[str, Any]) -> None:
    p.table(
        "Subgroups of test",
        ("by", "", "studies", "patients", "positives", "findings", *(f"macro {(RANKING | CALLS)[m]}" for m in IN_PARTS)),
        [
            (kind, name, one["studies"], one["patients"], one["n_pos"], one["macro"]["auroc"]["over"], *_cells(one["macro"], IN_PARTS))
            for kind, own in subgroups.items()
            for name, one in own.items()
        ],
        "Each mean is over the findings that have both classes in that subgroup ('findings'), so subgroups of different findings are not "
        "alike; compare them by finding, below. 'No Finding' is not counted as a finding of a study.",
    )
    for kind, own in subgroups.items():
        if kind == "rarity":
            continue
        findings = next(iter(own.values()))["findings"]
        p.table(
            f"AUROC by {kind}",
            ("finding", *(f"{name} (n = {one['studies']:,})" for name, one in own.items())),
            [(f, *(_with_n(one["findings"][f]) for one in own.values())) for f in findings],
            "Behind each the positives and negatives of the subgroup.",
        )


def _radiologists(p: Page, by: Mapping[str, Any]) -> None:
    p.table(
        "Against radiologists",
        ("finding", "+", "-", "AUROC", "AUROC by report labels", "sensitivity", "specificity"),
        [
            (f, one["n_pos"], one["n_neg"], *_cells(one, ["auroc"]), str(Interval.of(by["auroc_by_reports"]["findings"][f])),
             *_cells(one, ["sensitivity", "specificity"]))
            for f, one in by["findings"].items()
        ]
        + [("macro", "", "", *_cells(by["macro"], ["auroc"]), str(Interval.of(by["auroc_by_reports"]["macro"])),
            *_cells(by["macro"], ["sensitivity", "specificity"]))],
        f"The {by['studies']:,} studies of test that radiologists labelled by hand. {by['policy']} Beside it the same studies by the "
        "labels of their reports. Thresholds and temperatures are those fitted on validate.",
    )  # fmt: skip


def _protocol_rows(protocol: Mapping[str, Any]) -> list[tuple[str, str]]:
    splits = [
        (f"split {name}", f"{s['studies']:,} studies of {s['patients']:,} patients; {s['unlabelled']:,} more have no known label")
        for name, s in protocol["splits"].items()
    ]
    said = [(k.replace("_", " "), str(v)) for k, v in protocol.items() if k != "splits" and v is not None]
    return [*splits, *said]


def _rows(judged: Mapping[str, Any], measures: Mapping[str, str]) -> list[tuple[Any, ...]]:
    by_finding = [(n, one["n_pos"], one["n_neg"], one["n_unknown"], *_cells(one, measures)) for n, one in judged["findings"].items()]
    return by_finding + [(name, "", "", "", *_cells(judged[name], measures)) for name in ("macro", "micro")]


def _defined(judged: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    every = judged["findings"] | {name: judged[name] for name in ("macro", "micro")}
    return {name: {"AUROC": own} for name, one in every.items() if np.isfinite((own := Interval.of(one["auroc"])).value)}


def _cells(one: Mapping[str, Any], measures: Any) -> list[str]:
    return [str(Interval.of(one[m])) for m in measures]


def _with_n(one: Mapping[str, Any]) -> str:
    value = one["auroc"]["value"]
    return f"{f'{value:.3f}' if np.isfinite(value) else 'not defined'} ({one['n_pos']:,} / {one['n_neg']:,})"
