"""Temperatures and thresholds, fitted on the validation split and on nothing else; the content of a model's calibration.json.

A temperature T divides the logit of a finding (Guo et al. 2017, arXiv:1706.04599): it changes no ranking, only how sure the model says it
is. Thresholds are for the probabilities after that.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from contracts.errors import CxrayError
from evaluation.metrics import checked, known

TEMPERATURES = (
    0.05,
    20.0,
)  # bounds of the fit: labels that scores separate fully would else ask for 0, and scores that say nothing for infinity
SPECIFICITIES = (0.90, 0.95)  # at which sensitivity is reported
Rule = Literal["youden", "f1"]


class Calibrated(TypedDict):
    """One finding's entry. at_specificity: {'0.90': the threshold that has it}. fitted: False where validation had one class, so that
    temperature 1 and threshold 0.5 stand, and no other threshold."""

    temperature: float
    threshold: float
    at_specificity: dict[str, float]
    fitted: bool


def logit(probabilities: np.ndarray) -> np.ndarray:
    """Inverse of the sigmoid; probabilities are kept 1e-12 away from 0 and 1."""
    p = np.clip(np.asarray(probabilities, np.float64), 1e-12, 1 - 1e-12)
    return np.log(p) - np.log1p(-p)


def fit(logits: np.ndarray, labels: np.ndarray, findings: Sequence[str], rule: Rule = "youden") -> dict[str, Calibrated]:
    """Validation logits [n, F] and labels [n, F] (1, 0; -1 or NaN unknown) -> {finding: temperature and threshold}, as calibration.json
    holds them. Raises CxrayError where logits are not finite.
    """
    logits, labels = checked(logits, labels, probabilities=False)
    told = known(labels)
    found: dict[str, Calibrated] = {}
    for i, name in enumerate(findings):
        z, y = logits[told[:, i], i], labels[told[:, i], i]
        if (y == 1).any() and (y == 0).any():
            temperature = fit_temperature(z, y)
            p = expit(z / temperature)
            fixed = {f"{s:.2f}": threshold_at(p, y, s) for s in SPECIFICITIES}
            found[name] = {"temperature": temperature, "threshold": fit_threshold(p, y, rule), "at_specificity": fixed, "fitted": True}
        else:
            found[name] = {"temperature": 1.0, "threshold": 0.5, "at_specificity": {}, "fitted": False}
    return found


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T within TEMPERATURES that makes the mean negative log-likelihood of known labels least. Shapes [m]; both classes."""
    signed = np.where(labels == 1, logits, -logits)
    # In 1 / T the likelihood is concave, so there is one best value; the search is in log T, where both sides of 1 are alike.
    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(
        lambda t: np.logaddexp(0, -signed * np.exp(-t)).mean(), bounds=(low, high), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(best.x))


def fit_threshold(scores: np.ndarray, labels: np.ndarray, rule: Rule = "youden") -> float:
    """The threshold (positive at or above) that is best by Youden's J = sensitivity + specificity - 1 (Youden 1950), or by F1.

    It lies midway between two scores that occur, so that rounding on another machine changes no call; of equally good ones the highest
    is taken. Shapes [m]; both classes.
    """
    order = np.argsort(-scores, kind="stable")
    s, positive = scores[order], labels[order] == 1
    ends = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)
    true, false = np.cumsum(positive)[ends], np.cumsum(~positive)[ends]
    if rule == "youden":
        worth = true / true[-1] - false / false[-1]
    else:
        worth = 2 * true / (true + false + true[-1])
    best = int(np.argmax(worth))
    here = s[ends[best]]
    return float(here) if best == len(ends) - 1 else float((here + s[ends[best + 1]]) / 2)


def threshold_at(scores: np.ndarray, labels: np.ndarray, specificity: float) -> float:
    """The lowest threshold (positive at or above) with a specificity of at least so much, and so the highest sensitivity: midway between
    two scores that occur, or where the highest is a negative's, just above it. Shapes [m]; there are negatives."""
    negatives = -np.sort(-scores[labels == 0])
    edge = negatives[int((1 - specificity) * len(negatives) + 1e-9)]  # the first that may not be called; 1 - 0.9 is a little under 0.1
    higher = scores[scores > edge]
    return float((edge + higher.min()) / 2) if len(higher) else float(np.nextafter(edge, 2))


def apply(scores: np.ndarray, findings: Sequence[str], calibration: dict[str, Any]) -> np.ndarray:
    """Probabilities [..., F] -> calibrated ones. Raises CxrayError where a finding has no entry."""
    return expit(logit(scores) / _column(findings, calibration, "temperature"))


def thresholds(findings: Sequence[str], calibration: dict[str, Any]) -> np.ndarray:
    """The thresholds of these findings, in their order [F]. Raises CxrayError where one has no entry."""
    return _column(findings, calibration, "threshold")


def _column(findings: Sequence[str], calibration: dict[str, Any], key: str) -> np.ndarray:
    if missing := [f for f in findings if f not in calibration]:
        raise CxrayError(f"calibration.json has no entry for {', '.join(missing)}: fit it anew for this model")
    return np.array([calibration[f][key] for f in findings], np.float64)
