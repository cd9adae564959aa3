"""A trained model in use: an image's bytes, a chart, or both -> probabilities, and what they were read from.

    predictor = load("runs/demo/fusion")
    said = predictor.predict(Path("chest.dcm").read_bytes(), {"age": 67, "chief_complaint": "Dyspnea"}, attention=True)
    said.probabilities["Edema"], said.evidence[0].text, said.attention.patches

`model/` is enough, but for the weights of its encoders, which it names (a hub's, or a folder's). Everything goes the pipelines' own
way, so that a study's tensors are those that the model was trained on, byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from contracts.chart import Chart
from contracts.errors import CxrayError, RowError
from contracts.storage import Place, place
from evaluation.calibration import apply, thresholds
from models.encoders import load_known
from models.encoders.base import TextEncoder
from models.encoders.device import choose
from models.mdfnet import MDFNet, MDFNetConfig
from models.unfrozen import Unfrozen
from pipelines.features import encoded
from pipelines.images.stored import as_stored
from pipelines.inputs.clinical import CLINICAL, clinical
from pipelines.inputs.notes import Segment
from pipelines.inputs.reading import Inputs, InputsConfig, Reading
from pipelines.knowledge.retrieve import Knowledge
from trainers import finetune
from trainers.engine.context import moved
from trainers.engine.task import Batch
from trainers.fusion import Fusion
from trainers.sources import Exported, Made

NOTHING = Chart.model_validate({})

Item = tuple[bytes | None, Chart | Mapping[str, Any] | None]


@dataclass(frozen=True)
class Passage:
    """A passage that the note fetched. score: in [0, 1]; asked_by: the segment of the note that it fits best."""

    id: str
    text: str
    score: float
    asked_by: str


@dataclass(frozen=True, eq=False)
class Attention:
    """patches: float32 [g, g], how the text spread its attention over the stored square (None without an image, or of an encoder without
    patches). read: the same of the image over the note's segments, by name, and the passages, by id. Each sums to 1, or to 0."""

    patches: np.ndarray | None
    read: dict[str, float]


@dataclass(frozen=True, eq=False)
class Prediction:
    """By finding: `probabilities`, calibrated where the model is, and the `thresholds` at and above which they count as positive.

    note, evidence: what the network read, besides the image and the clinical numbers. For research, not for diagnosis.
    """

    probabilities: dict[str, float]
    thresholds: dict[str, float]
    note: tuple[Segment, ...] = ()
    evidence: tuple[Passage, ...] = ()
    attention: Attention | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """What a network reads of one study; what is None it is not shown. image: a row of FEATURES; chart: repaired; reading: of the chart."""

    image: Mapping[str, Any] | None
    chart: Chart | None
    reading: Reading | None


class Model:
    """An opened `model/`: the network with its best weights, its task, its calibration. No encoder is loaded but those that trained along.

    Raises CxrayError where something is missing, of another task or version, or does not fit together.
    """

    def __init__(self, run: Place, device: str | None = None) -> None:
        """run: a run folder, or its `model/` by itself."""
        self.where = run / "model" if (run / "model" / "config.json").exists() else run
        self.asked, self.device = device, choose(device)
        said = self._json("config.json")
        if said is None:
            raise CxrayError(f"{run}: no model here (no model/config.json); name the folder of a finished `cxray train`")
        if said.get("task") != "fusion":
            raise CxrayError(f"{self.where}: holds a model of the task {said.get('task')!r}; predictions are made by task 'fusion'")
        self.said = said
        other = CxrayError(f"{self.where}: its config.json is not one of this version of cxray; train the model again")
        try:
            self.made = Made(**{name: said[name] for name in Made.model_fields})
            self.knowledge = self._knowledge()
            self.task = Fusion.exported(said, Exported(self.made, self.knowledge))
            network = MDFNet(MDFNetConfig(**said["network"]))
            same = tuple(said["clinical"]["names"]) == CLINICAL and len(self.task.mean) == len(CLINICAL)
        except (KeyError, TypeError, ValueError):
            raise other from None
        if not same or network.config != self.task.network().model_copy(update=_rates(network.config)):
            raise other
        self.findings, self.shown = self.task.cfg.findings, self.task.cfg.modalities
        self.grid = int(self.task.patches**0.5) if self.task.has_tokens else 0
        self.calibration = self._json("calibration.json")
        self.thresholds = thresholds(self.findings, self.calibration) if self.calibration is not None else np.full(len(self.findings), 0.5)
        self.network = self._weights(network).to(self.device).eval()
        if self.task.cfg.unfreeze:
            text = finetune.tuned("text", self.encoder("text"), self.where) if "text" in self.task.unfrozen else None
            self.task.tokenise = text.tokenise if text else None
            self.network = Unfrozen(self.encoder("image"), network, self.grid, text).eval()

    def encoder(self, side: Literal["image", "text"]) -> Any:
        """The image encoder, as it was after training where it trained along; the text encoder always as it was before: it reads charts
        and finds passages, and one that trained along reads them again within the network.

        Raises CxrayError where it cannot be loaded, or has other weights now.
        """
        if side == "image" and isinstance(self.network, Unfrozen):
            return self.network.seen
        about = self.made.encoders[side]
        assert about is not None
        encoder = load_known(side, about, f"when {self.where} was trained", self.asked)
        return finetune.tuned("image", encoder, self.where) if side == "image" and self.task.cfg.unfreeze else encoder

    def probabilities(self, logits: torch.Tensor) -> np.ndarray:
        """float64 [B, findings], calibrated where there is a calibration.json."""
        raw = logits.detach().float().sigmoid().cpu().numpy().astype(np.float64)
        return apply(raw, self.findings, self.calibration) if self.calibration is not None else raw

    def _json(self, name: str) -> dict[str, Any] | None:
        file = self.where / name
        if not file.exists():
            return None
        try:
            return dict(json.loads(file.read()))
        except (ValueError, TypeError):
            raise CxrayError(f"{file}: is not JSON, or not an object; write it anew") from None

    def _knowledge(self) -> Knowledge | None:
        made = self.made.knowledge
        if made is None or "passage" not in self.said["kinds"] or "text" not in self.said["modalities"]:
            return None
        where = self.where / "knowledge"
        if not (where / "config.json").exists():
            raise CxrayError(
                f"{where}: the passages that this model reads are missing; copy `model/` whole, or export it again by training"
            )
        knowledge = Knowledge(where)
        if knowledge.fingerprint != made["fingerprint"]:
            raise CxrayError(f"{where}: is another knowledge base than the model was trained with; put that back, or train again")
        return knowledge

    def _weights(self, network: MDFNet) -> MDFNet:
        file = self.where / "model.safetensors"
        if not file.exists():
            raise CxrayError(f"{file}: the model's weights are missing; export them again with `cxray train`")
        try:
            network.load_state_dict(safetensors.torch.load(file.read()))
        except (SafetensorError, RuntimeError):
            raise CxrayError(f"{file}: does not hold the weights of the network in config.json; train the model again") from None
        return network

    def chart(self, given: Chart | Mapping[str, Any] | None) -> Chart | None:
        """The repaired chart; None where none is given, or where the network is shown the image alone. Raises RowError bad_chart."""
        if given is None or set(self.shown) == {"image"}:
            return None
        if isinstance(given, Chart):
            return given
        try:
            return Chart.model_validate(dict(given))
        except (ValidationError, TypeError, ValueError) as error:
            fields = {str(e["loc"][0]) for e in error.errors() if e["loc"]} if isinstance(error, ValidationError) else set()
            raise RowError("bad_chart", ", ".join(sorted(fields & set(Chart.model_fields)))) from None

    def inputs(self, encoder: TextEncoder) -> Inputs:
        """What reads charts for this model."""
        return Inputs(InputsConfig.model_validate(self.made.reading), encoder, self.knowledge)

    def tensors(self, parts: Sequence[Part]) -> tuple[Batch, list[dict[str, Any]]]:
        """The batch, and its prepared rows."""
        values = clinical([part.chart or NOTHING for part in parts])[0]
        rows = []
        for i, part in enumerate(parts):
            # An absent chart is one of which nothing is known; `presence` hides it whole.
            row = dict(part.image or self._no_image) | {"row_id": str(i)}
            row |= {"clinical": values[i] if part.chart is not None else np.full(len(CLINICAL), np.nan, np.float32)}
            row |= {"target": np.full(len(self.findings), -1, np.float32), "segments": part.reading.rows() if part.reading else []}
            rows.append(self.task.prepare(row, np.random.default_rng(0)))
        batch = self.task.collate(rows)
        given = [[part.image is not None, part.chart is not None, part.chart is not None] for part in parts]
        return batch | {"presence": batch["presence"] & torch.tensor(given)}, rows

    def say(self, parts: Sequence[Part], attention: bool = False) -> list[Prediction]:
        """What the network says of each."""
        batch, rows = self.tensors(parts)
        with torch.inference_mode():
            out = self.task.forward(self.network, moved(batch, self.device), attention=True)
        probabilities = self.probabilities(out["logits"])
        patches, segments = (out[name].float().cpu().numpy() for name in ("patches", "segments"))
        looked: list[Attention | None] = [None] * len(parts)
        if attention:
            looked = [self._attention(part, row["names"], p, s) for part, row, p, s in zip(parts, rows, patches, segments, strict=True)]
        return [self._prediction(p, part.reading, a) for p, part, a in zip(probabilities, parts, looked, strict=True)]

    @property
    def _no_image(self) -> dict[str, Any]:
        task = self.task
        tokens = {"tokens": bytes(task.patches * task.token_dim), "token_scales": bytes(2 * task.patches)} if task.has_tokens else {}
        return {"embedding": np.zeros(task.image_dim, np.float32)} | tokens

    def _attention(self, part: Part, names: Sequence[str], patches: np.ndarray, segments: np.ndarray) -> Attention:
        spread = patches.reshape(self.grid, self.grid) if part.image is not None and self.task.has_tokens else None
        return Attention(spread, dict(zip(names, segments.tolist()[: len(names)], strict=True)))

    def _prediction(self, probabilities: np.ndarray, reading: Reading | None, attention: Attention | None) -> Prediction:
        by_finding = dict(zip(self.findings, probabilities.tolist(), strict=True))
        if reading is None:
            return Prediction(by_finding, self._thresholds, attention=attention)
        note = tuple(s for s in reading.note.segments if s.kind in self.task.cfg.kinds)
        found = [(self.knowledge.text(e.id), e) for e in reading.evidence] if self.knowledge else []
        evidence = tuple(Passage(e.id, text, e.score, e.asked_by) for text, e in found)
        return Prediction(by_finding, self._thresholds, note, evidence, attention)

    @cached_property
    def _thresholds(self) -> dict[str, float]:
        return dict(zip(self.findings, self.thresholds.tolist(), strict=True))


class Predictor(Model):
    """A model with its encoders and its knowledge. Not safe for several threads at once."""

    def __init__(self, run: Place, device: str | None = None) -> None:
        """Raises CxrayError also where an encoder cannot be loaded, or has other weights than in training."""
        super().__init__(run, device)
        self.image_encoder = self.encoder("image") if "image" in self.shown else None
        self.read = self.inputs(self.encoder("text")) if "text" in self.shown else None

    def predict(self, image: bytes | None = None, chart: Chart | Mapping[str, Any] | None = None, attention: bool = False) -> Prediction:
        """One study. image: a JPEG, PNG or DICOM. Raises CxrayError for what cannot be read."""
        said = self.predict_batch([(image, chart)], attention)[0]
        if isinstance(said, RowError):
            raise CxrayError(f"nothing was predicted, because of {said}") from said
        return said

    def predict_batch(self, items: Sequence[Item], attention: bool = False) -> list[Prediction | RowError]:
        """Studies at once, all of which are encoded together: bound their number by what memory holds.

        One that cannot be read is a RowError in its place: nothing_to_read, bad_chart, and those of pipelines.images.decode.
        """
        opened: list[tuple[np.ndarray | None, Chart | None] | RowError] = []
        for item in items:
            try:
                opened.append(self.opened(*item))
            except RowError as error:
                opened.append(error)
        good = [one for one in opened if not isinstance(one, RowError)]
        said = iter(self.say(self.parts(good), attention) if good else [])
        return [one if isinstance(one, RowError) else next(said) for one in opened]

    def opened(self, image: bytes | None, chart: Chart | Mapping[str, Any] | None) -> tuple[np.ndarray | None, Chart | None]:
        """The picture as stored, uint8 [518, 518], and the repaired chart; what the network is not shown is left out. Raises RowError."""
        picture = as_stored(image, self.made.dicom) if image is not None and "image" in self.shown else None
        known = self.chart(chart)
        if picture is None and known is None:
            raise RowError("nothing_to_read", f"the model reads {', '.join(self.shown)}")
        return picture, known

    def parts(self, opened: Sequence[tuple[np.ndarray | None, Chart | None]]) -> list[Part]:
        """Encoded and read."""
        pictures = [picture for picture, _ in opened if picture is not None]
        images = iter(encoded(self.image_encoder, self.grid, np.stack(pictures)) if self.image_encoder and pictures else [])
        charts = [chart for _, chart in opened if chart is not None]
        readings = iter(self.read(charts) if self.read and charts else [None] * len(charts))
        return [
            Part(next(images) if picture is not None else None, chart, next(readings) if chart is not None else None)
            for picture, chart in opened
        ]


def load(run: str | Path | Place, device: str | None = None) -> Predictor:
    """The model of a finished run, ready to predict. device: 'cpu', 'cuda:1'; None: the GPU where there is one.

    Raises CxrayError as `Model` and `Predictor` say.
    """
    return Predictor(run if isinstance(run, Place) else place(run), device)


def _rates(config: MDFNetConfig) -> dict[str, Any]:
    """Dropout's rates: they are the training's, and no part of what a network computes."""
    return {name: getattr(config, name) for name in MDFNetConfig.model_fields if name.startswith("drop")}
