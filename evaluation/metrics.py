"""How good predictions are, by finding and over all of them.

Labels are 1, 0, and -1 or NaN for 'not known', which is left out. What a finding's labels leave undefined (AUROC of one class) is NaN,
never 0, and stands beside n_pos and n_neg; a macro average is over the defined ones and says over how many. A study counts as
predicted positive where its score is at or above the threshold.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from contracts.errors import CxrayError

BINS = 15  # of ECE (Guo et al. 2017, arXiv:1706.04599)


def known(labels: np.ndarray) -> np.ndarray:
    """True where a label is 1 or 0, False where it is -1 or NaN. Raises CxrayError for any other."""
    labels = np.asarray(labels, np.float64)
    told = (labels == 1) | (labels == 0)
    if not (told | (labels == -1) | np.isnan(labels)).all():
        raise CxrayError("labels must be 1, 0, or -1 or NaN for unknown ones")
    return told


def checked(scores: np.ndarray, labels: np.ndarray, probabilities: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(float64 scores, float64 labels). Raises CxrayError where shapes differ, or a score is not finite or no probability."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    if scores.shape != labels.shape:
        raise CxrayError(f"scores have shape {scores.shape} and labels {labels.shape}: they must be of the same studies and findings")
    if not np.isfinite(scores).all():
        raise CxrayError(f"{(~np.isfinite(scores)).sum():,} scores are not finite: the model diverged, or was given what is not finite")
    if probabilities and not ((scores >= 0) & (scores <= 1)).all():
        raise CxrayError("scores must be probabilities, from 0 to 1: apply the sigmoid to logits")
    return scores, labels


def judge(scores: np.ndarray, labels: np.ndarray, findings: Sequence[str], thresholds: float | np.ndarray = 0.5) -> dict[str, Any]:
    """All metrics -> {'findings': {name: {...}}, 'macro': {metric: {'value', 'over'}}, 'micro': {...}}.

    scores: probabilities [n, F]; labels [n, F]; thresholds: one, or one a finding [F]. Macro is the mean over findings, micro pools
    all known pairs of study and finding. Raises CxrayError for what `checked` and `known` refuse.
    """
    scores, labels = checked(scores, labels)
    told = known(labels)
    called = scores >= np.broadcast_to(thresholds, scores.shape[1:])
    by_finding = {
        name: of_one(scores[told[:, i], i], labels[told[:, i], i], called[told[:, i], i]) | {"n_unknown": int((~told[:, i]).sum())}
        for i, name in enumerate(findings)
    }
    metrics = [name for name in of_one(np.zeros(0), np.zeros(0), np.zeros(0, bool)) if not name.startswith("n_")]
    macro = {}
    for metric in metrics:
        values = [found[metric] for found in by_finding.values() if not np.isnan(found[metric])]
        macro[metric] = {"value": float(np.mean(values)) if values else np.nan, "over": len(values)}
    return {"findings": by_finding, "macro": macro, "micro": of_one(scores[told], labels[told], called[told])}


def of_one(scores: np.ndarray, labels: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """All metrics of one set of probabilities, known labels and calls (bool), each of shape [m]."""
    positive = labels == 1
    return {
        "n_pos": int(positive.sum()),
        "n_neg": int((~positive).sum()),
        "auroc": auroc(scores, labels),
        "auprc": auprc(scores, labels),
        **confusion(called, labels),
        "brier": float(np.mean((scores - positive) ** 2)) if len(scores) else np.nan,
        "ece": ece(scores, labels),
    }


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; ties count half; NaN where there is one class. Known labels only."""
    from sklearn.metrics import roc_auc_score  # not above: it takes seconds, and who predicts or serves judges nothing

    return float(roc_auc_score(labels, scores)) if _both(labels) else np.nan


def auprc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision (no interpolation); NaN where there is one class. Known labels only."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if _both(labels) else np.nan


def confusion(called: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """F1, sensitivity, specificity and PPV of calls (bool); NaN where the denominator is 0, and for F1 where nothing is positive."""
    positive = labels == 1
    tp, fp = int((called & positive).sum()), int((called & ~positive).sum())
    fn, tn = int((~called & positive).sum()), int((~called & ~positive).sum())
    return {
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fn else np.nan,
        "sensitivity": tp / (tp + fn) if tp + fn else np.nan,
        "specificity": tn / (tn + fp) if tn + fp else np.nan,
        "ppv": tp / (tp + fp) if tp + fp else np.nan,
    }


def ece(scores: np.ndarray, labels: np.ndarray, count: int = BINS) -> float:
    """Expected calibration error of the probability of the positive class: over equal-width bins of it, the mean distance between
    mean probability and observed frequency, weighted by how many fall into the bin.

    This is the binary form (as torchmetrics has it), not that of the predicted class's confidence. NaN where there is nothing.
    """
    rows = reliability(scores, labels, count)
    n = sum(row["n"] for row in rows)
    return sum(row["n"] * abs(row["mean_score"] - row["observed"]) for row in rows if row["n"]) / n if n else np.nan


def bins(scores: np.ndarray, count: int = BINS) -> np.ndarray:
    """The bin of each probability, of so many of equal width. A bin holds its lower edge; the last one also 1."""
    return np.clip(np.searchsorted(np.linspace(0, 1, count + 1), scores, side="right") - 1, 0, count - 1)


def reliability(scores: np.ndarray, labels: np.ndarray, count: int = BINS) -> list[dict[str, float]]:
    """The table behind a reliability plot, a row a bin: low, high, n, mean_score, observed (both NaN where n is 0).

    Known labels only, shape [m].
    """
    edges = np.linspace(0, 1, count + 1)
    place = bins(scores, count)
    n = np.bincount(place, minlength=count)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=scores, minlength=count) / n
        observed = np.bincount(place, weights=(labels == 1).astype(float), minlength=count) / n
    return [
        {"low": float(edges[b]), "high": float(edges[b + 1]), "n": int(n[b]), "mean_score": float(mean[b]), "observed": float(observed[b])}
        for b in range(count)
    ]


def plain(value: Any) -> Any:
    """The same with NaN as None: JSON has no NaN, and a browser refuses a file that holds one."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _both(labels: np.ndarray) -> bool:
    return bool((labels == 1).any() and (labels == 0).any())
