"""The sweep: its space is read strictly, best.yaml is what won and trains as it stands, and a sweep that was cut short goes on."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chaos
import pyarrow.parquet as pq
import pytest
import yaml
from test_ablate import thirty
from toy_task import Toy, toy_config, toy_data

from contracts.config import load
from contracts.errors import CxrayError
from contracts.storage import Place
from trainers import sweep
from trainers.engine import TrainerConfig, fit
from trainers.engine.patches import free, named_after, telling_tune
from trainers.losses import LossConfig
from trainers.sources import FusionConfig
from trainers.space import Between, OneOf
from trainers.sweep import SweepConfig, Trial, finish, scheduler, search, study

SPACE = {
    "loss.gamma": {"low": 0, "high": 4.0},
    "training.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "training.batch": {"choices": [64, 128]},
    "network.drop_text": {"low": 0.0, "high": 0.5},
}


def config(out: Path, **settings: Any) -> SweepConfig:
    training = {"metric": "macro_auroc", "mode": "max", "batch": 64, "epochs": 4, **settings.pop("training", {})}
    return load(SweepConfig, {"out": str(out), "space": SPACE, "training": training, **settings})


# ---- settings ----


@pytest.mark.parametrize(
    ("key", "span", "told"),
    [
        ("loss.gama", {"low": 0, "high": 1}, r"loss\.gama.*no such setting"),
        ("loss.gamma", {"low": -1, "high": 1}, r"loss\.gamma`, -1.*greater than or equal to 0"),
        ("loss.gamma", {"low": 2, "high": 1}, "the lower end first"),
        ("training.lr", {"low": 0, "high": 1, "log": True}, "above 0 where log is true"),
        ("training.batch", {"choices": [32, 64]}, "micro_batch 64 on 1 workers is more than batch 32"),
        ("training.batch", {"choices": [64]}, "at least 2"),
        ("training.lr", {"low": 1e-4, "hihg": 1e-2}, "hihg"),
    ],
)
def test_a_space_that_no_training_could_take_is_refused(tmp_path: Path, key: str, span: dict[str, Any], told: str):
    with pytest.raises(CxrayError, match=told):
        config(tmp_path, space={key: span})


def test_a_sweep_needs_a_space(tmp_path: Path):
    with pytest.raises(CxrayError, match="`space`"):
        config(tmp_path, space={})


def test_ranges_and_choices_reach_optuna_as_what_they_are(tmp_path: Path):
    cfg = config(tmp_path)
    assert isinstance(cfg.space["training.lr"], Between)
    assert isinstance(cfg.space["training.batch"], OneOf)
    told = {key: str(span.distribution()) for key, span in cfg.space.items()}
    assert told["training.lr"].startswith("FloatDistribution(high=0.01, log=True, low=0.0001")
    assert told["loss.gamma"].startswith("FloatDistribution(high=4.0, log=False, low=0.0")
    assert told["training.batch"] == "CategoricalDistribution(choices=(64, 128))"
    assert str(Between(low=1, high=9).distribution()).startswith("IntDistribution")


def test_the_first_trial_has_the_configs_own_values_where_the_space_holds_them(tmp_path: Path):
    assert config(tmp_path).own() == {"loss.gamma": 2.0, "training.lr": 1e-3, "training.batch": 64, "network.drop_text": 0.3}
    assert config(tmp_path, training={"lr": 1.0}).own() == {}


def test_a_trial_differs_from_the_config_in_the_space_alone(tmp_path: Path):
    cfg = config(tmp_path, loss={"bce": 0.5}, cohort="another")
    one = cfg.with_values({"loss.gamma": 3.5, "training.batch": 128}, into="sweep/trials/x")
    assert type(one) is FusionConfig
    assert (one.loss.gamma, one.loss.bce, one.training.batch, one.training.epochs, one.cohort, one.into) == (
        *(3.5, 0.5, 128, 4),
        *("another", "sweep/trials/x"),
    )


# ---- what is left of a sweep ----


def values(gamma: float, lr: float = 1e-3, batch: int = 64) -> dict[str, Any]:
    return {"loss.gamma": gamma, "training.lr": lr, "training.batch": batch, "network.drop_text": 0.1}


TRIALS = [
    Trial("a", values(2.0), 0.80, 4, 10.0, "finished"),
    Trial("b", values(0.5, batch=128), 0.86, 2, 5.0, "stopped"),
    Trial("c", values(1.0, 5e-3), 0.84, 4, 10.0, "finished"),
    Trial("d", {}, None, 0, 1.0, "failed"),
]


def test_best_yaml_is_what_won_and_train_takes_it_as_it_is(tmp_path: Path):
    cfg = config(tmp_path, loss={"bce": 0.5})
    done = finish(cfg, TRIALS)
    best = load(FusionConfig, tmp_path / "sweep/best.yaml")
    assert best == cfg.with_values(TRIALS[1].values, into="sweep-best")
    assert (best.loss.gamma, best.training.batch, best.loss.bce) == (0.5, 128, 0.5)
    assert (done.best, done.states) == (TRIALS[1], {"finished": 2, "stopped": 1, "failed": 1})
    assert "0.8600" in str(done)
    assert json.loads((tmp_path / "sweep/run.json").read_text())["summary"]["best"]["id"] == "b"


def test_where_lower_is_better_the_lowest_wins(tmp_path: Path):
    done = finish(config(tmp_path, training={"mode": "min"}), TRIALS)
    assert done.best.id == "a"
    assert study(config(tmp_path, training={"mode": "min"}), TRIALS).best_value == 0.80


def test_the_table_and_the_page_hold_every_trial(tmp_path: Path):
    finish(config(tmp_path), TRIALS)
    rows = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [r["id"] for r in rows] == ["b", "c", "a", "d"]
    assert rows[0]["loss.gamma"] == 0.5
    assert rows[3]["macro_auroc"] is rows[3]["loss.gamma"] is None
    page = (tmp_path / "sweep/report.html").read_text()
    assert page.count("data:image/png") == 2, "parallel coordinates and importance"
    assert "For research, not for diagnosis." in page


def test_a_lone_trial_leaves_a_page_without_pictures(tmp_path: Path):
    finish(config(tmp_path), TRIALS[:1])
    assert "data:image/png" not in (tmp_path / "sweep/report.html").read_text()


def test_a_sweep_of_failures_says_so(tmp_path: Path):
    with pytest.raises(CxrayError, match="all 1 trials failed"):
        finish(config(tmp_path), TRIALS[3:])


def test_who_reached_the_last_epoch_is_not_stopped_there(tmp_path: Path):
    """Epoch 6 would be a rung, and the last trial to come there the worst."""
    asha = scheduler(config(tmp_path, grace=2, reduction=3, training={"epochs": 6}))
    asha.set_search_properties("macro_auroc", "max")
    good, late, bad = (SimpleNamespace(trial_id=id) for id in "abc")

    def say(trial: Any, epoch: int, value: float) -> str:
        return asha.on_trial_result(None, trial, {"epoch": epoch, "macro_auroc": value})

    for trial in (good, late, bad):
        asha.on_trial_add(None, trial)
    assert {say(trial, epoch, 0.9) for trial in (good, late) for epoch in (1, 2, 3)} == {"CONTINUE"}
    assert say(bad, 2, 0.1) == "STOP"
    assert say(good, 6, 0.9) == say(late, 6, 0.2) == "CONTINUE"
    assert scheduler(config(tmp_path, grace=4, training={"epochs": 4})) is None, "each trial gets four"


# ---- with Ray Tune ----


def parabola(values: dict[str, Any], cfg: SweepConfig) -> dict[str, Any]:
    """Best at gamma 1. The third trial fails."""
    from ray import tune

    ran = list(Path(cfg.out).glob("ran-*"))
    (Path(cfg.out) / f"ran-{tune.get_context().get_trial_id()}-{len(ran)}").touch()
    if len(ran) == 2:
        raise RuntimeError("a slip")
    value = 1 - abs(values["loss.gamma"] - 1) / 4
    for epoch in range(1, 4):
        tune.report({"macro_auroc": value * epoch / 4, "epoch": epoch})
    return {"macro_auroc": value, "epoch": 4, "ended": True}


def test_a_search_tries_its_own_values_first_survives_a_failure_and_is_not_done_twice(tmp_path: Path, local_ray: None):
    cfg = config(tmp_path, trials=4, concurrent=1, space={"loss.gamma": SPACE["loss.gamma"]}, grace=4)
    found = search(cfg, parabola)
    assert sorted(t.state for t in found) == ["failed", "finished", "finished", "finished"]
    assert any(t.values == {"loss.gamma": 2.0} and t.value == 0.75 for t in found)
    assert [(t.id, t.state, t.value) for t in search(cfg, parabola)] == [(t.id, t.state, t.value) for t in found]
    assert len(list(tmp_path.glob("ran-*"))) == 4
    assert finish(cfg, found).best.value == max(t.value or 0 for t in found)


class Hopeless(Toy):
    """Learns nothing, and its second epoch has no end that a test would wait for."""

    def step(self, model: Any, micros: Any, backward: Any) -> dict[str, float]:
        done, begun = super().step(model, micros, backward), time.monotonic()
        while self.steps > STEPS and time.monotonic() < begun + chaos.LONGEST:
            time.sleep(0.05)
        return done


STEPS = 3  # an epoch of the toy's fifty rows has


def first_is_best(values: dict[str, Any], cfg: SweepConfig) -> dict[str, Any] | None:
    """The config's own values are as good as can be; a trial with others trains, and none of them gets anywhere."""
    from ray import tune

    if values == cfg.own():
        for epoch in (1, 2):
            tune.report({"brier": 0.0, "epoch": epoch})
        return None
    folder = Path(cfg.out) / tune.get_context().get_trial_id()
    done = fit(Hopeless(), toy_config(folder, lr=1e-9, resources={"cpus": 1.5}), toy_data(folder / "data"), Place(str(folder / "run")))
    return {"brier": done.best["brier"], "epoch": done.epochs, "ended": True}


def test_asha_stops_a_training_run_that_is_behind_and_its_cpus_go_to_the_next(tmp_path: Path, local_ray: None):
    """Each of two runs takes more than half of the CPUs, so that the second waits for the first one's end."""
    training = {"metric": "brier", "mode": "min", "batch": 16, "micro_batch": 4, "epochs": 2, "resources": {"cpus": 1.5}}
    space = {"training.lr": SPACE["training.lr"]}
    cfg = config(tmp_path, trials=3, concurrent=1, space=space, training=training, grace=1)
    swept = finish(cfg, search(cfg, first_is_best))
    assert swept.states == {"finished": 1, "stopped": 2}
    rows = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [(r["state"], r["epochs"]) for r in rows] == [("finished", 2), ("stopped", 1), ("stopped", 1)]
    assert all(r["brier"] > 0 for r in rows[1:])


def test_what_a_killed_run_had_just_asked_for_is_freed_too(local_ray: None):
    """A worker of a stopped run may die before the run does, which then asks for CPUs anew, and is killed before it has said so; as a
    run counts as dead a moment before its process ends, that may come when the freeing has begun."""
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    killed, lives = (named_after(run, placement_group, [{"CPU": 0.1}]) for run in ("0" * 32, "1" * 32))
    assert killed.wait(60) and lives.wait(60)
    freeing = threading.Thread(target=free, args=("0" * 32, 3.0))
    freeing.start()
    while placement_group_table(killed)["state"] != "REMOVED":
        assert freeing.is_alive()
    late = named_after("0" * 32, placement_group, [{"CPU": 0.1}])
    freeing.join()
    assert [placement_group_table(group)["state"] for group in (late, lives)] == ["REMOVED", "CREATED"]
    remove_placement_group(lives)


def two_epochs(values: dict[str, Any]) -> dict[str, Any]:
    """As a training run within a trial: what it reports comes from another process than the trial's."""
    import ray

    with telling_tune() as tell:
        report = ray.remote(num_cpus=0)(lambda epoch: tell[0].after_report(None, [{"step": 0, "epoch": epoch}], None))
        for epoch in (1, 2):
            ray.get(report.remote(epoch))
        (Path(values["folder"]) / "reported").touch()
    return {"epoch": 2, "ended": True}


def test_epochs_that_end_while_tune_is_busy_are_told_before_the_trials_end(tmp_path: Path, local_ray: None):
    from ray import tune

    class Busy(tune.Callback):
        """With the first epoch, until all have been reported."""

        def on_trial_result(self, *_: Any, **__: Any) -> None:
            deadline = time.monotonic() + chaos.LONGEST
            while not (tmp_path / "reported").exists() and time.monotonic() < deadline:
                time.sleep(0.05)

    trial, where = tune.with_resources(two_epochs, {"CPU": 0.1}), tmp_path / "tune"
    run_config = tune.RunConfig(storage_path=str(where), callbacks=[Busy()], verbose=0)
    (result,) = tune.Tuner(trial, param_space={"folder": str(tmp_path)}, run_config=run_config).fit()
    assert result.error is None and result.metrics["ended"]
    assert result.metrics_dataframe["epoch"].tolist() == [1, 2, 2]


def test_more_than_the_cluster_has_is_said_before_anything_starts(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch):
    """And the settings that then fit, or fit another cluster, go on with the same sweep."""
    thirty(tmp_path)
    monkeypatch.setattr(sweep, "search", lambda cfg, trial: TRIALS)

    def go(lr: float = 1e-3, **resources: float) -> None:
        training = {"batch": 15, "micro_batch": 15, "lr": lr, "resources": resources}
        sweep.run(config(tmp_path, modalities=["image"], training=training))

    with pytest.raises(CxrayError, match=r"need 64\.1 CPUs, and the cluster has"):
        go(cpus=64.0)
    with pytest.raises(CxrayError, match="1 workers with 1 GPU each are asked for, and the cluster has 0"):
        go(gpus=1)
    assert not (tmp_path / "sweep").exists()
    go(cpus=1.0)
    go(cpus=0.5)
    with pytest.raises(CxrayError, match="holds a sweep with other settings"):
        go(lr=2e-3, cpus=0.5)


JOB = """
import sys
from contracts.config import load
from trainers import fusion, sweep
print(sweep.run(load(sweep.SweepConfig, sys.argv[1])))
for best in sys.argv[2:]:
    print(fusion.run(load(fusion.FusionConfig, best)))
"""
SUBMIT = """
import subprocess, sys
from ray.cluster_utils import Cluster
free = {"dashboard_port": 0, "dashboard_agent_listen_port": 0}  # another cluster on this machine may have the usual ones
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True, **free})
try:
    command = [sys.argv[1], "job", "submit", "--address", f"http://{cluster.webui_url}", "--", sys.executable, *sys.argv[2:]]
    for _ in range(12):  # a young cluster's agent may not be there yet: Ray waits for it 10 s, then says so
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if "No available agent" not in done.stdout:
            break
    print(done.stdout)
finally:
    cluster.shutdown()
sys.exit(done.returncode)
"""


@pytest.mark.ray
@pytest.mark.parametrize(("trials", "epochs", "times"), [(2, 2, 1), pytest.param(8, 6, 10, marks=pytest.mark.soak)])
def test_a_sweep_as_a_submitted_job_and_its_best_trained_again(tmp_path: Path, trials: int, epochs: int, times: int):
    """On a cluster of two CPUs of its own, two trials at once; the best of eight is trained again. The first has all defaults; of 300
    patients, in six epochs, their rate is too low to learn what only two numbers together say."""
    thirty(tmp_path, times)
    settings = {
        "out": str(tmp_path), "findings": ["Edema", "Pneumonia"], "modalities": ["image", "clinical"], "trials": trials, "concurrent": 2,
        "space": {"training.lr": {"low": 1e-4, "high": 0.03, "log": True}, "loss.gamma": {"low": 0.0, "high": 4.0}}, "grace": 2,
        "network": {"dim": 16, "heads": 2, "hidden": [32, 16]},
        "training": {
            **{"epochs": epochs, "batch": 15 * min(times, 2), "micro_batch": 15, "metric": "macro_auroc", "mode": "max"},
            "resources": {"cpus": 0.5, "cache": str(tmp_path / "rows")},
        },
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "submit.py").write_text(SUBMIT)
    files = [str(tmp_path / name) for name in ("job.py", "sweep.yaml", *(["sweep/best.yaml"] if trials == 8 else []))]
    command = [sys.executable, str(tmp_path / "submit.py"), str(Path(sys.executable).with_name("ray")), *files]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # of this cluster alone
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=os.environ | token)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    rows = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert len(rows) == trials
    assert {r["state"] for r in rows} <= {"finished", "stopped"}
    assert all((tmp_path / "sweep/trials" / r["id"] / "model/model.safetensors").exists() for r in rows if r["state"] == "finished")
    own = next(r for r in rows if (r["training.lr"], r["loss.gamma"]) == (TrainerConfig().lr, LossConfig().gamma))
    assert rows[0]["macro_auroc"] >= own["macro_auroc"]
    if trials == 2:
        return
    assert rows[0]["macro_auroc"] > own["macro_auroc"] + 0.05, "more than chance makes of 100 studies"
    again = json.loads((tmp_path / "sweep-best/metrics.json").read_text())["epochs"]
    as_far = [e["macro_auroc"] for e in again[: rows[0]["epochs"]]]  # as the trial came before others were ahead
    assert max(as_far) == pytest.approx(rows[0]["macro_auroc"], abs=1e-6)
