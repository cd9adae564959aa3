"""A trained model in use: an image's bytes, a chart, or both -> probabilities, and what they were read from.

    predictor = load("runs/demo/fusion")
    said = predictor.predict(Path("chest.dcm").read_bytes(), {"age": 67, "chief_complaint": "Dyspnea"}, attention=True)
    said.probabilities["Edema"], said.evidence[0].text, said.attention.patches

`model/`, the knowledge folder that it names and its encoders are enough. Everything goes the pipelines' own way, so that a study's
tensors are those that the model was trained on, byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from contracts.chart import Chart
from contracts.errors import CxrayError, RowError
from contracts.storage import Place, place
from evaluation.calibration import apply, thresholds
from models.encoders import load_image, load_text
from models.encoders.device import choose
from models.encoders.grid import pool_grid, quantise
from models.mdfnet import MDFNet, MDFNetConfig
from pipelines.images.decode import decode
from pipelines.images.stored import SIDE, from_stored, to_stored
from pipelines.inputs.clinical import CLINICAL, clinical
from pipelines.inputs.notes import Segment
from pipelines.inputs.reading import Inputs, InputsConfig, Reading
from pipelines.knowledge.retrieve import Knowledge
from trainers.engine.context import moved
from trainers.engine.task import Batch
from trainers.fusion import Exported, Fusion, Made

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


class Model:
    """An opened `model/`: the network with its best weights, its task, its calibration. No encoder is loaded.

    Raises CxrayError where something is missing, of another task or version, or does not fit together.
    """

    def __init__(self, run: Place, device: str | None = None) -> None:
        """run: a run folder, or its `model/` by itself."""
        self.where = run / "model" if (run / "model" / "config.json").exists() else run
        self.device = choose(device)
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
        self.findings = self.task.cfg.findings
        self.calibration = self._json("calibration.json")
        self.thresholds = thresholds(self.findings, self.calibration) if self.calibration is not None else np.full(len(self.findings), 0.5)
        self.network = self._weights(network).to(self.device).eval()

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
        where = place(made["uri"], self.where.options)
        if not (where / "model" / "config.json").exists():
            raise CxrayError(
                f"{where}: the knowledge that this model reads is not there; put it back, or write its place into "
                f"{self.where / 'config.json'} (knowledge.uri)"
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


class Predictor(Model):
    """A model with its encoders and its knowledge. Not safe for several threads at once."""

    def __init__(self, run: Place, device: str | None = None) -> None:
        """Raises CxrayError also where an encoder cannot be loaded, or has other weights than in training."""
        super().__init__(run, device)
        self.shown = self.task.cfg.modalities
        self.image_encoder = self._encoder("image", load_image, device) if "image" in self.shown else None
        text_encoder = self._encoder("text", load_text, device) if "text" in self.shown else None
        self.inputs = Inputs(InputsConfig.model_validate(self.made.reading), text_encoder, self.knowledge) if text_encoder else None

    def _encoder(self, side: Any, load: Any, device: str | None) -> Any:
        about = self.made.encoders[side]
        assert about is not None
        encoder = load(about["name"], device)
        if (encoder.fingerprint, encoder.dim) != (about["fingerprint"], about["dim"]):
            raise CxrayError(f"{self.where}: `{about['name']}` has other weights now than when the model was trained; put those back")
        return encoder

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
        said: list[Prediction | RowError | None] = [None] * len(items)
        good: list[int] = []
        parts: list[tuple[np.ndarray | None, Chart | None]] = []
        for i, item in enumerate(items):
            try:
                parts.append(self.opened(*item))
                good.append(i)
            except RowError as error:
                said[i] = error
        if good:
            batch, rows, readings = self.tensors(parts)
            with torch.inference_mode():
                out = self.task.forward(self.network, moved(batch, self.device), attention=True)
            probabilities = self.probabilities(out["logits"])
            seen = {name: out[name].float().cpu().numpy() for name in ("patches", "segments")}
            for k, i in enumerate(good):
                patches = seen["patches"][k] if parts[k][0] is not None else None
                looked = self._attention(patches, rows[k]["names"], seen["segments"][k]) if attention else None
                said[i] = self._prediction(probabilities[k], readings[k], looked)
        return [one for one in said if one is not None]

    def tensors(self, parts: Sequence[tuple[np.ndarray | None, Chart | None]]) -> tuple[Batch, list[dict[str, Any]], list[Reading | None]]:
        """(stored pictures uint8 [518, 518], charts) -> the batch, its prepared rows, and what was read of each chart."""
        pictures = iter(self._images([picture for picture, _ in parts if picture is not None]))
        charts = [chart for _, chart in parts if chart is not None]
        readings = iter(self.inputs(charts) if self.inputs and charts else [None] * len(charts))
        read = [next(readings) if chart is not None else None for _, chart in parts]
        values = clinical([chart or NOTHING for _, chart in parts])[0]
        rows = []
        for i, ((picture, chart), reading) in enumerate(zip(parts, read, strict=True)):
            row = next(pictures) if picture is not None else self._no_image
            # An absent chart is one of which nothing is known; `presence` hides it whole.
            row |= {"row_id": str(i), "clinical": values[i] if chart is not None else np.full(len(CLINICAL), np.nan, np.float32)}
            row |= {"target": np.full(len(self.findings), -1, np.float32), "segments": reading.rows() if reading else []}
            rows.append(self.task.prepare(row, np.random.default_rng(0)))
        batch = self.task.collate(rows)
        given = [[picture is not None, chart is not None, chart is not None] for picture, chart in parts]
        return batch | {"presence": batch["presence"] & torch.tensor(given)}, rows, read

    def opened(self, image: bytes | None, chart: Chart | Mapping[str, Any] | None) -> tuple[np.ndarray | None, Chart | None]:
        """As `cxray images` stores a picture, and as a chart is repaired. What the network is not shown is left out. Raises RowError."""
        picture = None
        if image is not None and "image" in self.shown:
            picture = from_stored(to_stored(decode(image, preset=self.made.dicom, at_least=SIDE)).jpeg)
        if chart is not None and not isinstance(chart, Chart):
            try:
                chart = Chart.model_validate(dict(chart))
            except (ValidationError, TypeError, ValueError) as error:
                fields = {str(e["loc"][0]) for e in error.errors() if e["loc"]} if isinstance(error, ValidationError) else set()
                raise RowError("bad_chart", ", ".join(sorted(fields & set(Chart.model_fields)))) from None
        if set(self.shown) == {"image"}:
            chart = None
        if picture is None and chart is None:
            raise RowError("nothing_to_read", f"the model reads {', '.join(self.shown)}")
        return picture, chart

    def _images(self, pictures: list[np.ndarray]) -> list[dict[str, Any]]:
        """What `cxray features` stores of each."""
        if not pictures or self.image_encoder is None:
            return []
        found = self.image_encoder(np.stack(pictures))
        rows: list[dict[str, Any]] = [{"embedding": embedding} for embedding in found.embedding]
        if self.task.has_tokens:
            grid = int(self.task.patches**0.5)
            tokens, scales = quantise(pool_grid(found.tokens, self.image_encoder.grid, grid))
            for row, token, scale in zip(rows, tokens, scales, strict=True):
                row |= {"tokens": token.tobytes(), "token_scales": scale.tobytes()}
        return rows

    @property
    def _no_image(self) -> dict[str, Any]:
        task = self.task
        tokens = {"tokens": bytes(task.patches * task.token_dim), "token_scales": bytes(2 * task.patches)} if task.has_tokens else {}
        return {"embedding": np.zeros(task.image_dim, np.float32)} | tokens

    def _attention(self, patches: np.ndarray | None, names: Sequence[str], segments: np.ndarray) -> Attention:
        grid = int(self.task.patches**0.5)
        spread = patches.reshape(grid, grid) if patches is not None and self.task.has_tokens else None
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


def load(run: str | Path | Place, device: str | None = None) -> Predictor:
    """The model of a finished run, ready to predict. device: 'cpu', 'cuda:1'; None: the GPU where there is one.

    Raises CxrayError as `Model` and `Predictor` say.
    """
    return Predictor(run if isinstance(run, Place) else place(run), device)


def _rates(config: MDFNetConfig) -> dict[str, Any]:
    """Dropout's rates: they are the training's, and no part of what a network computes."""
    return {name: getattr(config, name) for name in MDFNetConfig.model_fields if name.startswith("drop")}
