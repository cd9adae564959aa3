"""`cxray evaluate CONFIG`: how good predictions are, judged on test, with what is fitted on validate.

The output is a run folder: metrics.json holds all numbers, predictions.parquet the calibrated probabilities, report.html shows them.
"""

import hashlib
import io
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError
from contracts.pages import NOT_FOR_DIAGNOSIS
from contracts.runs import finished, read_run, record
from contracts.storage import Place
from evaluation import leaks
from evaluation.calibration import Rule, apply, fit, logit
from evaluation.intervals import LEVEL, Interval
from evaluation.judged import judged, parts
from evaluation.metrics import BINS, known, plain
from evaluation.predictions import Predictions, read
from evaluation.report import on_card, page
from evaluation.studies import RADIOLOGISTS_POLICY, RARE, radiologists, rare, subgroups
from pipelines.job import VerbConfig

RULES = {"youden": "Youden's J (sensitivity + specificity - 1) is greatest", "f1": "F1 is greatest"}


class EvaluateConfig(VerbConfig):
    predictions: str = "predictions/fusion"  # of the splits validate and test
    run: str | None = None  # the run that made them: its model/ gets calibration.json, and these results on its card
    cohort: str = "cohort"  # for the subgroups
    leaks: str | None = None  # a run of `cxray leaks` on the texts that the model reads
    radiologists: str | None = None  # mimic-cxr-2.1.0-test-set-labeled.csv: a second reference on test
    into: str = "evaluation"
    threshold: Rule = "youden"
    resamples: int = Field(default=1000, ge=1)
    seed: int = 0

    def inputs(self) -> dict[str, Place]:
        named = {"predictions": self.predictions, "cohort": self.cohort, "run": self.run, "leaks": self.leaks}
        return {name: self.at(where) for name, where in named.items() if where}


@dataclass
class EvaluateSummary:
    where: str
    found: dict[str, Any]

    def __str__(self) -> str:
        test = self.found["test"]
        over = f"{test['macro']['auroc']['over']} of {len(test['findings'])} findings"
        auroc, ece, before = (Interval.of(test["macro"][m]) for m in ("auroc", "ece", "ece_before"))
        lines = [f"evaluate: {test['studies']:,} studies of {test['patients']:,} patients -> {self.where}"]
        lines += [f"  WARNING: {warning}" for warning in self.found["warnings"]]
        lines.append(f"  macro AUROC {auroc} over {over}; ECE {before.value:.3f} before calibration, {ece.value:.3f} after")
        if self.found["not_fitted"]:
            lines.append(f"  temperature 1 and threshold 0.5, for validate has one class: {', '.join(self.found['not_fitted'])}")
        if self.found["radiologists"]:
            by = self.found["radiologists"]
            lines.append(f"  against radiologists: macro AUROC {Interval.of(by['macro']['auroc'])} on {by['studies']:,} studies")
        return "\n".join([*lines, f"  the whole of it: {self.where}/report.html", f"  {NOT_FOR_DIAGNOSIS}"])


def run(cfg: EvaluateConfig) -> EvaluateSummary:
    """Raises CxrayError where an input is not there, where they are not of the same studies, where validate or test has no labelled study,
    and where the predictions are not those of `run`.
    """
    data, cohort = open_dataset(cfg.at(cfg.predictions), "predictions"), open_dataset(cfg.at(cfg.cohort), "cohort")
    model = _model(cfg.at(cfg.run), data) if cfg.run else None
    meter = _meter(cfg.at(cfg.leaks)) if cfg.leaks else None
    every = read(data, ("validate", "test"))
    parts_of = subgroups(cohort, every)
    there = known(every.labels).any(axis=1)
    labelled = {split: there & (every.splits == split) for split in ("validate", "test")}
    for split, rows in labelled.items():
        if not rows.any():
            why = "thresholds and temperatures are fitted on it" if split == "validate" else "it is what is judged"
            raise CxrayError(f"{data.place}: no labelled study of {split}, and {why}; predict that split too")
    validate, test = (_of(every, rows) for rows in labelled.values())

    calibration = fit(logit(validate.scores), validate.labels, validate.targets, cfg.threshold)
    shared = (test.targets, calibration, cfg.resamples, cfg.seed)
    seldom = rare(cohort, test.targets)
    inside = {kind: {part: rows[labelled["test"]] for part, rows in own.items()} for kind, own in parts_of.items()}
    found: dict[str, Any] = {
        "model": every.model,
        "warnings": _warnings(meter, model),
        "protocol": _protocol(cfg, data, {"validate": validate, "test": test}, every, seldom),
        "calibration": calibration,
        "not_fitted": [name for name, one in calibration.items() if not one["fitted"]],
        "test": judged(test.scores, test.labels, test.groups, *shared),
        "subgroups": parts(inside, seldom, test.scores, test.labels, test.groups, *shared),
        "radiologists": _second(cfg, _of(every, every.splits == "test"), shared) if cfg.radiologists else None,
    }
    out = cfg.output()
    (out / "predictions.parquet").write(_table(every, calibration))
    (out / "metrics.json").write(json.dumps(plain(found), indent=1, allow_nan=False).encode())
    (out / "report.html").write(page(found, test, calibration).html().encode())
    if cfg.run:
        folder = cfg.at(cfg.run) / "model"
        (folder / "calibration.json").write(json.dumps(calibration, indent=1, allow_nan=False).encode())
        (folder / "README.md").write(on_card((folder / "README.md").read_text(), found).encode())
    told = {"studies": found["test"]["studies"], "warnings": found["warnings"], "not_fitted": found["not_fitted"]}
    told |= {"radiologists": found["radiologists"] and found["radiologists"]["file_sha256"]}
    record(out, "evaluate", cfg, cfg.inputs(), plain(told | {"macro": {m: found["test"]["macro"][m] for m in ("auroc", "auprc", "ece")}}))
    return EvaluateSummary(str(out), found)


def unchanged(verb: str, cfg: EvaluateConfig) -> bool:
    """True where the judgement of just these settings stands, and the radiologists' file is what it was."""
    before = read_run(cfg.output())
    if before is None or not finished(cfg.output(), verb, cfg, cfg.inputs()):
        return False
    return not cfg.radiologists or before["summary"].get("radiologists") == _sha256(cfg.at(cfg.radiologists))


def _sha256(file: Place) -> str:
    return hashlib.sha256(file.read()).hexdigest()


def _model(where: Place, data: Dataset) -> dict[str, Any]:
    """What the model's config.json says. Raises CxrayError where the predictions are of other weights: their calibration is not its own."""
    weights = _sha256(where / "model/model.safetensors")
    if data.manifest.get("weights") != weights:
        raise CxrayError(f"{data.place}: not predicted with the weights in {where}/model; predict again, or name the run that did (`run`)")
    return json.loads((where / "model/config.json").read())


def _meter(where: Place) -> dict[str, Any]:
    """The metrics.json of a leak meter's run."""
    told = read_run(where)
    if told is None or told["verb"] != "leaks":
        raise CxrayError(f"{where}: no finished `cxray leaks` here; run it, or name its folder (`leaks`)")
    return json.loads((where / "metrics.json").read())


def _warnings(meter: dict[str, Any] | None, model: dict[str, Any] | None) -> list[str]:
    told = leaks.warnings(meter) if meter else []
    reading = model.get("reading") if model else None
    if reading and meter and reading["notes"] != meter["notes"]:
        told.append("The leak meter measured notes of other settings than the model reads: what it says may not hold for this model.")
    if reading and reading["notes"]["leakage"]["mode"] == "off" and not (meter and meter["notes"]["leakage"]["mode"] == "off"):
        told.append("The model reads notes that were made with the leakage filter off: they may state any finding.")
    return told


def _of(p: Predictions, rows: np.ndarray) -> Predictions:
    return replace(p, studies=p.studies[rows], groups=p.groups[rows], splits=p.splits[rows], scores=p.scores[rows], labels=p.labels[rows])


def _second(cfg: EvaluateConfig, test: Predictions, shared: Any) -> dict[str, Any]:
    """Test as the radiologists labelled it, and the same studies by the labels of their reports."""
    file = cfg.at(str(cfg.radiologists))
    labels = radiologists(file, test.studies, test.targets)
    rows = known(labels).any(axis=1)
    of = test.scores[rows], test.groups[rows]
    by_reports = judged(of[0], test.labels[rows], of[1], *shared)
    told = {"policy": RADIOLOGISTS_POLICY, "file_sha256": _sha256(file)}
    same = {"findings": {f: one["auroc"] for f, one in by_reports["findings"].items()}, "macro": by_reports["macro"]["auroc"]}
    return told | judged(of[0], labels[rows], of[1], *shared) | {"auroc_by_reports": same}


def _protocol(cfg: EvaluateConfig, data: Dataset, splits: dict[str, Predictions], every: Predictions, seldom: list[str]) -> dict[str, Any]:
    return {
        "policy": str(data.manifest["policy"]),
        "splits": {
            name: {
                "studies": len(p.studies),
                "patients": len(np.unique(p.groups)),
                "unlabelled": int((every.splits == name).sum()) - len(p.studies),
            }
            for name, p in splits.items()
        },
        "unit": "study: the probabilities of its images are averaged; a study without any known label is not judged",
        "threshold": f"a finding's own, where {RULES[cfg.threshold]} on validate, after calibration; 0.5 where validate has one class",
        "fixed_specificity": "of a finding the lowest threshold with it on validate, after calibration; none where validate has one class",
        "calibration": "one temperature a finding, of least log-likelihood loss on validate; 1 where validate has one class",
        "intervals": f"{LEVEL:.0%} percentile bootstrap of patients, with thresholds and temperatures as fitted",
        "resamples": cfg.resamples,
        "seed": cfg.seed,
        "ece": f"of the positive class, {BINS} bins of equal width",
        "macro": "mean over the findings with both classes",
        "micro": "all known pairs of study and finding as one",
        "rare": f"under {RARE:.0%} of the labelled studies of train in the cohort: {', '.join(seldom) or 'none'}",
        "leak_meter": cfg.leaks,
    }


def _table(p: Predictions, calibration: Any) -> bytes:
    """A row a study of validate and test: keys, and of each finding `score` (calibrated), `raw`, and `label`, by target, as columns."""
    after = apply(p.scores, p.targets, calibration)
    columns: dict[str, Any] = {"study_id": p.studies, "group_id": p.groups, "split": p.splits}
    for i, name in enumerate(p.targets):
        word = name.lower().replace(" ", "_")
        columns |= {f"score_{word}": after[:, i], f"raw_{word}": p.scores[:, i]}
        columns[f"label_{word}"] = pa.array(p.labels[:, i], pa.int8(), from_pandas=True, safe=False)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()
