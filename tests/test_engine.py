"""The engine without Ray: one process. (Two: test_engine_ranks.py.)"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator
from toy_task import LABELS, Cut, Net, Toy, losses, run, toy_config, toy_data

from contracts.config import load
from contracts.errors import CxrayError
from contracts.storage import Place
from trainers.engine import Data, TrainerConfig, dry_run, fit, watch
from trainers.engine.board import curves
from trainers.engine.context import Context
from trainers.engine.loop import schedule
from trainers.engine.plain import load_weights
from trainers.engine.run import check_cluster, export


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return toy_data(tmp_path / "data")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_that_was_cut_ends_as_an_unbroken_one(precision: str, tmp_path: Path, data: Data):
    cfg = toy_config(tmp_path, checkpoint_steps=2, precision=precision, epochs=3)
    whole = run(tmp_path / "whole", Toy(noise=0.1), cfg, data)
    with pytest.raises(Cut):
        run(tmp_path / "cut", Toy(noise=0.1), cfg, data, cut_after=3)
    rest = run(tmp_path / "cut", Toy(noise=0.1), cfg, data, resume=tmp_path / "cut" / "checkpoint")
    assert losses(rest) == losses(whole)
    assert rest["epochs"] == whole["epochs"]
    again = Toy()
    assert run(tmp_path / "cut", again, cfg, data, resume=tmp_path / "cut" / "checkpoint")["over"]
    assert again.steps == 0  # there was nothing left to do


def test_stops_when_nothing_gets_better_and_keeps_the_best(tmp_path: Path, data: Data):
    class Fixed(Toy):
        said = iter([0.5, 0.3, 0.2, 0.2, math.nan, 0.1])

        def metrics(self, predictions: Any) -> dict[str, float]:
            return {"brier": next(self.said)}

    at = run(tmp_path, Fixed(), toy_config(tmp_path, epochs=9, patience=2), data)  # the first is asked for before training
    assert [e["epoch"] for e in at["epochs"]] == [0, 1, 2, 3]
    assert (at["best_epoch"], at["best"], at["over"]) == (1, {"brier": 0.2}, True)
    scores = [m["score"] for m in at["reported"]]
    assert sorted(range(4), key=scores.__getitem__) == [3, 0, 2, 1]  # by which checkpoints are kept: NaN is worst, of equals the first
    stored = json.loads((tmp_path / "checkpoint" / "position.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    assert stored["position"]["epochs"][3]["brier"] is None
    again = run(tmp_path, Fixed(), toy_config(tmp_path, epochs=9, patience=2), data, resume=tmp_path / "checkpoint")
    assert math.isnan(again["epochs"][3]["brier"])


def test_a_metric_that_is_undefined_decides_nothing(tmp_path: Path, data: Data):
    class Undefined(Toy):
        def metrics(self, predictions: Any) -> dict[str, float]:
            return {"brier": math.nan}

    with pytest.raises(CxrayError, match="metric brier is undefined on the validate split"):
        run(tmp_path, Undefined(), toy_config(tmp_path), data)
    assert not (tmp_path / "checkpoint").exists()


def test_a_node_that_is_about_to_go_is_saved_from_once(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch):
    """It is announced from the second step of five on, another one from the fourth on."""
    monkeypatch.setattr(watch, "LOOK_S", 0.0)  # look after every step
    announced = iter([(), ("a",), ("a",), ("a", "b"), ("a", "b")])
    at = run(tmp_path, Toy(), toy_config(tmp_path, epochs=1, batch=10, micro_batch=5), data, leaving=lambda: next(announced))
    assert [m["step"] for m in at["reported"]] == [2, 4, 0]


def test_how_often_is_looked_whether_a_node_is_about_to_go():
    looks = []
    seen = watch.Watch(Context(0, 1, torch.device("cpu"), lambda *_: None, leaving=lambda: looks.append(step) or ()))
    for step in range(1, 59):
        seen.announced(1.0 if step < 12 else 0.01 if step < 37 else 6.0)
    assert looks == [1, 6, 11, 16, 36, 56, 57, 58]  # after 5 seconds as the steps before went, and after 20 steps at most


def test_a_batch_without_a_label_teaches_nothing():
    task, net = Toy(), Net()
    task.pos_weight = torch.ones(LABELS)
    batch = {"x": torch.randn(4, 10), "y": torch.zeros(4, LABELS), "mask": torch.zeros(4, LABELS)}
    assert task.step(net, [batch], lambda loss: loss.backward()) == {"loss": 0.0}
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_rate_rises_then_falls_to_nothing():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.0, 10))
    assert rates[10] == 1.0
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[55] == pytest.approx(0.5)
    assert schedule(99, 100, 0.1) < 0.001
    assert schedule(0, 100, 0.0) == 1.0


def test_groups_leave_biases_and_norms_without_decay():
    net = Net()
    net.head.weight.requires_grad_(False)
    deep, flat = Toy().groups(net)
    assert [tuple(p.shape) for p in deep["params"]] == [(16, 10)]
    assert flat["weight_decay"] == 0
    assert sum(len(g["params"]) for g in (deep, flat)) == sum(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"micro_batch": 9, "resources": {"workers": 2}}, "micro_batch 9 on 2 workers is more than batch 16"),
        ({"batch": 5, "micro_batch": 1, "resources": {"workers": 2}}, "batch 5 cannot be shared out to 2 workers"),
        ({"zero_stage": 2, "resources": {"workers": 2, "min_workers": 1}}, "needs zero_stage 0"),
        ({"resources": {"workers": 1, "min_workers": 2}}, "min_workers 2 is more than resources.workers 1"),
        ({"offload": True}, "offload needs zero_stage"),
        ({"precision": "bf17"}, "precision"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], sentence: str):
    with pytest.raises(CxrayError, match=sentence):
        load(TrainerConfig, {"batch": 16, "micro_batch": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "how", "sentence"),
    [
        ({"metric": "auroc"}, {}, "metric 'auroc' is none of this task's: brier, rows"),
        ({"batch": 64}, {}, "the train split has 50 rows, fewer than one batch of 64"),
        ({"micro_batch": 1}, {"frozen_norm": False}, "batch norm needs at least two rows"),
        ({"activation_checkpointing": True}, {}, "activation_checkpointing: Net cannot"),
        ({"resources": {"gpus": 1}}, {}, "resources.gpus asks for a GPU"),
    ],
)
def test_said_before_the_first_step(settings: dict[str, Any], how: dict[str, Any], sentence: str, tmp_path: Path, data: Data):
    for go in (lambda t, c: run(tmp_path, t, c, data), lambda t, c: dry_run(t, c, data)):
        with pytest.raises(CxrayError, match=sentence):
            go(Toy(**how), toy_config(tmp_path, **settings))
    assert not (tmp_path / "checkpoint").exists()


def test_weights_of_another_model(tmp_path: Path, data: Data):
    run(tmp_path, Toy(), toy_config(tmp_path, epochs=1), data)
    load_weights(Net(), tmp_path / "checkpoint" / "weights.safetensors")
    with pytest.raises(CxrayError, match="holds the weights of another model"):
        load_weights(Net(wide=3), tmp_path / "checkpoint" / "weights.safetensors")


def test_a_folder_with_another_run(tmp_path: Path, data: Data):
    out = Place(str(tmp_path / "run"))
    out_file = out / "_begun.json"
    out_file.write(json.dumps({"fingerprint": "another"}).encode())
    with pytest.raises(CxrayError, match="holds a run with other settings or of other data"):
        fit(Toy(), toy_config(tmp_path), data, out)
    assert not (out / "_lease").exists()


def test_a_gradient_that_no_scale_helps_is_said(tmp_path: Path):
    """Else every step would be left out, for ever."""

    class Endless(Toy):
        def step(self, model: Any, micros: Any, backward: Any) -> dict[str, float]:
            return super().step(model, micros, lambda loss: backward(loss * math.inf))

    with pytest.raises(CxrayError, match=r"the gradient is (nan|inf) at step 1 of epoch 5: lower lr"):
        run(tmp_path, Endless(), toy_config(tmp_path, precision="fp16", epochs=9), toy_data(tmp_path / "data"))


def test_tensorboard_and_curves(tmp_path: Path, data: Data):
    at = run(tmp_path, Toy(), toy_config(tmp_path), data, board=Place(str(tmp_path / "board")))
    seen = event_accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.value for e in seen.Scalars("train/loss")] == pytest.approx(losses(at))
    assert [e.value for e in seen.Scalars("validate/brier")] == pytest.approx([e["brier"] for e in at["epochs"]])
    assert curves(at["steps"], at["epochs"], "brier").startswith(b"\x89PNG")


def test_dry_run_says_what_it_saw(tmp_path: Path, data: Data):
    seen = dry_run(Toy(), toy_config(tmp_path, zero_stage=3, resources={"workers": 2}), data)
    assert seen.shapes["x"] == "float32 [4, 10]"
    assert seen.parameters["total"] == (259, 259)
    assert seen.parameters["head"] == (51, 51)
    assert seen.exported == ["config.json", "model.safetensors"]
    assert seen.metrics["rows"] == 4
    text = str(seen)
    assert all(
        word in text for word in ("x: float32 [4, 10]", "total                           259            259", "loss", "checkpoint", "GB")
    )
    assert not (tmp_path / "cache").exists()
    with pytest.raises(CxrayError, match="the loss is nan at step 0"):
        dry_run(Toy(poison=1), toy_config(tmp_path), data)
    with pytest.raises(CxrayError, match="batch 6 on 2 workers in micro-batches of 2 leaves one"):  # on one worker it would not
        dry_run(Toy(frozen_norm=False), toy_config(tmp_path, batch=6, micro_batch=2, resources={"workers": 2}), data)
    with pytest.raises(CxrayError, match="no classes to balance"):
        dry_run(Toy(), toy_config(tmp_path, sampling="balanced"), data)


def test_a_gpu_whose_memory_is_full(tmp_path: Path, data: Data):
    class Large(Toy):
        def loss(self, model: Any, batch: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with pytest.raises(CxrayError, match=r"^the GPU's memory is full: lower micro_batch \(4\)"):
        dry_run(Large(), toy_config(tmp_path), data)


def test_a_model_that_was_written_by_half_is_none(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch):
    cfg, out, write = toy_config(tmp_path, epochs=1), Place(str(tmp_path / "run")), Place.write
    run(tmp_path, Toy(), cfg, data)
    weights = tmp_path / "checkpoint" / "weights.safetensors"
    export(Toy(), cfg, weights, out, "a card")
    assert sorted(p.name for p in (tmp_path / "run" / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]

    def full(self: Place, content: bytes) -> None:
        if self.name == "model.safetensors":
            raise OSError("no space left")
        write(self, content)

    monkeypatch.setattr(Place, "write", full)
    with pytest.raises(OSError):
        export(Toy(), cfg, weights, out, "a card")
    assert not (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("have", "settings", "sentence"),
    [
        ({"CPU": 8.0}, {"resources": {"gpus": 1}}, "1 workers with 1 GPU each are asked for, and the cluster has 0"),
        ({"CPU": 2.0}, {"resources": {"workers": 3, "cpus": 1}}, "3 workers with 1 CPU each are asked for, and the cluster has 2"),
        (
            {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0},
            {"precision": "bf16", "resources": {"gpus": 1}},
            "precision bf16: the cluster's T4 cannot compute in it; set precision fp16 or fp32",
        ),
    ],
)
def test_what_the_cluster_has_not(have: dict[str, float], settings: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(CxrayError, match=sentence):
        check_cluster(toy_config(tmp_path, batch=18, **settings), have)
    check_cluster(toy_config(tmp_path, batch=18, **settings), {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0})
