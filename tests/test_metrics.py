"""Metrics against scikit-learn, torchmetrics and cases worked by hand; predictions of images become those of studies."""

import json

import numpy as np
import pytest
import sklearn.metrics as sk

from contracts.errors import CxrayError
from evaluation.metrics import confusion, ece, judge, plain, reliability

RNG = np.random.default_rng(5)
N = 400
LABELS = (RNG.random((N, 4)) < [0.1, 0.3, 0.5, 0.02]).astype(float)
SCORES = np.round(np.clip(0.3 * LABELS + RNG.random((N, 4)) * 0.7, 0, 1), 2)  # two decimals: many ties
NAMES = ("a", "b", "c", "d")


def test_each_finding_is_what_scikit_learn_says():
    thresholds = np.array([0.3, 0.5, 0.44, 0.6])
    found = judge(SCORES, LABELS, NAMES, thresholds)
    for i, name in enumerate(NAMES):
        s, y = SCORES[:, i], LABELS[:, i]
        called, one = s >= thresholds[i], found["findings"][name]
        assert (one["n_pos"], one["n_neg"], one["n_unknown"]) == (y.sum(), N - y.sum(), 0)
        wanted = {
            "auroc": sk.roc_auc_score(y, s),
            "auprc": sk.average_precision_score(y, s),
            "f1": sk.f1_score(y, called),
            "sensitivity": sk.recall_score(y, called),
            "specificity": sk.recall_score(y, called, pos_label=0),
            "ppv": sk.precision_score(y, called),
            "brier": sk.brier_score_loss(y, s),
        }
        assert {k: one[k] for k in wanted} == pytest.approx(wanted)
    assert found["macro"]["auroc"] == {"value": pytest.approx(sk.roc_auc_score(LABELS, SCORES, average="macro")), "over": 4}
    assert found["micro"]["auroc"] == pytest.approx(sk.roc_auc_score(LABELS, SCORES, average="micro"))
    assert found["micro"]["f1"] == pytest.approx(sk.f1_score(LABELS, thresholds <= SCORES, average="micro"))


def test_ece_is_torchmetrics():
    torch, tm = pytest.importorskip("torch"), pytest.importorskip("torchmetrics.functional.classification")
    for i in range(4):
        s, y = torch.tensor(SCORES[:, i]), torch.tensor(LABELS[:, i]).long()
        assert ece(SCORES[:, i], LABELS[:, i]) == pytest.approx(float(tm.binary_calibration_error(s, y, n_bins=15)), abs=1e-6)


def test_by_hand():
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6, 0.2]), np.array([1.0, 0, 1, 0, 0])
    found = judge(scores[:, None], labels[:, None], ["x"], 0.65)["findings"]["x"]
    assert found["auroc"] == pytest.approx(5 / 6)  # of 6 pairs only (0.7, 0.8) is the wrong way round
    assert found["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert (found["sensitivity"], found["specificity"], found["ppv"], found["f1"]) == pytest.approx((1, 2 / 3, 2 / 3, 4 / 5))
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.09 + 0.36 + 0.04) / 5)
    # Four bins: 0.2 alone; 0.6 and 0.7, half positive; 0.8 and 0.9, half positive.
    assert ece(scores, labels, 4) == pytest.approx((1 * 0.2 + 2 * abs(0.65 - 0.5) + 2 * abs(0.85 - 0.5)) / 5)
    assert [(r["low"], r["high"], r["n"]) for r in reliability(scores, labels, 4)] == [
        (0, 0.25, 1), (0.25, 0.5, 0), (0.5, 0.75, 2), (0.75, 1, 2)
    ]  # fmt: skip
    assert reliability(np.array([0.5]), np.array([1.0]), 4)[2]["n"] == 1  # a bin holds its lower edge
    assert reliability(np.array([1.0]), np.array([1.0]))[-1]["n"] == 1


def test_equal_scores_say_nothing():
    found = judge(np.full((10, 1), 0.5), np.arange(10)[:, None] % 2, ["x"])["findings"]["x"]
    assert (found["auroc"], found["auprc"]) == (0.5, 0.5)


def test_a_label_with_one_class_is_undefined_and_stays_out_of_the_average():
    labels = LABELS.copy()
    labels[:, 1] = 0
    labels[:, 2] = 1
    found = judge(SCORES, labels, NAMES)
    assert (found["findings"]["b"]["n_pos"], found["findings"]["c"]["n_neg"]) == (0, 0)
    for name in ("b", "c"):
        assert all(np.isnan(found["findings"][name][m]) for m in ("auroc", "auprc"))
    assert np.isnan(found["findings"]["b"]["f1"]) and np.isnan(found["findings"]["c"]["specificity"])
    two = [found["findings"][n]["auroc"] for n in ("a", "d")]
    assert found["macro"]["auroc"] == {"value": pytest.approx(np.mean(two)), "over": 2}
    assert plain(found)["findings"]["b"]["auroc"] is None
    json.dumps(plain(found), allow_nan=False)


@pytest.mark.parametrize("unknown", [np.nan, -1])
def test_unknown_labels_are_left_out(unknown):
    labels, gone = LABELS.copy(), RNG.random((N, 4)) < 0.3
    labels[gone] = unknown
    found = judge(SCORES, labels, NAMES)
    for i, name in enumerate(NAMES):
        told = ~gone[:, i]
        alone = judge(SCORES[told, i : i + 1], LABELS[told, i : i + 1], [name])["findings"][name]
        assert found["findings"][name] == pytest.approx(alone | {"n_unknown": gone[:, i].sum()})
    assert found["micro"]["auroc"] == pytest.approx(sk.roc_auc_score(LABELS[~gone], SCORES[~gone]))


def test_nothing_at_all_is_undefined():
    found = judge(SCORES[:, :1], np.full((N, 1), np.nan), ["x"])
    assert found["findings"]["x"]["n_unknown"] == N
    assert all(np.isnan(v) for k, v in found["findings"]["x"].items() if not k.startswith("n_"))
    assert found["macro"]["auroc"]["over"] == 0 and np.isnan(found["macro"]["auroc"]["value"])
    assert np.isnan(confusion(np.zeros(3, bool), np.array([1, 0, 0]))["ppv"])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (SCORES * 3, LABELS, "probabilities"),
        (np.where(SCORES > 0.5, np.nan, SCORES), LABELS, "not finite"),
        (SCORES, LABELS + 2, "labels must be"),
        (SCORES[1:], LABELS, "shape"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(scores, labels, message):
    with pytest.raises(CxrayError, match=message):
        judge(scores, labels, NAMES)
