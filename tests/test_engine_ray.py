"""The engine on Ray Train: a run from end to end, deaths of a worker and of a node, errors that reach a person."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import SOON_MISSED
from safetensors.torch import load_file
from toy_task import Net, Toy, toy_config, toy_data

from contracts.errors import CxrayError
from contracts.storage import Place
from trainers.engine import fit
from trainers.engine.context import Context, into
from trainers.engine.loop import train

TWO = {"workers": 2, "cpus": 0.5}
ELASTIC = {"checkpoint_steps": 1, "resources": {"workers": 2, "min_workers": 1, "cpus": 1}}


def unbroken(folder: Path, **settings: Any) -> dict[str, Any]:
    """The same run by one process, that nothing happens to."""
    data, task = toy_data(folder / "unbroken"), Toy()
    task.fit(data.small_columns("train", task.columns))
    cfg = toy_config(folder, **{**settings, "zero_stage": 0, "resources": {}})
    return train(Context(0, 1, torch.device("cpu"), into(folder / "unbroken" / "checkpoint")), task, cfg, data)


def same(run: Path, there: dict[str, Any]) -> None:
    """A finished run's metrics and weights are those of another."""
    said = json.loads((run / "metrics.json").read_text())
    assert len(said["epochs"]) == len(there["epochs"])
    for before, after in zip(there["epochs"], said["epochs"]):
        assert after == pytest.approx(before, rel=1e-5)
    ours = load_file(run / "model" / "model.safetensors")
    theirs = load_file(run.with_name("unbroken") / "checkpoint" / "weights.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.fault
def test_a_worker_that_dies_and_a_loss_that_is_nan_change_nothing(tmp_path: Path, local_ray: None):
    """In the first life a worker is killed at the fifth step, the second epoch's second; what four steps had made was safe, and is not
    made again. In the second the loss is NaN at the next but one: that is said in a sentence, without another try, and the same command
    goes on. (Fewer workers than before: test_engine_ranks.py.)"""
    settings = {"zero_stage": 2, "checkpoint_steps": 1}
    out, data, cfg = tmp_path / "run", toy_data(tmp_path / "data"), toy_config(tmp_path, **settings, resources=TWO)
    task = Toy(run=str(out), ends=[(5, "die"), (2, "nan")])
    with pytest.raises(CxrayError, match=r"^the loss is nan at step 2 of epoch 1: lower lr"):
        fit(task, cfg, data, Place(str(out)))
    done = fit(task, cfg, data, Place(str(out)))
    assert (tmp_path / "steps of rank 0").read_text().split() == ["1", "2", "3", "4", "5", "1", "2", "1"]
    same(out, unbroken(tmp_path, **settings))
    assert (done.steps, done.epochs) == (6, 2)
    assert "brier" in str(done)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))
    assert len(list((out / "checkpoints").glob("checkpoint_2*"))) <= cfg.keep_best + 1
    card = (out / "model" / "README.md").read_text()
    assert "For research, not for diagnosis." in card
    assert "| train | 50 |" in card
    network = Net()
    network.load_state_dict(load_file(out / "model" / "model.safetensors"))


def test_no_gpu_is_said_before_anything_starts(tmp_path: Path, local_ray: None):
    cfg = toy_config(tmp_path, resources={"gpus": 1})
    with pytest.raises(CxrayError, match=r"1 workers with 1 GPU each are asked for, and the cluster has 0"):
        fit(Toy(), cfg, toy_data(tmp_path / "data"), Place(str(tmp_path / "run")))
    with pytest.raises(CxrayError, match=r"9 workers with 0.5 CPU each"):
        cfg = toy_config(tmp_path, batch=18, micro_batch=2, resources={"workers": 9})
        fit(Toy(), cfg, toy_data(tmp_path / "other"), Place(str(tmp_path / "other run")))


@pytest.mark.fault
def test_a_node_lost_in_mid_epoch_changes_nothing(tmp_path: Path):
    """Two nodes with a worker each; one goes, and the other ends the run by itself."""
    soon = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4"}  # how long it waits for a node that does not come back
    process = subprocess.run([sys.executable, __file__, str(tmp_path)], env=soon, capture_output=True, text=True, timeout=480, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "steps of rank 0").read_text().split() == ["1", "2", "3", "4", "5", "1", "2"]
    assert (tmp_path / "steps of rank 1").read_text().split() == ["1", "2", "3", "4", "5"]
    same(tmp_path / "run", unbroken(tmp_path, **ELASTIC))


def lose_a_node(folder: Path) -> None:
    """A cluster of a head without CPUs and two nodes of one; the one where the worker of rank 1 is goes in the middle."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": SOON_MISSED})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    out = folder / "run"

    def lose() -> None:
        while not (folder / "ended 0").exists():
            time.sleep(0.05)
        gone = (folder / "ended 0").read_text()
        cluster.remove_node(next(n for n in nodes if n.node_id == gone), allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    fit(Toy(run=str(out), ends=[(5, "be lost")]), toy_config(folder, **ELASTIC), toy_data(folder / "data"), Place(str(out)))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    lose_a_node(Path(sys.argv[1]))
