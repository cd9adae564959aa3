"""How much of the labels a simple reader finds in the notes, before and after the leakage filter, and in the structured features alone.

A bag of words is the right reader for this: it picks up any word that gives a label away and understands nothing. Fitted on
train, asked on validate.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from contracts.errors import CxrayError
from contracts.findings import FINDINGS
from evaluation.intervals import Interval, bootstrap, interval, macro
from evaluation.metrics import known

VIEWS = ("before", "after", "structured")
MIN_POSITIVES = 10  # in train: a probe of fewer says nothing
WORDS, MIN_NOTES = 20_000, 3  # the vocabulary (words and pairs of words), and in how many notes of train a term must stand


def measure(
    before: Sequence[str],
    after: Sequence[str],
    structured: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    split: np.ndarray,
    findings: Sequence[str] = FINDINGS,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC on validate of probes that read the notes before the filter, after it, and the structured features; a row a study.

    before, after: n notes; structured: float [n, D], NaN where missing; labels [n, F]: 1, 0, NaN or -1 unknown; groups [n], the patients;
    split [n]: 'train', 'validate'. Intervals are of patients, 95 %, and the same resamples serve all three.

    -> {'studies', 'patients', 'findings': {name: {'train', 'validate' (n_pos, n_neg), 'before', 'after', 'structured' (Intervals as dicts),
    'after_less_structured', 'exceeds', 'why_not'}}, 'macro': the same over the measured findings, 'exceeding': names}. exceeds: the probe
    of the filtered notes lies above the interval of the structured one. why_not: why a finding was not measured; then all is NaN.
    Raises CxrayError where train or validate has no studies.
    """
    train, check = np.flatnonzero(split == "train"), np.flatnonzero(split == "validate")
    if not len(train) or not len(check):
        raise CxrayError(f"the probes need studies of train and of validate; there are {len(train):,} and {len(check):,}")
    labels = np.where(known(labels), labels, np.nan)
    why_not = [_why_not(labels[train, i], labels[check, i]) for i in range(len(findings))]
    able = [i for i, reason in enumerate(why_not) if reason is None]
    inputs = {
        "before": _bag(before, train, check),
        "after": _bag(after, train, check),
        "structured": (structured[train], structured[check]),
    }
    drawn = {}
    for view, (fit_on, ask) in inputs.items():
        scores = np.zeros((len(check), len(findings)))
        for i in able:
            told = ~np.isnan(labels[train, i])
            scores[:, i] = _probe(fit_on[told], labels[train, i][told], ask, dense=view == "structured", seed=seed)
        value, many = bootstrap(scores, labels[check], groups[check], ("auroc",), resamples=resamples, seed=seed)["auroc"]
        unable = [i for i in range(len(findings)) if i not in able]
        value[unable], many[unable] = np.nan, np.nan
        drawn[view] = value, many
    by_finding = {
        name: {"train": _counts(labels[train, i]), "validate": _counts(labels[check, i]), "why_not": why_not[i]}
        | _compared({view: (value[i], many[i]) for view, (value, many) in drawn.items()})
        for i, name in enumerate(findings)
    }
    return {
        "studies": {"train": len(train), "validate": len(check)},
        "patients": {"train": len(np.unique(groups[train])), "validate": len(np.unique(groups[check]))},
        "findings": by_finding,
        "macro": _compared({view: (float(macro(value)), macro(many)) for view, (value, many) in drawn.items()}) | {"over": len(able)},
        "exceeding": [name for name, one in by_finding.items() if one["exceeds"]],
    }


def in_words(found: dict[str, Any]) -> str:
    """What the numbers of `measure` say, for a person."""
    m = found["macro"]
    if not m["over"]:
        return "No finding could be measured: there are too few positives in train, or one class in validate."
    b, a, s = (Interval(**m[view]) for view in VIEWS)
    opening = (
        f"Averaged over {m['over']} findings, a bag of words reads the labels off the notes with AUROC {b} before the filter and {a} after "
        f"it; the structured features alone reach {s}; {found['studies']['validate']:,} studies were asked. "
    )
    if not found["exceeding"]:
        return opening + "After the filter the notes tell no more than the structured features, for any finding."
    return (
        opening
        + f"Above the interval of the structured features are, after the filter: {', '.join(found['exceeding'])}. That may be honest "
        "knowledge, because complaints, medicines and history say what vital signs do not, or a term that the filter does not know: "
        "look at how far above, and at what the filter's scan finds."
    )


def _why_not(train: np.ndarray, check: np.ndarray) -> str | None:
    if (train == 1).sum() < MIN_POSITIVES:
        return f"under {MIN_POSITIVES} positives in train"
    if not (train == 0).any():
        return "one class in train"
    return None if (check == 1).any() and (check == 0).any() else "one class in validate"


def _counts(labels: np.ndarray) -> dict[str, int]:
    return {"n_pos": int((labels == 1).sum()), "n_neg": int((labels == 0).sum())}


def _compared(drawn: dict[str, tuple[float, np.ndarray]]) -> dict[str, Any]:
    """Intervals of the three views, and of the paired difference that matters."""
    less = drawn["after"][0] - drawn["structured"][0], drawn["after"][1] - drawn["structured"][1]
    found = {view: interval(*of) for view, of in drawn.items()}
    return {
        **{view: asdict(one) for view, one in found.items()},
        "after_less_structured": asdict(interval(*less)),
        "exceeds": bool(found["after"].value > found["structured"].high),
    }


def _bag(notes: Sequence[str], train: np.ndarray, check: np.ndarray) -> tuple[csr_matrix, csr_matrix]:
    """Notes -> TF-IDF of words and pairs of words; vocabulary and weights are those of train."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=min(MIN_NOTES, len(train)), max_features=WORDS, sublinear_tf=True)
    try:
        return csr_matrix(words.fit_transform([notes[i] for i in train])), csr_matrix(words.transform([notes[i] for i in check]))
    except ValueError:  # what scikit-learn raises where no term stands in so many notes: then the notes say nothing
        return csr_matrix((len(train), 1)), csr_matrix((len(check), 1))


def _probe(fit_on: Any, labels: np.ndarray, ask: Any, dense: bool, seed: int) -> np.ndarray:
    """A logistic regression fitted on some rows -> its probabilities for others."""
    if dense:
        impute = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
        model = make_pipeline(impute, StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    else:
        model = LogisticRegression(class_weight="balanced", solver="liblinear", random_state=seed)
    return expit(model.fit(fit_on, labels).decision_function(ask))
