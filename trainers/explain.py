"""`cxray explain CONFIG`: what a trained network looked at, in a few studies of test: the X-ray, the sentences and the passages.

The cached rows are shown to it, as in training: a stored picture that is decoded and stored once more is another one.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from pydantic import Field

from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError, RowError
from contracts.pages import NOT_FOR_DIAGNOSIS, Page
from contracts.runs import finished, read_run, record
from contracts.storage import Place, place
from evaluation.calibration import apply
from models.mdfnet import KINDS
from pipelines.images.stored import from_stored
from pipelines.job import VerbConfig
from pipelines.overview import PATIENTS, SYNTHETIC, explained, is_synthetic
from trainers.engine.context import moved
from trainers.engine.data import Rows
from trainers.overlay import overlay
from trainers.predictor import Model
from trainers.scored import scored, trained_with
from trainers.sources import Sources

SPLIT = "test"
NO_LEAD = "No Finding"  # there is no place to look for it at
GAP = 12  # pixels between the X-ray and the drawing
HOW_CHOSEN = (
    "The last is a wrong call on purpose, where there was any: of all that were, the one whose true answer was given the least "
    "probability. The others are findings that are there and were called: from the studies with the fewest wrong calls, those with the "
    "highest probability, each of another finding. Every study is of another patient, and has passages to read where any such study has."
)


class ExplainConfig(VerbConfig):
    root: str | None = None  # of the sources: says whether they are synthetic
    run: str = "fusion"  # a finished `cxray train`; after `cxray evaluate`, so that its probabilities are calibrated
    images: str = "images"
    studies: int = Field(default=3, ge=1)
    into: str = "explained"

    def inputs(self) -> dict[str, Place]:
        """The run, what it was trained on, and the pictures."""
        where = self.at(self.run)
        read = (read_run(where) or {}).get("inputs", {})
        return {name: place(i["uri"], self.storage) for name, i in read.items()} | {"run": where, "images": self.at(self.images)}


@dataclass
class Explained:
    """calibration: a hash of what the probabilities were calibrated with."""

    where: str
    studies: int
    wrong: int
    calibration: str | None
    seconds: float

    def __str__(self) -> str:
        said = f"explain: {self.studies} studies of {SPLIT}, {self.wrong} of them wrong on purpose; {self.seconds:.1f} s"
        return f"{said} -> {self.where}/report.html\n  {NOT_FOR_DIAGNOSIS}"


@dataclass(frozen=True)
class Choice:
    """A study to show: its number among the split's rows, the finding that it is shown for, and whether the call was right."""

    row: int
    finding: int
    right: bool


def run(cfg: ExplainConfig) -> Explained:
    """Raises CxrayError where run or images are not there, where its data sets are others than it was trained on, and where test has
    no finding that was called rightly, and none wrongly.
    """
    started, where, out = time.monotonic(), cfg.at(cfg.run), cfg.output()
    trained = trained_with(where)
    images = open_dataset(cfg.at(cfg.images), "images")
    sources, model = Sources(trained), Model(where)
    if sources.made != model.made:
        raise CxrayError(f"{where}: its features or texts were made anew by other encoders or settings; train again, or put those back")
    rows = Rows(model.task, sources.data(trained), SPLIT, 0, trained.training.resources.cache)
    table = scored(model.task, model.network, rows, trained.training.micro_batch)
    scores, labels = (_matrix(table[name], len(model.findings)) for name in ("scores", "labels"))
    if model.calibration is not None:
        scores = apply(scores, model.findings, model.calibration)
    leads = np.array([f != NO_LEAD for f in model.findings])
    fetched = _fetched(sources, model, rows)
    chosen = choose(scores, np.where(leads, labels, np.nan), model.thresholds, rows.keys["group_id"].to_pylist(), fetched, cfg.studies)
    if not chosen:
        raise CxrayError(f"{where}: in no labelled study of {SPLIT} a finding was called rightly, or any wrongly: there is nothing to show")
    looked = _looked(model, rows, [c.row for c in chosen])
    pictures = _pictures(images, [rows.keys["row_id"][c.row].as_py() for c in chosen])
    studies = []
    for number, (choice, picture, (patches, segments)) in enumerate(zip(chosen, pictures, looked, strict=True), 1):
        file = f"{number}.png"
        (out / file).write(_beside(picture, overlay(picture, patches)) if patches is not None else _png(picture))
        studies.append(
            {
                "row_id": rows.keys["row_id"][choice.row].as_py(),
                "lead": model.findings[choice.finding],
                "right": choice.right,
                "picture": file,
                "patches": patches.tolist() if patches is not None else None,
                "findings": _findings(model, scores[choice.row], labels[choice.row]),
                "read": _read(model, rows.row(choice.row), segments),
            }
        )
    about = {"model": cfg.run, "split": SPLIT, "policy": model.task.policy_name, "calibrated": model.calibration is not None}
    about |= {"chosen": HOW_CHOSEN, "studies": studies}
    (out / "explained.json").write(json.dumps(about, indent=1, allow_nan=False).encode())
    page = Page(f"{cfg.run}, explained", SYNTHETIC if is_synthetic(cfg.root, cfg.storage) else PATIENTS)
    explained.show(page, out)
    (out / "report.html").write(page.html().encode())
    done = Explained(str(out), len(studies), sum(not c.right for c in chosen), _calibration(where), time.monotonic() - started)
    record(out, "explain", cfg, cfg.inputs(), done.__dict__)
    return done


def unchanged(verb: str, cfg: ExplainConfig) -> bool:
    """True where the pages of just these settings stand, and the model is calibrated as it was."""
    before = read_run(cfg.output())
    if before is None or not finished(cfg.output(), verb, cfg, cfg.inputs()):
        return False
    return before["summary"]["calibration"] == _calibration(cfg.at(cfg.run))


def choose(
    scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, groups: Sequence[str], fetched: np.ndarray, studies: int
) -> list[Choice]:
    """As HOW_CHOSEN says, the right ones first. scores, labels (NaN: unknown): [n, F]; thresholds: [F]; fetched: bool [n], there are
    passages to read. Where there are not enough right ones, more wrong ones, and the other way round; fewer where there are no more.
    """
    called = scores >= thresholds
    wrong = ~np.isnan(labels) & (called != (labels == 1))
    truth = np.where(labels == 1, scores, 1 - scores)
    hits, faults = np.nonzero(called & (labels == 1)), np.nonzero(wrong)
    surest = np.lexsort((-truth[hits], wrong.sum(1)[hits[0]], ~fetched[hits[0]]))
    worst_first = np.lexsort((truth[faults], ~fetched[faults[0]]))
    best = [Choice(int(hits[0][i]), int(hits[1][i]), True) for i in surest]
    worst = [Choice(int(faults[0][i]), int(faults[1][i]), False) for i in worst_first]
    chosen: list[Choice] = []

    def take(choices: Sequence[Choice], up_to: int) -> None:
        for choice in choices:
            if len(chosen) >= up_to:
                return
            others = [c for c in chosen if groups[c.row] == groups[choice.row] or (c.finding, c.right) == (choice.finding, choice.right)]
            if not others:
                chosen.append(choice)

    take(best, max(1, studies - 1))
    take(worst, studies)
    take(best, studies)
    return sorted(chosen, key=lambda c: not c.right)


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Fixed lists -> float64 [n, width], NaN where a number is missing."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float64).reshape(-1, width)


def _fetched(sources: Sources, model: Model, rows: Rows) -> np.ndarray:
    """bool [n]: the row has passages that the network reads."""
    if sources.texts is None or "passage" not in model.task.cfg.kinds:
        return np.zeros(len(rows), bool)
    kinds = sources.texts.leaves(["row_id", "segments.list.element.kind"]).to_pylist()
    some = {row["row_id"] for row in kinds if any(s["kind"] == "passage" for s in row["segments"])}
    return np.array([i in some for i in rows.keys["row_id"].to_pylist()], bool)


def _looked(model: Model, rows: Rows, numbers: Sequence[int]) -> list[tuple[np.ndarray | None, list[float]]]:
    """Of each row the attention on the image's patches float [g, g] (None where there are none), and on the text's segments."""
    prepared = [rows[0, n] for n in numbers]
    with torch.inference_mode():
        out = model.task.forward(model.network, moved(model.task.collate(prepared), model.device), attention=True)
    patches, segments = (out[name].float().cpu().numpy() for name in ("patches", "segments"))
    grid = int(model.task.patches**0.5)
    seen = model.task.has_tokens and "image" in model.task.cfg.modalities
    return [
        (p.reshape(grid, grid) if seen else None, s.tolist()[: len(row["names"])])
        for p, s, row in zip(patches, segments, prepared, strict=True)
    ]


def _findings(model: Model, scores: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    columns = zip(model.findings, scores.tolist(), model.thresholds.tolist(), labels.tolist(), strict=True)
    return [
        {"name": name, "probability": p, "threshold": at, "called": p >= at, "label": None if np.isnan(label) else int(label)}
        for name, p, at, label in columns
    ]


def _read(model: Model, row: Mapping[str, Any], shares: Sequence[float]) -> list[dict[str, Any]]:
    """The segments that the network read, with their words and the share of its attention on each."""
    wanted = [s for s in row.get("segments", ()) if s["kind"] in model.task.cfg.kinds]
    said = []
    for segment, share in zip(wanted, shares, strict=True):
        one = {"kind": segment["kind"], "share": share}
        if segment["kind"] == KINDS[2] and model.knowledge is not None:
            known = {"text": model.knowledge.text(segment["id"]), "topic": model.knowledge.topic(segment["id"])}
            said.append(one | known | {"id": segment["id"], "asked_by": segment["asked_by"], "score": float(segment["score"])})
        else:
            said.append(one | {"name": segment["name"], "text": segment["text"]})
    return said


def _pictures(images: Dataset, ids: list[str]) -> list[np.ndarray]:
    table = images.table(["row_id", "image"], where=ds.field("row_id").isin(ids))
    of = dict(zip(table["row_id"].to_pylist(), table["image"].to_pylist(), strict=True))
    if missing := [i for i in ids if i not in of]:
        raise CxrayError(
            f"{images.place}: {len(missing)} of the {len(ids)} studies to show are not there; name the images of the run's features"
        )
    try:
        return [from_stored(of[i]) for i in ids]
    except RowError:
        raise CxrayError(f"{images.place}: holds a picture that cannot be read; make the images again in a new folder") from None


def _beside(picture: np.ndarray, drawn: bytes) -> bytes:
    """The X-ray alone, and with what was drawn over it."""
    over = cv2.imdecode(np.frombuffer(drawn, np.uint8), cv2.IMREAD_COLOR)
    assert over is not None
    gap = np.full((len(picture), GAP, 3), 255, np.uint8)
    return _png(np.hstack([cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR), gap, over]))


def _png(picture: np.ndarray) -> bytes:
    return cv2.imencode(".png", picture)[1].tobytes()


def _calibration(where: Place) -> str | None:
    file = where / "model/calibration.json"
    return hashlib.sha256(file.read()).hexdigest() if file.exists() else None
