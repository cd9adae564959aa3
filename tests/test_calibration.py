"""Temperatures and thresholds: fitted where there is something to fit, right where the answer is known."""

import json

import numpy as np
import pytest
from scipy.special import expit

from contracts.errors import CxrayError
from evaluation.calibration import TEMPERATURES, apply, fit, fit_temperature, fit_threshold, logit, threshold_at, thresholds
from evaluation.metrics import judge

RNG = np.random.default_rng(11)
TRUE = RNG.normal(-0.5, 1.5, size=(20_000, 2))  # logits of the real probabilities
LABELS = (RNG.random(TRUE.shape) < expit(TRUE)).astype(float)
NAMES = ("sure", "shy")
LOGITS = TRUE * [2.5, 0.5]  # one model is too sure of itself, the other not enough


def nll(logits, labels, temperature):
    return np.logaddexp(0, -np.where(labels == 1, 1, -1) * logits / temperature).mean()


def test_a_temperature_undoes_what_was_done_to_the_logits():
    found = fit(LOGITS, LABELS, NAMES)
    assert (found["sure"]["temperature"], found["shy"]["temperature"]) == (pytest.approx(2.5, rel=0.05), pytest.approx(0.5, rel=0.05))
    before = judge(expit(LOGITS), LABELS, NAMES)
    after = judge(apply(expit(LOGITS), NAMES, found), LABELS, NAMES)
    for name in NAMES:
        b, a = before["findings"][name], after["findings"][name]
        assert a["ece"] < 0.02 < b["ece"] and a["brier"] < b["brier"] and a["auroc"] == pytest.approx(b["auroc"])


def test_no_other_temperature_has_a_smaller_loss():
    z, y = LOGITS[:300, 0], LABELS[:300, 0]
    best = fit_temperature(z, y)
    assert nll(z, y, best) <= min(nll(z, y, t) for t in np.geomspace(*TEMPERATURES, 2000)) + 1e-9


def test_a_temperature_stays_within_its_bounds():
    y = np.array([0.0, 0, 1, 1])
    low, high = TEMPERATURES
    assert fit_temperature(np.array([-2.0, -1, 1, 2]), y) == pytest.approx(low, rel=1e-3)  # separable: it would ask for 0
    assert fit_temperature(np.array([2.0, 1, -1, -2]), y) == pytest.approx(high, rel=1e-3)  # upside down


def test_thresholds_by_hand():
    scores, y = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1]), np.array([1.0, 0, 1, 1, 0, 0])
    # At 0.6: sensitivity 1, specificity 2/3, J = 2/3. At 0.9: J = 1/3.
    assert fit_threshold(scores, y, "youden") == pytest.approx(0.55)
    scores, y = np.arange(20, 0, -1) / 20, np.array([1.0] + [0] * 9 + [1] + [0] * 9)
    # Youden: 1.0 gives 1/2, 0.5 gives 1 - 9/18 = 1/2: of equals the highest. F1: 2/3 against 2 x 2/13.
    assert fit_threshold(scores, y, "youden") == pytest.approx(0.975) == fit_threshold(scores, y, "f1")
    assert fit_threshold(np.array([0.3, 0.3, 0.3]), np.array([1.0, 0, 1]), "f1") == pytest.approx(0.3)  # all alike: all are called


def test_a_threshold_of_fixed_specificity_is_the_most_sensitive_one():
    """As torchmetrics finds it; and by hand."""
    torch, tm = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.functional.classification")
    p, y = np.round(expit(TRUE[:400, 0]), 2), LABELS[:400, 0]  # with ties
    for specificity in (0.5, 0.9, 0.95, 1.0):
        at = threshold_at(p, y, specificity)
        wanted, _ = tm.binary_sensitivity_at_specificity(torch.tensor(p), torch.tensor(y).long(), specificity)
        assert (p[y == 0] < at).mean() >= specificity - 1e-9
        assert (p[y == 1] >= at).mean() == pytest.approx(float(wanted))
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6, 0.2]), np.array([1.0, 0, 1, 0, 0])
    assert threshold_at(scores, labels, 0.9) == pytest.approx(0.85) and threshold_at(scores, labels, 0.6) == pytest.approx(0.65)
    assert 0.9 < threshold_at(scores, 1 - labels, 0.9) < 0.91, "where the highest is a negative's, nothing is called"


@pytest.mark.parametrize("rule", ["youden", "f1"])
def test_no_other_threshold_is_better(rule):
    p, y = np.round(expit(TRUE[:400, 0]), 2), LABELS[:400, 0]

    def worth(threshold):
        found = judge(p[:, None], y[:, None], ["x"], threshold)["findings"]["x"]
        return found["f1"] if rule == "f1" else found["sensitivity"] + found["specificity"]

    best = worth(fit_threshold(p, y, rule))
    assert best == pytest.approx(max(worth(t) for t in np.linspace(0, 1, 101)))


def test_a_finding_with_one_class_is_left_as_it_is_and_said_so():
    labels = LABELS.copy()
    labels[:, 1] = np.where(np.arange(len(labels)) % 2, 0, np.nan)
    found = fit(LOGITS, labels, NAMES)
    assert found["shy"] == {"temperature": 1.0, "threshold": 0.5, "at_specificity": {}, "fitted": False} and found["sure"]["fitted"]
    p = expit(LOGITS[:50])
    np.testing.assert_allclose(apply(p, NAMES, found)[:, 1], p[:, 1])


def test_unknown_labels_do_not_count():
    labels = LABELS.copy()
    labels[::3, 0] = -1
    assert fit(LOGITS, labels, NAMES)["sure"] == fit(LOGITS[labels[:, 0] >= 0], labels[labels[:, 0] >= 0], NAMES)["sure"]


def test_it_goes_through_json_and_findings_by_name():
    found = json.loads(json.dumps(fit(LOGITS, LABELS, NAMES)))
    turned = NAMES[::-1]
    np.testing.assert_array_equal(apply(expit(LOGITS[:9, ::-1]), turned, found), apply(expit(LOGITS[:9]), NAMES, found)[:, ::-1])
    np.testing.assert_array_equal(thresholds(turned, found), thresholds(NAMES, found)[::-1])
    with pytest.raises(CxrayError, match="no entry for Edema"):
        thresholds(["Edema"], found)


def test_logits_of_certain_probabilities_are_finite_and_others_exact():
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
    np.testing.assert_allclose(logit(expit(np.linspace(-20, 20, 9))), np.linspace(-20, 20, 9), rtol=1e-6)
    with pytest.raises(CxrayError, match="not finite"):
        fit(np.full((3, 1), np.inf), np.ones((3, 1)), ["x"])
