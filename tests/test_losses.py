"""Labels under each policy, and the losses on them: against torch's, torchvision's, and numbers worked by hand."""

from math import log

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss
from toy_task import Toy

from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from trainers.losses import LossConfig, combined, focal, pos_weight, weighted_bce
from trainers.targets import Policy, label_columns, targets

EDEMA, NONE, DEVICES = (FINDINGS.index(f) for f in ("Edema", "No Finding", "Support Devices"))
NAN = float("nan")


def cohort(*studies: dict[str, int | None] | None) -> pa.Table:
    """Findings that are not named are blank; None is a study without a label row."""
    columns: dict[str, pa.Array] = {label_column(f): pa.array([(s or {}).get(f) for s in studies], pa.int8()) for f in FINDINGS}
    return pa.table({"label_row": pa.array([s is not None for s in studies], pa.bool_()), **columns})


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"uncertain": "u-zeros"}, [1, 0, 0, 0]),
        ({"uncertain": "u-ones"}, [1, 0, 1, 0]),
        ({"uncertain": "u-ignore"}, [1, 0, NAN, 0]),
        ({"uncertain": "u-soft"}, [1, 0, 0.7, 0]),
        ({"uncertain": "u-soft", "soft": (0.0, 0.3)}, [1, 0, 0.15, 0]),
        ({"uncertain": "u-ones", "blank": "ignore"}, [1, 0, 1, NAN]),
    ],
)
def test_the_four_states_under_a_policy(policy, expected):
    found = targets(cohort({"Edema": 1}, {"Edema": 0}, {"Edema": -1}, {}), Policy(**policy))
    np.testing.assert_allclose(found.target[:, EDEMA], expected, rtol=1e-6)
    assert found.mask[:, EDEMA].tolist() == [e == e for e in expected]
    assert found.soft[:, EDEMA].tolist() == [e not in (0, 1) and e == e for e in expected]
    assert found.target.dtype == np.float32 and found.mask.dtype == bool


@pytest.mark.parametrize("uncertain", ["u-zeros", "u-ones", "u-ignore", "u-soft"])
@pytest.mark.parametrize("blank", ["zero", "ignore"])
def test_a_study_without_a_label_row_is_unknown_under_every_policy(uncertain, blank):
    found = targets(cohort(None, {"Edema": 1}), Policy(uncertain=uncertain, blank=blank))
    assert not found.mask[0].any() and np.isnan(found.target[0]).all()
    assert found.mask[1, EDEMA]


def test_no_finding_has_zeros_though_nobody_wrote_them():
    studies = cohort({"No Finding": 1}, {"Edema": 1}, {"Edema": -1}, {"Edema": 0}, {"Support Devices": 1}, {}, None)
    ignore = targets(studies, Policy(blank="ignore")).target[:, NONE]
    np.testing.assert_array_equal(ignore, [1, 0, 0, NAN, NAN, NAN, NAN])
    zero = targets(studies, Policy(blank="zero")).target[:, NONE]
    np.testing.assert_array_equal(zero, [1, 0, 0, 0, 0, 0, NAN])
    # ... and where only No Finding is trained, it still hangs on the others.
    alone = targets(studies, Policy(blank="ignore"), ["No Finding"]).target
    np.testing.assert_array_equal(alone[:, 0], ignore)


def test_findings_keep_the_order_asked_for():
    both = targets(cohort({"Edema": 1, "Support Devices": 0}), Policy(), ["Support Devices", "Edema"])
    assert both.target.tolist() == [[0, 1]]


def test_a_batch_of_nulls_only_and_one_of_no_rows():
    assert targets(cohort({}, {}), Policy(blank="ignore")).mask.sum() == 0
    assert targets(cohort(), Policy()).target.shape == (0, 14)
    assert set(cohort().column_names) == set(label_columns())


def test_a_policy_has_a_name_for_the_result():
    assert Policy().name == "u-ignore, blank zero"
    assert Policy(uncertain="u-soft", soft=(0, 0.3), blank="ignore").name == "u-soft 0 to 0.3, blank ignore"
    with pytest.raises(ValidationError, match="range"):
        Policy(soft=(0.9, 0.2))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits, hard targets, mask [12, 14] and pos_weight [14]."""
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(12, 14, generator=rng)
    target = (torch.rand(12, 14, generator=rng) < 0.3).float()
    mask = torch.rand(12, 14, generator=rng) < 0.7
    return logits, target, mask, 1 + 9 * torch.rand(14, generator=rng)


def test_as_torch_and_torchvision(batch):
    logits, target, mask, weight = batch
    expected = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    torch.testing.assert_close(weighted_bce(logits, target, mask, weight), expected * mask)
    for alpha, gamma in ((0.25, 2.0), (0.75, 0.5), (None, 1.0), (None, 0.0)):
        expected = sigmoid_focal_loss(logits, target, -1 if alpha is None else alpha, gamma)
        torch.testing.assert_close(focal(logits, target, mask, gamma, alpha), expected * mask)


def test_worked_by_hand():
    # p = 0.75, so that the loss of a positive is -log 3/4 and that of a negative -log 1/4.
    logits, mask = torch.full((1, 3), log(3)), torch.ones(1, 3, dtype=torch.bool)
    target, weight = torch.tensor([[1.0, 0.0, 0.7]]), torch.tensor([4.0, 4.0, 1.0])
    hit, miss = log(4 / 3), log(4)
    bce = weighted_bce(logits, target, mask, weight)
    torch.testing.assert_close(bce, torch.tensor([[4 * hit, miss, 0.7 * hit + 0.3 * miss]]))
    two = focal(logits, target, mask, gamma=2.0, alpha=0.25)
    positive, negative = 0.25 * hit / 16, 0.75 * miss * 9 / 16
    torch.testing.assert_close(two, torch.tensor([[positive, negative, 0.7 * positive + 0.3 * negative]]))
    torch.testing.assert_close(combined(LossConfig(), logits, target, mask, weight), 0.7 * bce + 0.3 * two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_logits_of_ten_thousand_overflow_nothing(dtype, gamma):
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4, 1e4, 0.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.7, 0.5]])
    mask, weight = torch.ones_like(target, dtype=torch.bool), torch.ones(6)
    big = -logits[0, 1].item()  # 9984 in bfloat16
    losses = combined(LossConfig(bce=1, focal=1, gamma=gamma, alpha=None), logits, target, mask, weight)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses[0, :5], torch.tensor([0, 0, 2 * big, 2 * big, 0.6 * big]))
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[0, 2] > 0 > logits.grad[0, 3], "a confident mistake must still be pushed back"
    assert (logits.grad[0, :2] == 0).all()


def test_a_masked_label_has_no_loss_and_no_gradient_whatever_stands_in_its_place(batch):
    logits, target, mask, weight = batch
    cfg = LossConfig()
    clean = logits.clone().requires_grad_()
    combined(cfg, clean, target, mask, weight).sum().backward()
    spoilt = torch.where(mask, logits, 1e4).requires_grad_()
    losses = combined(cfg, spoilt, torch.where(mask, target, NAN), mask, weight)
    losses.sum().backward()
    assert clean.grad is not None and spoilt.grad is not None
    assert (losses[~mask] == 0).all() and (spoilt.grad[~mask] == 0).all()
    assert torch.equal(spoilt.grad, clean.grad) and (clean.grad[mask] != 0).all()


def test_a_batch_without_a_label_has_loss_zero(batch):
    logits, _, mask, weight = batch
    assert not combined(LossConfig(), logits, torch.full_like(logits, NAN), torch.zeros_like(mask), weight).any()


def test_a_step_in_one_batch_equals_one_in_two_uneven_parts(batch):
    """What a step accumulates. (Parts on two ranks: test_engine_ranks.py.)"""
    logits, target, mask, weight = batch
    mask[:4] = False  # the first part has few labels: a mean of means would not do

    class Weighed(Toy):
        def loss(self, model, batch) -> Tensor:
            return combined(LossConfig(), model(batch["x"]), batch["y"], batch["mask"], weight).sum()

    def step(*parts: slice) -> tuple[float, Tensor]:
        x = logits.clone().requires_grad_()
        micros = [{"x": x[part], "y": target[part], "mask": mask[part]} for part in parts]
        loss = Weighed().step(lambda x: x, micros, lambda loss: loss.backward())["loss"]
        assert x.grad is not None
        return loss, x.grad

    (one, grad), (two, same) = step(slice(None)), step(slice(5), slice(5, None))
    assert two == pytest.approx(one, rel=1e-6)
    torch.testing.assert_close(same, grad)
    assert (step(slice(5))[0] + step(slice(5, None))[0]) / 2 != pytest.approx(one, rel=1e-2)


def test_pos_weight_is_negatives_by_positives_of_known_labels_and_capped():
    target = np.array([[1, 1, 0.7], [0, 0, 0], [0, 0, 0], [NAN, 0, 0], [NAN, 0, NAN]], np.float32)
    found = pos_weight(target, ~np.isnan(target), ["a", "b", "c"], cap=3.5)
    np.testing.assert_allclose(found, [2, 3.5, 3.5])
    np.testing.assert_allclose(pos_weight(target, ~np.isnan(target), ["a", "b", "c"], cap=20), [2, 4, 3.3 / 0.7], rtol=1e-6)


def test_a_finding_with_one_class_is_named_before_training():
    rows = cohort({"Edema": 1, "Fracture": 0}, {"Edema": 0, "Fracture": -1})
    asked = ["Edema", "Fracture"]
    found = targets(rows, Policy(), asked)
    with pytest.raises(CxrayError, match=r"no positives in train for Fracture: .*leave it out by `findings:`.*policy"):
        pos_weight(found.target, found.mask, asked, cap=20)
    found = targets(rows, Policy(uncertain="u-ones"), asked)
    assert pos_weight(found.target, found.mask, asked, cap=20).tolist() == [1, 1]
    with pytest.raises(CxrayError, match="no negatives in train for Edema"):
        pos_weight(found.target[:1, :1], found.mask[:1, :1], ["Edema"], cap=20)


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="no loss to train on"):
        LossConfig(bce=0, focal=0)
