"""`cxray sweep CONFIG`: which settings train best, by Ray Tune: Optuna proposes, ASHA stops what falls behind, a trial is a training run.

    .venv/bin/cxray sweep configs/mimic/sweep.yaml

The config is a training config (it may `extends:` one) with a `space`: any of its keys, each with a range or choices. The first trial has
the config's own values, so that the best is no worse than they are. Under OUT: `trials/ID` (a run folder each), `results.parquet`,
`report.html`, `best.yaml`, which `cxray train` takes as it is, and `tune`, Ray Tune's own record (it holds pickles, and is read
from here only). The same command again goes on: trials that were cut short go on from their last checkpoint. One that failed stays failed,
for Optuna has counted it.
"""

import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import Field, ValidationError, model_validator

from contracts.config import merge, nested
from contracts.errors import CxrayError
from contracts.pages import Page, bars
from contracts.runs import record, version_of
from contracts.storage import Place
from pipelines.cluster import connect
from trainers.engine import fit
from trainers.engine.data import anchored
from trainers.engine.run import check_cluster, cluster
from trainers.fusion import opened
from trainers.sources import FusionConfig
from trainers.space import Between, OneOf

BEGUN, TUNE = "_begun.json", "tune"
DRIVER_CPUS = 0.05  # of a trial itself, which waits for its workers


class SweepConfig(FusionConfig):
    into: str = "sweep"
    space: dict[str, Between | OneOf] = Field(min_length=1)  # 'loss.gamma': {low: 0, high: 4}, 'training.batch': {choices: [32, 64]}
    trials: int = Field(default=16, ge=1)
    concurrent: int = Field(default=2, ge=1)  # trials at once
    grace: int = Field(default=3, ge=1)  # epochs that every trial gets
    reduction: int = Field(default=3, ge=2)  # at each rung the best of so many go on
    seed: int = 0  # of the search; training has its own

    outside_fingerprint: ClassVar[frozenset[str]] = FusionConfig.outside_fingerprint | {"concurrent"}

    @model_validator(mode="after")
    def _each_fits(self) -> "SweepConfig":
        for key, span in self.space.items():
            for value in span.some():
                try:
                    self.with_values({key: value})
                except ValidationError as error:
                    said = error.errors()[0]
                    what = (
                        "training has no such setting" if said["type"] == "extra_forbidden" else said["msg"].removeprefix("Value error, ")
                    )
                    raise ValueError(f"space `{key}`, {value}: {what}") from None
        return self

    def with_values(self, values: Mapping[str, Any], into: str | None = None) -> FusionConfig:
        """The training config with some of its settings replaced ({'loss.gamma': 2.0})."""
        mine = self.model_dump(mode="json", include=set(FusionConfig.model_fields))
        for key, value in values.items():
            mine = merge(mine, nested(tuple(key.split(".")), value))
        return FusionConfig.model_validate(mine | {"into": into or self.into})

    def own(self) -> dict[str, Any]:
        """The config's own value of each key of the space; empty where one of them lies outside it."""
        said, values = self.model_dump(mode="json"), {}
        for key, span in self.space.items():
            value: Any = said
            for part in key.split("."):
                value = value[part]
            if not span.holds(value):
                return {}
            values[key] = value
        return values


@dataclass(frozen=True)
class Trial:
    """value: the best that an epoch reached; None where none was reached. stopped: by ASHA, before its last epoch."""

    id: str
    values: dict[str, Any]
    value: float | None
    epochs: int
    seconds: float
    state: Literal["finished", "stopped", "failed"]


@dataclass
class Swept:
    """For a person (`str`), and for run.json."""

    where: str
    metric: str
    best: Trial
    trials: int
    states: dict[str, int]

    def __str__(self) -> str:
        values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.best.values.items())
        counts = ", ".join(f"{n} {state}" for state, n in self.states.items())
        return (
            f"sweep: {self.trials} trials ({counts}); best {self.metric} {self.best.value:.4f} on validate, trial {self.best.id}: {values}"
            f"\n  -> {self.where}/best.yaml, {self.where}/report.html"
        )


def run(cfg: SweepConfig) -> Swept:
    """Raises CxrayError where data sets do not go together, the cluster is too small, or every trial failed."""
    out = cfg.output()
    opened(cfg)  # says now what does not go together, and not each trial by itself
    _has_room(cfg)
    _same_sweep(cfg, out)
    return finish(cfg, search(cfg, trial))


def trial(values: dict[str, Any], cfg: SweepConfig) -> dict[str, Any]:
    """One training run, as a trial: into `cfg.into`/ID. The engine reports each epoch to Tune; this says the end."""
    from ray import tune

    id = tune.get_context().get_trial_id()
    one = cfg.with_values(values, into=f"{cfg.into}/trials/{id}")
    task, data, made_by = opened(one)
    fitted = fit(task, one.training, data, one.output(), made_by)
    record(one.output(), "train", one, one.inputs(), fitted.__dict__)
    metric = one.training.metric
    return {metric: fitted.best[metric], "epoch": fitted.epochs, "ended": True}


def search(cfg: SweepConfig, trial: Callable[..., dict[str, Any] | None]) -> list[Trial]:
    """Run `trial(values, cfg)` for as many values as asked, or go on with a search that was cut short."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    connect()
    fs, path = anchored(cfg.output()).arrow()
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # or a trial would look for relative names in a folder of its own
    metric, mode = cfg.training.metric, cfg.training.mode
    function = tune.with_resources(partial(trial, cfg=cfg), {"CPU": DRIVER_CPUS})
    if tune.Tuner.can_restore(f"{path}/{TUNE}", storage_filesystem=fs):
        tuner = tune.Tuner.restore(f"{path}/{TUNE}", function, resume_unfinished=True, storage_filesystem=fs)
    else:
        own = cfg.own()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        tuner = tune.Tuner(
            function,
            tune_config=tune.TuneConfig(
                metric=metric,
                mode=mode,
                num_samples=cfg.trials,
                max_concurrent_trials=cfg.concurrent,
                search_alg=OptunaSearch(
                    {key: span.distribution() for key, span in cfg.space.items()},
                    metric=metric,
                    mode=mode,
                    points_to_evaluate=[own] if own else None,
                    sampler=optuna.samplers.TPESampler(seed=cfg.seed, n_startup_trials=max(4, cfg.trials // 4)),
                ),
                scheduler=scheduler(cfg),
            ),
            run_config=tune.RunConfig(name=TUNE, storage_path=path, storage_filesystem=fs, verbose=0),
        )
    grid = tuner.fit()
    results = [grid[i] for i in range(len(grid))]
    if len(results) < cfg.trials or any(not r.error and not (r.metrics or {}).get("done") for r in results):
        raise CxrayError(f"{cfg.output()}: the sweep was stopped before its end; the same command goes on")
    return sorted((_told(result, cfg) for result in results), key=lambda t: t.id)


def _told(result: Any, cfg: SweepConfig) -> Trial:
    history, last = result.metrics_dataframe, result.metrics or {}
    metric = cfg.training.metric
    values = history[metric].dropna() if history is not None and metric in history else []
    epochs = int(last.get("epoch", 0))
    state = "failed" if result.error else "finished" if last.get("ended") or epochs >= cfg.training.epochs else "stopped"
    best = None if not len(values) else float(values.max() if cfg.training.mode == "max" else values.min())
    id = str(last.get("trial_id") or result.path.rstrip("/").rsplit("/", 1)[-1].split("_")[1])
    return Trial(id, dict(last.get("config") or {}), best, epochs, float(last.get("time_total_s", 0)), state)


def finish(cfg: SweepConfig, trials: Sequence[Trial]) -> Swept:
    """The table, the page and best.yaml. Raises CxrayError where no trial reached the end of an epoch."""
    out, metric = cfg.output(), cfg.training.metric
    told = [t for t in trials if t.value is not None]
    if not told:
        raise CxrayError(f"{out}: all {len(trials)} trials failed; try one with `cxray train`, which says why, then delete the folder")
    sign = 1 if cfg.training.mode == "max" else -1
    ordered = sorted(trials, key=lambda t: -sign * t.value if t.value is not None else float("inf"))
    best = ordered[0]
    sink = pa.BufferOutputStream()
    rows = [{**{k: v for k, v in asdict(t).items() if k not in ("values", "value")}, metric: t.value, **t.values} for t in ordered]
    pq.write_table(pa.Table.from_pylist(rows), sink)
    (out / "results.parquet").write(sink.getvalue().to_pybytes())
    again = cfg.with_values(best.values, into=f"{cfg.into}-best")
    head = f"# Of {len(trials)} trials the best by {metric} on validate: {best.value:.6f} (trial {best.id}). Train it with `cxray train`.\n"
    (out / "best.yaml").write((head + yaml.safe_dump(again.model_dump(mode="json"), sort_keys=False)).encode())
    states = {state: n for state in ("finished", "stopped", "failed") if (n := sum(t.state == state for t in trials))}
    swept = Swept(str(out), metric, best, len(trials), states)
    (out / "report.html").write(page(cfg, swept, ordered).html().encode())
    record(out, "sweep", cfg, cfg.inputs(), {"metric": metric, "best": asdict(best), "states": states})
    return swept


def study(cfg: SweepConfig, trials: Sequence[Trial]) -> optuna.Study:
    """What was found, as Optuna reads it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(direction="maximize" if cfg.training.mode == "max" else "minimize")
    spans = {key: span.distribution() for key, span in cfg.space.items()}
    made.add_trials([optuna.create_trial(params=t.values, distributions=spans, value=t.value) for t in trials if t.value is not None])
    return made


def page(cfg: SweepConfig, swept: Swept, ordered: Sequence[Trial]) -> Page:
    metric, keys = swept.metric, list(cfg.space)
    p = Page("Sweep", str(swept).splitlines()[0])
    rows = [(t.id, *(t.values.get(k) for k in keys), t.value, t.epochs, t.seconds, t.state) for t in ordered]
    note = "On validate, each trial's best epoch. Stopped: others were ahead. Chosen by it, the best is flattered by it: judge it on test."
    p.table("Trials, best first", ("trial", *keys, metric, "epochs", "seconds", "state"), rows, note)
    found = study(cfg, ordered)
    if len(found.trials) > 1:
        p.picture(parallel(found, metric), "Each line is a trial; darker is better.")
    if len({t.value for t in ordered if t.value is not None}) > 1:
        weights = optuna.importance.get_param_importances(found)
        p.picture(bars(weights, "importance"), f"Which setting {metric} hung on, by fANOVA over these trials; few trials say little.")
    return p


def parallel(found: optuna.Study, metric: str) -> bytes:
    """A PNG of parallel coordinates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of a setting that all trials share
        plot_parallel_coordinate(found, target_name=metric)
    sink = io.BytesIO()
    pyplot.gcf().set_size_inches(10, 4)
    pyplot.savefig(sink, format="png", dpi=110, bbox_inches="tight")
    pyplot.close()
    return sink.getvalue()


def scheduler(cfg: SweepConfig) -> Any:
    """ASHA, with no rung at the last epoch: who reached it has a model to write. None where each trial gets all epochs anyway."""
    from ray.tune.schedulers import ASHAScheduler

    last = cfg.training.epochs - 1
    rungs: dict[str, Any] = {"grace_period": cfg.grace, "reduction_factor": cfg.reduction, "max_t": last, "stop_last_trials": False}
    return ASHAScheduler(time_attr="epoch", **rungs) if cfg.grace <= last else None


def _has_room(cfg: SweepConfig) -> None:
    """Raises CxrayError where not even one trial's workers fit beside the trials."""
    connect()
    r, have = cfg.training.resources, cluster()
    need = cfg.concurrent * DRIVER_CPUS + (r.min_workers or r.workers) * r.cpus
    if need > have.get("CPU", 0):
        raise CxrayError(
            f"{cfg.concurrent} trials at once and the workers of one need {need:g} CPUs, and the cluster has {have.get('CPU', 0):g}: "
            "lower training.resources.cpus (fractions are allowed), or concurrent"
        )
    check_cluster(cfg.training, have)


def _same_sweep(cfg: SweepConfig, out: Place) -> None:
    """Raises CxrayError where the folder holds another sweep, with which this one would mix."""
    now = cfg.fingerprint(*(str(version_of(p)) for p in cfg.inputs().values()))
    file = out / BEGUN
    if not file.exists():
        file.write(json.dumps({"fingerprint": now}).encode())
    elif json.loads(file.read())["fingerprint"] != now:
        raise CxrayError(f"{out}: holds a sweep with other settings or of other data; name another folder (`into`), or delete this one")
