"""What is said of predictions: every metric with its interval over patients, by finding and over all, and for parts of the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evaluation.calibration import SPECIFICITIES, apply, thresholds
from evaluation.intervals import PROBABLE, bootstrap, interval, macro
from evaluation.metrics import known

MEASURES = ("auroc", "auprc", "f1", "sensitivity", "specificity", "ppv", "brier", "ece")
AT_SPECIFICITY = {f"{s:.2f}": s for s in SPECIFICITIES}
IN_PARTS = ("auroc", "auprc", "sensitivity", "specificity")

Drawn = Mapping[str, tuple[np.ndarray, np.ndarray]]


def judged(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    targets: Sequence[str],
    calibration: Mapping[str, Any],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Probabilities as the model gave them [n, F], labels [n, F] and patients [n], under a calibration that was fitted elsewhere.

    -> {'studies', 'patients', 'findings': {name: {'n_pos', 'n_neg', 'n_unknown', 'tp', 'fp', 'fn', 'tn', and of MEASURES an Interval as a
    dict}}, 'macro': {measure: Interval and 'over', how many findings it is the mean of}, 'micro': {measure: Interval}}. Brier and ECE stand
    there twice: `brier_before` is that of the probabilities before calibration. `sensitivity_at_0.90` and `specificity_at_0.90` are those
    at the threshold that had this specificity where it was fitted. Intervals are of patients, 95 %. What is undefined is NaN.
    """
    calibrated, at = apply(scores, targets, dict(calibration)), thresholds(targets, dict(calibration))
    fixed = {s: np.array([calibration[t]["at_specificity"].get(s, np.nan) for t in targets]) for s in AT_SPECIFICITY}
    drawn = _drawn(scores, calibrated, labels, groups, at, fixed, resamples, seed)
    # Pooled, each pair of study and finding is a row of its own; the patients that are drawn stay the same.
    n, f = labels.shape
    flat = [values.reshape(-1, 1) for values in (scores, calibrated, labels)]
    each = {s: np.tile(t, n)[:, None] for s, t in fixed.items()}
    pooled = _drawn(flat[0], flat[1], flat[2], np.repeat(groups, f), np.tile(at, n)[:, None], each, resamples, seed)
    told, called = known(labels), calibrated >= at
    return {
        "studies": n,
        "patients": len(np.unique(groups)),
        "findings": {
            name: _counts(called[told[:, i], i], labels[told[:, i], i])
            | {"n_unknown": int((~told[:, i]).sum())}
            | {m: asdict(interval(value[i], many[i])) for m, (value, many) in drawn.items()}
            for i, name in enumerate(targets)
        },
        "macro": {m: _macro(value, many) for m, (value, many) in drawn.items()},
        "micro": {m: asdict(interval(value[0], many[0])) for m, (value, many) in pooled.items()},
    }


def parts(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    rare: Sequence[str],
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    targets: Sequence[str],
    calibration: Mapping[str, Any],
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The same for parts: rows {kind: {part: bool [n]}}, and the rare findings beside the others.

    -> {kind: {part: {'studies', 'patients', 'n_pos', 'macro': {measure of IN_PARTS: Interval and 'over'}, 'findings': {name: {'n_pos',
    'n_neg', measure: Interval}}}}}. Parts without studies are left out.
    """
    calibrated, at = apply(scores, targets, dict(calibration)), thresholds(targets, dict(calibration))

    def part(inside: np.ndarray, keep: list[int]) -> dict[str, Any]:
        y, of = labels[inside][:, keep], groups[inside]
        drawn = bootstrap(calibrated[inside][:, keep], y, of, IN_PARTS, at[keep], resamples, seed)
        by_finding = {
            targets[i]: {"n_pos": int((y[:, k] == 1).sum()), "n_neg": int((y[:, k] == 0).sum())}
            | {m: asdict(interval(value[k], many[k])) for m, (value, many) in drawn.items()}
            for k, i in enumerate(keep)
        }
        return {
            "studies": len(of),
            "patients": len(np.unique(of)),
            "n_pos": int((y == 1).sum()),
            "macro": {m: _macro(value, many) for m, (value, many) in drawn.items()},
            "findings": by_finding,
        }

    every = list(range(len(targets)))
    found = {kind: {name: part(inside, every) for name, inside in own.items() if inside.any()} for kind, own in rows.items()}
    by_rarity = {"rare findings": [i for i in every if targets[i] in rare], "other findings": [i for i in every if targets[i] not in rare]}
    return found | {"rarity": {name: part(np.ones(len(labels), bool), keep) for name, keep in by_rarity.items() if keep}}


def _drawn(
    scores: np.ndarray,
    calibrated: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    at: np.ndarray,
    fixed: Mapping[str, np.ndarray],
    resamples: int,
    seed: int,
) -> Drawn:
    """at: the thresholds; fixed: others, {their name: one a finding, or a cell; NaN where none could be fitted}."""
    drawn = bootstrap(calibrated, labels, groups, MEASURES, at, resamples, seed)
    before = bootstrap(scores, labels, groups, PROBABLE, resamples=resamples, seed=seed)
    drawn |= {f"{m}_before": values for m, values in before.items()}
    for name, there in fixed.items():
        told = np.where(np.isnan(there), np.nan, labels)  # without a threshold nothing is called, and nothing is known
        found = bootstrap(calibrated, told, groups, ("sensitivity", "specificity"), there, resamples, seed)
        drawn |= {f"{m}_at_{name}": values for m, values in found.items()}
    return drawn


def _macro(value: np.ndarray, many: np.ndarray) -> dict[str, Any]:
    return asdict(interval(float(macro(value)), macro(many))) | {"over": int((~np.isnan(value)).sum())}


def _counts(called: np.ndarray, labels: np.ndarray) -> dict[str, int]:
    positive = labels == 1
    return {
        "n_pos": int(positive.sum()),
        "n_neg": int((~positive).sum()),
        "tp": int((called & positive).sum()),
        "fp": int((called & ~positive).sum()),
        "fn": int((~called & positive).sum()),
        "tn": int((~called & ~positive).sum()),
    }
