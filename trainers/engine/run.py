"""`fit`: from a task, settings and data to a run folder, through Ray Train.

Under OUT: `checkpoints/` (Ray Train's: the best and the last), `tensorboard/`, `model/` (enough to predict), `metrics.json`, `curves.png`,
`fitted.json`, and `_begun.json`, which knows the settings from the first step on. The same command again goes on from the last
checkpoint.
"""

import hashlib
import json
import logging
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from contracts.errors import CxrayError, sentence
from contracts.storage import Place
from pipelines.job import connect, plainly
from pipelines.ledger import Lease
from trainers.engine.board import curves
from trainers.engine.card import card
from trainers.engine.context import Context
from trainers.engine.data import Data, anchored
from trainers.engine.loop import WEIGHTS, train
from trainers.engine.plain import load_weights
from trainers.engine.settings import TrainerConfig, check_rows
from trainers.engine.task import Task

CHECKPOINTS, BEGUN = "checkpoints", "_begun.json"
WITHOUT_BF16 = ("T4", "V100", "P100", "P4", "K80")  # Nvidia's before Ampere, by Ray's names for them


@dataclass
class Fitted:
    """A finished run, for a person (`str`) and for run.json."""

    where: str
    best_epoch: int
    best: dict[str, float]
    epochs: int
    steps: int
    seconds: float  # in steps, the wait for rows included; over all workers' lives that counted
    fitted: dict[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v:.4f}" for k, v in self.best.items())
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
    with _held(out):
        _same_run(cfg, data, out, made_by)
        connect()
        check_cluster(cfg, cluster())
        table = data.small_columns("train", task.columns)
        fitted = task.fit(table)
        weights = task.balance(table) if cfg.sampling == "balanced" else None
        result = _on_workers(cfg, out, (task, cfg, data, weights))
        at = result.return_value
        with tempfile.TemporaryDirectory() as folder:
            _export(task, cfg, _best_weights(result, at["best_epoch"], Path(folder)), out, card(task, cfg, data, at))
    (out / "fitted.json").write(json.dumps(fitted, indent=1).encode())
    (out / "curves.png").write(curves(at["steps"], at["epochs"], cfg.metric))
    (out / "metrics.json").write(json.dumps({k: at[k] for k in ("best_epoch", "best", "epochs")}, indent=1).encode())
    seconds = sum(s["seconds"] for s in at["steps"])
    return Fitted(str(out), at["best_epoch"], at["best"], len(at["epochs"]), len(at["steps"]), seconds, fitted)


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
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import LoggingConfig

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            there = super()._create_default_callbacks()
            return [_cleaner() if isinstance(c, PlacementGroupCleanerCallback) else c for c in there]

    r = cfg.resources
    fs, path = out.arrow()
    trainer = Trainer(
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
            callbacks=[_give_up(), *_to_tune()],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what stops a run is raised
    with plainly(out):
        return trainer.fit()


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
            leaving=lambda: get_preemption_info() is not None,
            board=config["out"] / "tensorboard",
        )
        return train(ctx, *ray.get(config["work"]))


def _give_up() -> Any:
    """Ray Train starts workers again whatever stopped them. What a person has to put right will not pass: this stops it at once."""
    from ray.train import UserCallback

    class GiveUp(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if said := sentence(error):
                    raise CxrayError(said)

    return GiveUp()


def _cleaner() -> Any:
    """Frees the workers' CPUs where the run is killed from outside, as Tune does with a trial that it stops.

    Ray 2.60's asks the dashboard of whichever cluster it finds on the machine whether the run lives: without one it gives up, and another
    cluster knows of no such run, so that one that does live would lose its CPUs. This one asks its own cluster. And Ray's hears of a
    placement group only when its workers stand. But a stopped run's worker may die first, which the run takes for a failure: it asks for
    CPUs anew, and is killed before it says so. So each group has its run's id in its name, by which it is found.
    """
    from functools import partial

    from ray.train.v2._internal.callbacks import placement_group_callback as callback
    from ray.train.v2._internal.execution.controller import placement_group_cleaner as cleaner
    from ray.train.v2._internal.execution.worker_group import worker_group
    from ray.util.placement_group import placement_group

    def lives(actor_id: str, timeout: float) -> bool:
        from ray._private.state import actors

        return actors(actor_id).get("State", "DEAD") != "DEAD"

    class Cleaner(cleaner.PlacementGroupCleaner):
        def start_monitoring(self) -> bool:
            cleaner.is_actor_alive = lives  # pyright: ignore[reportPrivateImportUsage]
            return super().start_monitoring()

        def _cleanup_placement_group(self, placement_group: Any) -> None:
            free(self._controller_actor_id)

    class Callback(callback.PlacementGroupCleanerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            callback.PlacementGroupCleaner = Cleaner  # pyright: ignore[reportPrivateImportUsage]
            super().after_controller_start(train_run_context)
            named = partial(named_after, str(self._controller_actor_id), placement_group)
            worker_group.placement_group = named  # pyright: ignore[reportPrivateImportUsage]

    return Callback(check_interval_s=0.25)


def named_after(actor_id: str, make: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """The placement group that `make` makes, under a name by which `free` finds it."""
    return make(*args, **given | {"name": f"{actor_id}-{uuid.uuid4().hex}"})


def free(actor_id: str) -> None:
    """Removes all placement groups that were named after this actor."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for hexed, group in placement_group_table().items():
        if group["name"].startswith(f"{actor_id}-") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(hexed))))


def _to_tune() -> list[Any]:
    """Within a trial of Ray Tune's, what tells it the metrics of each epoch, so that it can stop the trial; elsewhere nothing."""
    from ray.tune.integration.ray_train import TuneReportCallback
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session  # as TuneReportCallback asks itself

    class EachEpoch(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["step"] == 0:
                super().after_report(run_context, metrics, None)

    return [EachEpoch()] if _in_tune_session() else []


@contextmanager
def _held(out: Place) -> Iterator[None]:
    """Nobody else trains into this folder meanwhile."""
    lease, stop = Lease(out / "_lease"), threading.Event()
    lease.take()

    def renew() -> None:
        while not stop.wait(20):
            lease.renew()

    beat = threading.Thread(target=renew, daemon=True, name="lease")
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        lease.release()


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


def _export(task: Task, cfg: TrainerConfig, weights: Path, out: Place, readme: str) -> None:
    torch.manual_seed(cfg.seed)
    module = task.build()
    load_weights(module, weights)
    with tempfile.TemporaryDirectory() as folder:
        task.export(module.eval(), Path(folder))
        (Path(folder) / "README.md").write_text(readme)
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            (out / "model" / str(file.relative_to(folder))).write(file.read_bytes())
