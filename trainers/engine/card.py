"""The card of a model: what it was trained on, how well it did, what it is for and what not."""

from collections.abc import Mapping
from typing import Any

from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import code_revision
from trainers.engine.data import Data
from trainers.engine.settings import TrainerConfig
from trainers.engine.task import Task


def card(task: Task, cfg: TrainerConfig, data: Data, at: Mapping[str, Any]) -> str:
    """Markdown. at: the finished run's `Position`."""
    name = type(task).__name__
    about = (type(task).__doc__ or "").strip().splitlines() or [""]
    counts = data.keys.group_by("split").aggregate([("row_id", "count"), ("group_id", "count_distinct")]).to_pylist()
    settings = "\n".join(f"- {k}: {v}" for k, v in cfg.model_dump(mode="json").items() if k not in cfg.outside_fingerprint)
    lines = [
        f"# {name}",
        about[0],
        f"**{NOT_FOR_DIAGNOSIS}**",
        "## Data",
        "\n".join(f"- {d.place.name}: {d.manifest['schema']}, version {d.version}, {d.rows:,} rows" for d in data.large),
        "| split | rows | groups |\n|---|---|---|\n"
        + "\n".join(f"| {c['split']} | {c['row_id_count']:,} | {c['group_id_count_distinct']:,} |" for c in counts),
        "A group (a patient) stands in one split only. Weights were learnt on train and chosen on validate; test was not read.",
        f"## On the validate split, after epoch {at['best_epoch']}",
        "| metric | value |\n|---|---|\n" + "\n".join(f"| {k} | {v:.4f} |" for k, v in at["best"].items()),
        "Intervals, calibration and the test split are the work of `cxray evaluate`, which adds them to the run's folder.",
        "## Intended use",
        "Research on data like those above. Not for any decision about a patient.",
        "## Limits",
        task.limits or "Not examined on data of another hospital, scanner or time.",
        "## Training",
        settings,
        f"- code revision: {code_revision()}",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"
