"""Intervals by resampling patients, and what they say of differences.

Two studies of one patient are alike, so a resample draws patients with replacement and takes all studies of each. A resample is
a matrix of weights (how often each study was drawn), and every metric here is computed for many of them at once. The same groups and
seed give the same resamples: that is what pairs a comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from contracts.errors import CxrayError
from evaluation.metrics import BINS, bins, checked, known

METRICS = ("auroc", "auprc", "f1", "sensitivity", "specificity", "ppv", "brier")  # what is asked for unless told; there are more:
RANKED = ("auroc", "auprc")
PROBABLE = ("brier", "ece")  # these need probabilities
LEVEL = 0.95
CELLS = 200_000  # weights held at once: so few that they stay near the processor

Statistic = Callable[[np.ndarray], np.ndarray]  # weights float32 [n, r] -> [..., r]


@dataclass(frozen=True)
class Interval:
    """A value with its percentile interval. dropped: how many resamples left it undefined (one class) and do not count."""

    value: float
    low: float
    high: float
    dropped: int

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Interval":
        """From a mapping, which may hold more."""
        return cls(told["value"], told["low"], told["high"], told["dropped"])

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})" if np.isfinite(self.value) else "not defined"


def resample(groups: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> np.ndarray:
    """What a statistic is on each of R resamples of the patients -> [..., R].

    groups: [n], the patient of each study. Raises CxrayError where there are no studies.
    """
    if not len(groups):
        raise CxrayError("nothing to resample: there are no studies")
    _, patient = np.unique(groups, return_inverse=True)
    patients = int(patient.max()) + 1
    rng = np.random.default_rng(seed)
    step = max(16, CELLS // len(patient))
    found = []
    with threadpool_limits(1, "blas"):  # the products are small: threads that wait for one another cost more than they bring
        for start in range(0, resamples, step):
            r = min(step, resamples - start)
            drawn = rng.integers(patients, size=(r, patients)) + np.arange(r)[:, None] * patients
            times = np.bincount(drawn.ravel(), minlength=r * patients).reshape(r, patients)
            found.append(statistic(times.T.astype(np.float32)[patient]))
    return np.concatenate(found, axis=-1)


def bootstrap(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    metrics: Sequence[str] = METRICS,
    thresholds: float | np.ndarray = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{metric: (values of the set itself [F], values of the resamples [F, R])}. Undefined ones are NaN.

    scores, labels: [n, F] as `metrics.judge` takes them (only PROBABLE and thresholds need probabilities); groups: [n]; thresholds: one,
    one a finding [F], or one a cell [n, F]. metrics: of METRICS, RANKED and PROBABLE.
    """
    ask = statistic(scores, labels, metrics, thresholds)
    itself = ask(np.ones((len(groups), 1), np.float32))[..., 0]
    drawn = resample(groups, ask, resamples, seed)
    return {name: (itself[i], drawn[i]) for i, name in enumerate(metrics)}


def interval(value: float, drawn: np.ndarray) -> Interval:
    """The 95 % percentile interval of one value over its resamples [R]; NaN where none is defined."""
    drawn = np.asarray(drawn, np.float64)
    told = drawn[~np.isnan(drawn)]
    low, high = np.quantile(told, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(told) and not np.isnan(value) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), len(drawn) - len(told))


def macro(values: np.ndarray) -> np.ndarray:
    """The mean over findings [F, ...] of the defined ones; NaN where none is.

    A resample can leave a rare finding with one class; that resample's mean is over the others, and in a paired comparison so it is
    for both sides.
    """
    told = ~np.isnan(values)
    count = told.sum(axis=0)
    return np.where(count > 0, np.where(told, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of 'no difference', from the differences on R paired resamples; NaN where none is defined.

    Twice the smaller share of resamples at or beyond zero, each counted with one more (Davison & Hinkley 1997, section 4.2), so it is
    never under 2 / (R + 1).
    """
    told = differences[~np.isnan(differences)]
    if not len(told):
        return np.nan
    beyond = min((told <= 0).sum(), (told >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(told) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): reject where they are under alpha. NaN stays NaN and is not counted."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted.tolist()


def statistic(scores: np.ndarray, labels: np.ndarray, metrics: Sequence[str], thresholds: float | np.ndarray = 0.5) -> Statistic:
    """A function of weights [n, r] -> these metrics of each finding [M, F, r]."""
    scores, labels = checked(scores, labels, probabilities=bool(set(metrics) & set(PROBABLE)))
    ranked = [_Ranking(scores[:, i], labels[:, i]) for i in range(scores.shape[1])] if set(metrics) & set(RANKED) else []
    told = known(labels)
    positive, called = labels == 1, scores >= np.broadcast_to(thresholds, scores.shape)
    cells = [called & positive, called & ~positive, ~called & positive, ~called & ~positive]  # tp, fp, fn, tn
    counted = np.concatenate([told & cell for cell in cells], axis=1).T.astype(np.float32)  # [4 F, n]
    error = np.where(told, (scores - positive) ** 2, 0).T
    apart = _apart(scores, labels) if "ece" in metrics else []

    def of(weights: np.ndarray) -> np.ndarray:
        found: dict[str, np.ndarray] = {}
        if ranked:
            found |= dict(zip(RANKED, np.stack([ranking(weights) for ranking in ranked], axis=1)))
        if set(metrics) - set(RANKED):
            tp, fp, fn, tn = np.split(counted @ weights, 4)  # whole numbers: exact in float32
            found["sensitivity"] = _share(tp, tp + fn)
            found["specificity"] = _share(tn, tn + fp)
            found["ppv"] = _share(tp, tp + fp)
            found["f1"] = np.where(tp + fn > 0, _share(2 * tp, 2 * tp + fp + fn), np.nan)
            found["brier"] = _share(error @ weights.astype(np.float64), tp + fp + fn + tn)
            if apart:
                off = np.stack([np.abs(one @ weights).sum(axis=0) for one in apart])
                found["ece"] = _share(off, tp + fp + fn + tn)
        return np.stack([found[name] for name in metrics])

    return of


def _apart(scores: np.ndarray, labels: np.ndarray) -> list[csr_array]:
    """Of each finding a matrix [BINS, n]: probability less label, in the row of the study's bin.

    n_bin * |mean probability - observed frequency| is |sum of (probability - label)|, so ECE under weights is one product.
    """
    told = known(labels)
    found = []
    for i in range(scores.shape[1]):
        rows = np.flatnonzero(told[:, i])
        s, y = scores[rows, i], labels[rows, i]
        found.append(csr_array((s - y, (bins(s), rows)), shape=(BINS, len(scores))))
    return found


class _Ranking:
    """One finding's studies, sorted once by falling score, to be asked under many weightings."""

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        rows = np.flatnonzero(known(labels))
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        positive = labels[rows] == 1
        self.positives, self.negatives = rows[positive], rows[~positive]
        up, down = -scores[self.positives], -scores[self.negatives]  # rising, as `searchsorted` wants them
        # Only the distinct scores of positives matter: each ranks against the negatives above it, and those tied with it.
        levels = np.unique(up)
        self.up_to = _Prefix(np.searchsorted(up, levels, "right"), len(up))
        self.above = _Prefix(np.searchsorted(down, levels, "left"), len(down))
        self.down_to = _Prefix(np.searchsorted(down, levels, "right"), len(down))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Weights [n, r] -> (AUROC, average precision) [2, r]; NaN where a class has no weight."""
        positives, negatives = weights[self.positives], weights[self.negatives]
        true, false, before = self.up_to(positives), self.down_to(negatives), self.above(negatives)
        at = np.diff(true, axis=0, prepend=0)  # the weight of the positives of this very score
        p, n = positives.sum(axis=0, dtype=np.float64), negatives.sum(axis=0, dtype=np.float64)
        wins = (at * (n - (before + false) / 2)).sum(axis=0)
        precision = (at * true / np.maximum(true + false, 1)).sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((p > 0) & (n > 0), [wins / (p * n), precision / p], np.nan)


class _Prefix:
    """Sums of the first so many rows, for many such counts."""

    def __init__(self, counts: np.ndarray, of: int) -> None:
        # `reduceat` knows no empty piece, so the cuts are distinct and the counts look theirs up.
        cuts = np.unique(np.append(counts, 0))
        self.cuts = cuts[cuts < of]
        self.places = np.searchsorted(np.append(self.cuts, of), counts)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[m, r] -> float64 [counts, r]."""
        sums = np.zeros((len(self.cuts) + 1, rows.shape[1]))
        if len(self.cuts):
            np.cumsum(np.add.reduceat(rows, self.cuts, axis=0), axis=0, out=sums[1:])
        return sums[self.places]


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part.astype(np.float64) / whole, np.nan)
