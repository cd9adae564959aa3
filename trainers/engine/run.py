"""`fit`: from a task, settings and data to a run folder, through Ray Train.

Under OUT: `checkpoints/` (Ray Train's: the best and the last), `tensorboard/`, `model/` (enough to predict), `metrics.json`, `curves.png`,
`fitted.json`, and `_begun.json`, which knows the settings from the first step on. The same command again goes on from the last
checkpoint.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from contracts.errors import CxrayError, sentence
from contracts.storage import Place
from evaluation.metrics import plain
from pipelines.cluster import connect, plainly
from pipelines.lease import Lease
from trainers.engine.board import curves
from trainers.engine.card import card
from trainers.engine.context import Context
from trainers.engine.data import Data, anchored
from trainers.engine.loop import WEIGHTS, train, within_memory
from trainers.engine.patches import telling_tune, trainer_class
from trainers.engine.plain import load_weights
from trainers.engine.settings import TrainerConfig, check_rows
from trainers.engine.task import Task

CHECKPOINTS, BEGUN, CONFIG = "checkpoints", "_begun.json", "config.json"
WITHOUT_BF16 = ("T4", "V100", "P100", "P4", "K80")  # Nvidia's before Ampere, by Ray's names for them


@dataclass
class Fitted:
    """A finished run, for a person (`str`) and for run.json."""

    where: str
    best_epoch: int
    best: dict[str, float | None]  # None: undefined there
    epochs: int
    steps: int
    seconds: float  # in steps, the wait for rows included; over all workers' lives that counted
    fitted: dict[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v:.4f}" for k, v in self.best.items() if v is not None)
        took = f"{self.steps:,} steps, {self.epochs} epochs in {self.seconds:.0f} s"
        return f"{took}; best after epoch {self.best_epoch}: {shown}\n  -> {self.where}"


def fit(task: Task, cfg: TrainerConfig, data: Data, out: Place, made_by: Sequence[str] = ()) -> Fitted:
    """Train, keep the best, export it.

    made_by: fingerprints of what decides the result besides settings and data (an encoder's weights, a task's own settings). Raises
    CxrayError before any worker starts for all that can be said then.
    """
    data, out = data.anchored(), anchored(out)
    data.plan(task.columns)
    check_rows(cfg, len(data.split("train")), len(data.split("validate")))
    with Lease(out / "_lease"):
        _same_run(cfg, data, out, made_by)
        connect()
        check_cluster(cfg, cluster())
        table = data.small_columns("train", task.columns)
        fitted = task.fit(table)
        weights = task.balance(table) if cfg.sampling == "balanced" else None
        result = _on_workers(cfg, out, (task, cfg, data, weights))
        at = result.return_value
        with tempfile.TemporaryDirectory() as folder:
            export(task, cfg, _best_weights(result, at["best_epoch"], Path(folder)), out, card(task, cfg, data, at))
    (out / "fitted.json").write(json.dumps(fitted, indent=1).encode())
    (out / "curves.png").write(curves(at["steps"], at["epochs"], cfg.metric))
    judged = plain({k: at[k] for k in ("best_epoch", "best", "epochs")})
    (out / "metrics.json").write(json.dumps(judged, indent=1, allow_nan=False).encode())
    seconds = sum(s["seconds"] for s in at["steps"])
    return Fitted(str(out), at["best_epoch"], judged["best"], len(at["epochs"]), len(at["steps"]), seconds, fitted)


def cluster() -> dict[str, float]:
    """What the cluster has, or where it grows, may have."""
    import ray
    from ray._private.state import state  # what Ray Train asks too; there is no public way

    return {**ray.cluster_resources(), **(state.get_max_resources_from_cluster_config() or {})}


def check_cluster(cfg: TrainerConfig, have: Mapping[str, float]) -> None:
    """Raises CxrayError where the cluster cannot hold the workers, or its GPUs not the precision."""
    r = cfg.resources
    fewest = r.min_workers or r.workers
    for name, each in (("GPU", r.gpus), ("CPU", r.cpus)):
        if each and have.get(name, 0) < each * fewest:
            raise CxrayError(
                f"{fewest} workers with {each:g} {name} each are asked for, and the cluster has {have.get(name, 0):g}: "
                f"lower resources.workers or resources.{name.lower()}s, or start Ray on nodes that have them"
            )
    kinds = {name.removeprefix("accelerator_type:") for name in have if name.startswith("accelerator_type:")}
    if r.gpus and cfg.precision == "bf16" and (old := kinds.intersection(WITHOUT_BF16)):
        raise CxrayError(f"precision bf16: the cluster's {', '.join(sorted(old))} cannot compute in it; set precision fp16 or fp32")


def _on_workers(cfg: TrainerConfig, out: Place, work: tuple[Any, ...]) -> Any:
    """Ray Train starts the workers, starts them again where one dies, and keeps the checkpoints."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import LoggingConfig

    r = cfg.resources
    fs, path = out.arrow()
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what stops a run is raised
    with plainly(out), telling_tune() as tell:
        return trainer_class()(
            _worker,
            train_loop_config={"work": ray.put(work), "out": out},  # one copy a node of the small tables
            torch_config=TorchConfig(backend="nccl" if r.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(r.min_workers, r.workers) if r.min_workers and r.min_workers < r.workers else r.workers,
                use_gpu=r.gpus > 0,
                resources_per_worker={"CPU": r.cpus, **({"GPU": r.gpus} if r.gpus else {})},
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                storage_path=path,
                storage_filesystem=fs,
                failure_config=FailureConfig(max_failures=r.failures),
                checkpoint_config=CheckpointConfig(num_to_keep=cfg.keep_best, checkpoint_score_attribute="score"),
                callbacks=[_give_up(), *tell],
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        ).fit()


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One worker of Ray Train's."""
    import ray
    from ray.train import Checkpoint, CheckpointUploadMode, get_checkpoint, get_context, get_preemption_info, report
    from ray.train.torch import get_device

    def reported(metrics: dict[str, Any], folder: Path | None) -> None:
        part = Checkpoint.from_directory(str(folder)) if folder else None
        report(metrics, checkpoint=part, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)  # training goes on while it is stored

    where, last = get_context(), get_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(
            rank=where.get_world_rank(),
            world=where.get_world_size(),
            device=get_device(),  # pyright: ignore[reportArgumentType]
            report=reported,
            resume=Path(last.to_directory(folder)) if last else None,
            leaving=lambda: info.preempted_node_ids if (info := get_preemption_info()) else (),
            board=config["out"] / "tensorboard",
        )
        task, cfg, data, weights = ray.get(config["work"])
        with within_memory(cfg):
            return train(ctx, task, cfg, data, weights)


def _give_up() -> Any:
    """Ray Train starts workers again whatever stopped them. What a person has to put right will not pass: this stops it at once."""
    from ray.train import UserCallback

    class GiveUp(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if said := sentence(error):
                    raise CxrayError(said)

    return GiveUp()


def _same_run(cfg: TrainerConfig, data: Data, out: Place, made_by: Sequence[str]) -> None:
    """Raises CxrayError where the folder holds a run with other settings or of other data, which its checkpoints would mix with."""
    keys = data.keys.select(["row_id", "split"]).sort_by("row_id").combine_chunks()
    now = cfg.fingerprint(*(d.version for d in data.large), hash_of(keys), *made_by)
    file = out / BEGUN
    if not file.exists():
        file.write(json.dumps({"fingerprint": now, "config": cfg.model_dump(mode="json")}, indent=1).encode())
    elif json.loads(file.read())["fingerprint"] != now:
        raise CxrayError(f"{out}: holds a run with other settings or of other data; name another folder (`into`), or delete this one")


def hash_of(table: pa.Table) -> str:
    """sha256 over a table of strings."""
    digest = hashlib.sha256()
    for column in table.columns:
        for text in column.to_pylist():
            digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _best_weights(result: Any, epoch: int, folder: Path) -> Path:
    """The weights of the best epoch, on this machine's disk."""
    best = next((c for c, metrics in result.best_checkpoints if (metrics["epoch"], metrics["step"]) == (epoch + 1, 0)), None)
    if best is None:
        raise CxrayError(f"{result.path}: the checkpoint of the best epoch, {epoch}, is gone; delete the run's folder and train again")
    with best.filesystem.open_input_stream(f"{best.path}/{WEIGHTS}") as stored:
        (folder / WEIGHTS).write_bytes(stored.read())
    return folder / WEIGHTS


def export(task: Task, cfg: TrainerConfig, weights: Path, out: Place, readme: str) -> None:
    """config.json stands in `model/` only while all the rest does: without it nobody takes the folder for a model."""
    torch.manual_seed(cfg.seed)
    module = task.build()
    load_weights(module, weights)
    with tempfile.TemporaryDirectory() as folder:
        task.export(module.eval(), Path(folder))
        (Path(folder) / "README.md").write_text(readme)
        (out / "model" / CONFIG).remove()
        for file in sorted((p for p in Path(folder).rglob("*") if p.is_file()), key=lambda p: (p.name == CONFIG, p)):
            (out / "model" / str(file.relative_to(folder))).write(file.read_bytes())
