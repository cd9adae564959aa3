"""The engine on two ranks, plain spawned processes over gloo, against one process."""

import json
import logging
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from toy_task import Cut, Toy, losses, run, toy_config, toy_data

from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.storage import Place
from trainers.engine import Data, loop
from trainers.engine.loop import schedule

# What two ranks are asked to do: name -> (settings, task, checkpoints until it is cut short, the name whose checkpoint it goes on from).
STAGES = (0, 1, 2, 3)
LOUD = 45.0  # so that float16's first two scales overflow, and the fourth does not
TWO = {"resources": {"workers": 2}, "epochs": 2}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None, str | None]] = {
    **{f"stage {s}": ({"zero_stage": s}, {}, None, None) for s in STAGES},
    **{f"cut {s}": ({"zero_stage": s, "checkpoint_steps": 2}, {}, 1, None) for s in STAGES},
    **{f"resumed {s}": ({"zero_stage": s, "checkpoint_steps": 2}, {}, None, f"cut {s}") for s in STAGES},
    "offload": ({"zero_stage": 2, "offload": True}, {}, None, None),
    "one forward": ({"zero_stage": 2, "micro_batch": 8}, {}, None, None),
    "noise": ({"zero_stage": 1}, {"noise": 0.3}, None, None),
    "norm": ({"zero_stage": 0}, {"frozen_norm": False}, None, None),
    "poison": ({"zero_stage": 2}, {"poison": 3}, None, None),
    "other model": ({"zero_stage": 2, "checkpoint_steps": 2}, {"wide": 3}, None, "cut 2"),
    "other stage": ({"zero_stage": 1, "checkpoint_steps": 2}, {}, None, "cut 2"),
    "more workers": ({"checkpoint_steps": 2}, {}, None, "one worker"),
    **{f"mdfnet {s}": ({"zero_stage": s}, {"fused": True}, None, None) for s in (0, 3)},
    # Last, because DeepSpeed keeps the precision for the process, which trains one model in life.
    "bf16": ({"zero_stage": 2, "precision": "bf16"}, {}, None, None),
    **{f"fp16 cut {s}": ({"zero_stage": s, "precision": "fp16", "checkpoint_steps": 2}, {"loud": LOUD}, 1, None) for s in STAGES},
    **{f"fp16 {s}": ({"zero_stage": s, "precision": "fp16", "checkpoint_steps": 2}, {"loud": LOUD}, None, f"fp16 cut {s}") for s in STAGES},
}


def rank_of_two(rank: int, world: int, folder: Path, jobs: dict[str, Any]) -> None:
    """A spawned process: all jobs, one after the other; rank 0 writes down what came of each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    data = toy_data_again(folder)
    for name, (settings, how, cut_after, source) in jobs.items():
        own = folder / name
        if source:
            shutil.copytree(folder / source, own, dirs_exist_ok=True) if rank == 0 else None
            torch.distributed.barrier()
        cfg = toy_config(folder, **TWO, **settings)
        try:
            said = run(own, Toy(**how), cfg, data, rank, world, cut_after, resume=own / "checkpoint" if source else None)
        except Cut:
            said = {}
        except CxrayError as error:
            said = {"error": str(error)}
        if rank == 0:
            own.mkdir(exist_ok=True)
            (own / "said.json").write_text(json.dumps(said))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def toy_data_again(folder: Path) -> Data:
    """What `toy_data` made, opened in another process."""
    places = [Place(str(folder / "data" / n)) for n in ("vectors", "tokens")]
    first, second = (open_dataset(p) for p in places)
    table = pq.read_table(folder / "data" / "labels.parquet")
    return Data(first.table(["row_id", "group_id", "split"]), (first, second), (table,))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    data = toy_data(folder / "data")
    pq.write_table(data.small[0], folder / "data" / "labels.parquet")
    with pytest.raises(Cut):
        run(folder / "one worker", Toy(), toy_config(folder, checkpoint_steps=2), data, cut_after=1)
    torch.multiprocessing.spawn(  # pyright: ignore[reportPrivateImportUsage]
        rank_of_two, (2, folder, JOBS), nprocs=2
    )
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same by plain PyTorch in one process, a global batch in one forward pass."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(folder, Toy(), toy_config(folder, micro_batch=16), toy_data(folder / "data"))


def said(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "said.json").read_text())


@pytest.mark.parametrize(
    "name", [*(f"stage {s}" for s in STAGES), *(f"resumed {s}" for s in STAGES), "more workers", "offload", "one forward"]
)
def test_two_ranks_train_as_one_process_does(name: str, two_ranks: Path, alone: tuple[Path, dict[str, Any]]):
    """ZeRO 0 to 3, with gradients accumulated and labels masked; cut in mid-epoch and resumed as well, also by one worker and by two."""
    there, (folder, here) = said(two_ranks, name), alone
    assert len(losses(here)) == 6
    np.testing.assert_allclose(losses(there), losses(here), rtol=2e-6)
    for before, after in zip(here["epochs"], there["epochs"]):
        assert after == pytest.approx(before, rel=1e-5)
    norms = [[s["grad_norm"] for s in at["steps"]] for at in (here, there)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
    assert min(norms[0]) > 0.1  # so that the clipping was at work
    ours, theirs = (load_file(f / "checkpoint" / "weights.safetensors") for f in (folder, two_ranks / name))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_augmentation_is_of_the_row_not_of_the_rank(two_ranks: Path, alone: tuple[Path, dict[str, Any]]):
    folder = alone[0]
    here = run(folder / "noise", Toy(noise=0.3), toy_config(folder, micro_batch=16), toy_data(folder / "again"))
    np.testing.assert_allclose(losses(said(two_ranks, "noise")), losses(here), rtol=2e-6)
    assert max(abs(np.subtract(losses(here), losses(alone[1])))) > 1e-3


def test_the_fusion_network_begins_and_trains_on_two_ranks_as_in_one_process(two_ranks: Path, alone: tuple[Path, dict[str, Any]]):
    folder = alone[0]
    here = losses(run(folder / "fused", Toy(fused=True), toy_config(folder, micro_batch=16), toy_data(folder / "fused data")))
    for stage in (0, 3):
        np.testing.assert_allclose(losses(said(two_ranks, f"mdfnet {stage}")), here, rtol=1e-5)


def test_float16_finds_its_scale_and_keeps_it_at_every_stage(two_ranks: Path, alone: tuple[Path, dict[str, Any]]):
    """A step that overflows is left out, and the next scale is half of it, also after a resume; else gradients are as ever, and clipped."""
    folder = alone[0]
    cfg = toy_config(folder, micro_batch=16, precision="fp16")
    here = run(folder / "loud", Toy(loud=LOUD), cfg, toy_data(folder / "loud data"))
    expected = [s["grad_norm"] for s in here["steps"]]
    for stage in STAGES:
        there = said(two_ranks, f"fp16 {stage}")
        scales, norms = ([s[name] for s in there["steps"]] for name in ("scale", "grad_norm"))
        fine = np.isfinite(norms)
        assert not fine[:2].any() and fine.sum() >= 3
        assert scales == [2.0 ** (16 - (~fine[:i]).sum()) for i in range(6)]
        np.testing.assert_allclose(np.array(norms)[fine], np.array(expected)[fine], rtol=0.05)
        np.testing.assert_allclose(losses(there), losses(here), rtol=0.03)


def test_half_precision_and_batch_norm_in_training_on_two_ranks(two_ranks: Path, alone: tuple[Path, dict[str, Any]]):
    half = losses(said(two_ranks, "bf16"))
    np.testing.assert_allclose(half, losses(alone[1]), rtol=0.02)
    assert half != pytest.approx(losses(alone[1]), rel=1e-6)  # it did compute in it
    assert all(math.isfinite(x) for x in losses(said(two_ranks, "norm")))
    buffers = load_file(two_ranks / "norm" / "checkpoint" / "weights.safetensors")
    assert buffers["body.1.running_mean"].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("poison", "the loss is nan at step 2 of epoch 0: lower lr"),
        ("other model", "the last checkpoint is of another model"),
        ("other stage", "the last checkpoint was written with zero_stage 2: set it back"),
    ],
)
def test_two_ranks_say_what_is_wrong(name: str, sentence: str, two_ranks: Path):
    assert said(two_ranks, name)["error"].startswith(sentence)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fewer_workers_than_wrote_the_checkpoint(stage: int, two_ranks: Path):
    cfg = toy_config(two_ranks, zero_stage=stage, checkpoint_steps=2)
    with pytest.raises(CxrayError, match=f"written by 2 workers at ZeRO stage {stage}.* now there are 1: set resources.workers to 2"):
        run(two_ranks, Toy(), cfg, toy_data_again(two_ranks), resume=two_ranks / f"cut {stage}" / "checkpoint")


def test_one_worker_goes_on_from_many_at_stage_0(two_ranks: Path, monkeypatch: pytest.MonkeyPatch):
    """With DeepSpeed, whose checkpoint it is. (That DeepSpeed can: test_engine_ray.py, where a node is lost.)"""

    class Asked(Exception):
        pass

    def sharded(*_: Any) -> None:
        raise Asked

    monkeypatch.setattr(loop, "Sharded", sharded)
    with pytest.raises(Asked):
        run(two_ranks, Toy(), toy_config(two_ranks, checkpoint_steps=2), toy_data_again(two_ranks), resume=two_ranks / "cut 0/checkpoint")


def test_the_rate_is_the_schedule_s_also_after_a_resume(tmp_path: Path, two_ranks: Path):
    expected = [0.02 * schedule(step, 6, 0.05) for step in range(6)]
    for at in (run(tmp_path, Toy(), toy_config(tmp_path), toy_data(tmp_path / "data")), said(two_ranks, "resumed 2")):
        assert [s["lr"] for s in at["steps"]] == pytest.approx(expected)
