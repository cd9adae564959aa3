"""Intervals: patients are resampled, the quick metrics are the slow ones, comparisons are paired and corrected."""

import numpy as np
import pytest
import sklearn.metrics as sk

from contracts.errors import CxrayError
from evaluation import intervals
from evaluation.intervals import METRICS, bootstrap, holm, interval, macro, p_value, resample, statistic
from evaluation.metrics import judge

RNG = np.random.default_rng(3)
N, F = 150, 5
GROUPS = np.array([f"p{g}" for g in RNG.integers(0, 60, N)])
LABELS = (RNG.random((N, F)) < [0.05, 0.3, 0.5, 0.8, 0.2]).astype(float)
LABELS[RNG.random((N, F)) < 0.1] = np.nan
LABELS[:20, 1] = -1
SCORES = np.round(np.clip(0.25 * (LABELS == 1) + RNG.random((N, F)) * 0.75, 0, 1), 1)  # one decimal: ties everywhere
THRESHOLDS = np.array([0.5, 0.3, 0.6, 0.4, 0.7])


def slow(metric: str, scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, threshold: float) -> float:
    """One metric of one finding under integer weights, by repeating rows and asking scikit-learn."""
    told = (labels == 0) | (labels == 1)
    times = weights[told].astype(int)
    s, y = np.repeat(scores[told], times), np.repeat(labels[told], times)
    called = s >= threshold
    need = {"auroc": {0, 1}, "auprc": {0, 1}, "f1": {1}, "sensitivity": {1}, "specificity": {0}, "ppv": set(), "brier": set()}[metric]
    if not len(y) or not need <= set(y) or (metric == "ppv" and not called.any()):
        return np.nan
    return {
        "auroc": lambda: sk.roc_auc_score(y, s),
        "auprc": lambda: sk.average_precision_score(y, s),
        "f1": lambda: sk.f1_score(y, called),
        "sensitivity": lambda: sk.recall_score(y, called),
        "specificity": lambda: sk.recall_score(y, called, pos_label=0),
        "ppv": lambda: sk.precision_score(y, called),
        "brier": lambda: np.mean((s - y) ** 2),
    }[metric]()


def test_every_metric_of_every_resample_is_what_scikit_learn_says():
    seen = []
    resample(GROUPS, lambda w: seen.append(w) or w[:1], 40, seed=1)
    weights = np.concatenate(seen, axis=1)
    found = bootstrap(SCORES, LABELS, GROUPS, METRICS, THRESHOLDS, 40, seed=1)
    for metric in METRICS:
        wanted = [[slow(metric, SCORES[:, f], LABELS[:, f], weights[:, r], THRESHOLDS[f]) for r in range(40)] for f in range(F)]
        np.testing.assert_allclose(found[metric][1], wanted, atol=1e-9, err_msg=metric)


def test_the_value_itself_is_that_of_the_metrics():
    found = bootstrap(SCORES, LABELS, GROUPS, METRICS, THRESHOLDS, 2)
    wanted = judge(SCORES, LABELS, [str(f) for f in range(F)], THRESHOLDS)["findings"]
    for metric in METRICS:
        np.testing.assert_allclose(found[metric][0], [wanted[str(f)][metric] for f in range(F)])


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0], [np.nan, -1, np.nan]])
def test_one_class_is_nan_in_every_resample(labels):
    found = statistic(np.array([[0.1], [0.2], [0.3]]), np.array(labels, float)[:, None], ("auroc", "auprc"))(np.ones((3, 4), np.float32))
    assert found.shape == (2, 1, 4) and np.isnan(found).all()


def test_a_patient_comes_with_all_studies_or_not_at_all():
    def check(weights):
        for patient in set(GROUPS):
            own = weights[patient == GROUPS]
            assert (own == own[0]).all()
        return weights.sum(axis=0, keepdims=True)

    _, first = np.unique(GROUPS, return_index=True)
    resample(GROUPS, check, 30, seed=0)
    patients = resample(GROUPS, lambda w: w[first].sum(axis=0, keepdims=True), 30, seed=0)
    assert (patients == len(first)).all()  # as many patients as there are


def test_resampling_images_would_claim_too_much():
    """Ten alike studies of each patient: they are no ten times the evidence."""
    rng = np.random.default_rng(0)
    labels = np.repeat((rng.random(40) < 0.5).astype(float), 10)[:, None]
    scores = np.repeat(rng.random(40), 10)[:, None] * 0.8 + 0.2 * labels
    patients, images = np.repeat(np.arange(40), 10), np.arange(400)
    wide, narrow = (interval(v[0], d[0]) for v, d in (bootstrap(scores, labels, g, ("auroc",))["auroc"] for g in (patients, images)))
    assert wide.value == narrow.value
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)  # about sqrt(10)
    alone = interval(0, bootstrap(scores[::10], labels[::10], np.arange(40), ("auroc",))["auroc"][1][0])
    assert (wide.low, wide.high) == (alone.low, alone.high)  # of forty patients with one study each


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, inside = 0.7602, 0  # P(a > b) for normals one apart: Phi(1 / sqrt 2)
    for _ in range(200):
        labels = (rng.random(150) < 0.5).astype(float)[:, None]
        value, drawn = bootstrap(rng.normal(size=(150, 1)) + labels, labels, np.arange(150), ("auroc",), resamples=300)["auroc"]
        found = interval(value[0], drawn[0])
        inside += found.low <= truth <= found.high
    assert 0.90 <= inside / 200 <= 0.985


def test_the_same_seed_gives_the_same_however_it_is_cut(monkeypatch):
    whole = bootstrap(SCORES, LABELS, GROUPS, resamples=60, seed=7)
    monkeypatch.setattr(intervals, "CELLS", 1)
    pieces = bootstrap(SCORES, LABELS, GROUPS, resamples=60, seed=7)
    other = bootstrap(SCORES, LABELS, GROUPS, resamples=60, seed=8)
    for metric in METRICS:
        np.testing.assert_array_equal(whole[metric][1], pieces[metric][1])
    assert (whole["auroc"][1] != other["auroc"][1]).any()


def test_undefined_resamples_are_dropped_and_counted():
    labels = np.zeros((30, 1))
    labels[0] = 1  # one patient has it: about 37 % of resamples miss that patient
    _, drawn = bootstrap(np.random.default_rng(0).random((30, 1)), labels, np.arange(30), ("auroc",))["auroc"]
    found = interval(0.5, drawn[0])
    assert found.dropped == np.isnan(drawn).sum() and 250 < found.dropped < 500
    told = drawn[0][~np.isnan(drawn[0])]
    assert (found.low, found.high) == (np.quantile(told, 0.025), np.quantile(told, 0.975))
    assert str(interval(np.nan, np.full(9, np.nan))) == "not defined"


def test_macro_is_over_the_defined_findings():
    nan = np.nan
    np.testing.assert_array_equal(macro(np.array([[0.5, nan, nan], [0.7, 0.9, nan]])), [0.6, 0.9, nan])


def test_p_value_by_hand():
    assert p_value(np.array([0.1] * 99)) == pytest.approx(2 / 100)
    assert p_value(np.array([0.1] * 96 + [-0.1] * 3)) == pytest.approx(8 / 100)
    assert p_value(-np.array([0.1] * 96 + [-0.1] * 3)) == pytest.approx(8 / 100)
    assert p_value(np.zeros(99)) == 1 and p_value(np.array([0.1] * 99 + [np.nan])) == pytest.approx(2 / 100)
    assert np.isnan(p_value(np.array([nan := np.nan, nan])))


def test_holm_by_hand():
    # 4 x 0.01, then 3 x 0.02, then 2 x 0.03 and 1 x 0.04, none under the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    adjusted = holm([0.01, np.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.02) and np.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.03)
    assert holm([]) == []


def test_nothing_to_resample_is_said():
    with pytest.raises(CxrayError, match="no studies"):
        resample(np.array([]), lambda w: w, 10, 0)
