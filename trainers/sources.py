"""What a config of the fusion network names: its settings, and the data sets, opened and checked against each other before any training."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from contracts.chart import CHART_COLUMNS, Chart
from contracts.config import Config
from contracts.dataset import Dataset, open_dataset
from contracts.errors import CxrayError
from contracts.findings import FINDINGS
from contracts.runs import read_run, version_of
from contracts.storage import Place, place
from models.mdfnet import MODALITIES
from pipelines.images.dicom import Preset
from pipelines.inputs.clinical import clinical
from pipelines.job import VerbConfig
from pipelines.knowledge.retrieve import Knowledge
from trainers.engine import Data, TrainerConfig
from trainers.finetune import Unfreeze
from trainers.losses import LossConfig
from trainers.targets import Policy, label_columns, targets

Kind = Literal["raw", "note", "passage"]
Modality = Literal["image", "text", "clinical"]


class Network(Config):
    """What of MDFNet a config may set; the widths of its inputs come from the data."""

    dim: int = Field(default=256, ge=1)
    heads: int = Field(default=8, ge=1)
    hidden: tuple[int, int] = (512, 256)
    drop_image: float = Field(default=0.1, ge=0, lt=1)
    drop_text: float = Field(default=0.3, ge=0, lt=1)
    drop_clinical: float = Field(default=0.3, ge=0, lt=1)


class FusionConfig(VerbConfig):
    task: Literal["fusion"] = "fusion"
    cohort: str = "cohort"
    features: str = "features"
    texts: str | None = "texts"
    encoder: str | None = None  # which one the features have to be of; null: any
    text_encoder: str | None = None  # and the texts
    into: str = "fusion"
    modalities: tuple[Modality, ...] = MODALITIES  # what the network is shown
    kinds: tuple[Kind, ...] = ("note", "passage")  # of the segments, where it is shown text
    findings: tuple[str, ...] = FINDINGS
    policy: Policy = Policy()
    loss: LossConfig = LossConfig()
    network: Network = Network()
    unfreeze: Unfreeze | None = None  # stage 2
    training: TrainerConfig = TrainerConfig(metric="macro_auroc", mode="max")

    outside_fingerprint: ClassVar[frozenset[str]] = VerbConfig.outside_fingerprint | {"encoder", "text_encoder"}

    @model_validator(mode="after")
    def _can_unfreeze(self) -> "FusionConfig":
        if self.unfreeze and "image" not in self.modalities:
            raise ValueError("unfreeze trains the image encoder, and modalities leave the image out: take one of the two away")
        if self.unfreeze and self.training.zero_stage == 3:
            raise ValueError("unfreeze: an encoder's weights are loaded whole, and zero_stage 3 cuts them up; set zero_stage to 2 or less")
        return self

    def inputs(self) -> dict[str, Place]:
        names: dict[str, str | None] = {"cohort": self.cohort, "features": self.features, "texts": self.texts}
        if self.unfreeze:
            names |= {"images": self.unfreeze.images, "start": self.unfreeze.start}
        return {n: self.at(name) for n, name in names.items() if name}


class Made(Config):
    """What made a model's inputs. config.json keeps it: with it a model predicts without the data sets that it was trained on."""

    encoders: dict[Literal["image", "text"], dict[str, Any] | None]
    token_dim: int  # of an image token; 0 where the encoder has none
    dicom: Preset  # what a DICOM was made to look like
    reading: dict[str, Any] | None
    knowledge: dict[str, Any] | None

    @classmethod
    def of(cls, features: Dataset, texts: Dataset | None) -> "Made":
        image, said = features.manifest["encoder"], texts.manifest if texts else {}
        size = features.schema().field("tokens").type.byte_width // image["grid"] ** 2 if image["grid"] else 0
        ran = read_run(features.place)  # `cxray features` notes its images, and their run how they were made
        images = read_run(place(ran["inputs"]["images"]["uri"], features.place.options)) if ran else None
        return cls(
            encoders={"image": image, "text": said.get("encoder")}, token_dim=size, reading=said.get("reading"),
            knowledge=said.get("knowledge"), dicom=images["config"]["dicom"] if images else "mimic_jpg",
        )  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """In the place of `Sources` where a model is used, not trained."""

    made: Made
    knowledge: Knowledge | None


class Sources:
    """The opened data sets that a config names. Raises CxrayError where they do not go together."""

    def __init__(self, cfg: FusionConfig) -> None:
        self.cohort = open_dataset(cfg.at(cfg.cohort), "cohort")
        self.features = open_dataset(cfg.at(cfg.features), "features")
        shown = "text" in cfg.modalities
        if shown and not cfg.texts:
            raise CxrayError("modalities name text, but there are no `texts`: name the data set, or leave text out")
        self.texts = open_dataset(cfg.at(cfg.texts), "texts") if cfg.texts and shown else None
        self.knowledge: Knowledge | None = None
        if self.texts is not None and "passage" in cfg.kinds:
            made_with = self.texts.manifest["knowledge"]
            if made_with is None:
                raise CxrayError(f"{self.texts.place}: was made without knowledge, so there are no passages: leave `passage` out of kinds")
            self.knowledge = Knowledge(Place(made_with["uri"], cfg.storage))
            if self.knowledge.fingerprint != made_with["fingerprint"]:
                raise CxrayError(
                    f"{made_with['uri']}: is another knowledge base than {self.texts.place} was made with; make the texts again"
                )
        self.images = open_dataset(cfg.at(cfg.unfreeze.images), "images") if cfg.unfreeze else None
        check_encoder(cfg.encoder, self.features, "encoder")
        if self.texts is not None:
            check_encoder(cfg.text_encoder, self.texts, "text_encoder")
        self.made = Made.of(self.features, self.texts)

    @property
    def large(self) -> tuple[Dataset, ...]:
        """What is read row by row: in stage 2 the pictures in the place of their features."""
        return (self.images or self.features, *([self.texts] if self.texts else []))

    def made_by(self, cfg: FusionConfig) -> list[str]:
        """What decides the weights besides the engine's settings and the rows."""
        mine = cfg.model_dump(mode="json", exclude={*cfg.outside_fingerprint, "training"})
        start = [str(version_of(cfg.at(cfg.unfreeze.start)))] if cfg.unfreeze and cfg.unfreeze.start else []
        return [self.cohort.fingerprint, json.dumps(mine, sort_keys=True), *start]

    def data(self, cfg: FusionConfig, unlabelled: bool = False) -> Data:
        """Rows that have an image (its features, or in stage 2 itself), a text and a label row (unlabelled: or none)."""
        columns = ["row_id", "group_id", "split", *label_columns(), *CHART_COLUMNS]
        rows = self.cohort.table(columns)
        for there in self.large:
            rows = rows.filter(pc.is_in(rows["row_id"], value_set=there.table(["row_id"])["row_id"].combine_chunks()))
        rows = rows if unlabelled else rows.filter(rows["label_row"])
        found = targets(rows, cfg.policy, cfg.findings)
        small = {
            "row_id": rows["row_id"].combine_chunks(),
            "clinical": lists(clinical([Chart.from_row(r) for r in rows.to_pylist()])[0], np.float32),
            "target": lists(np.where(found.mask, found.target, -1), np.float32),
        }
        keys = rows.select(["row_id", "group_id", "split"])
        return Data(keys, self.large, (pa.table(small),))


def check_encoder(wanted: str | None, made: Dataset, setting: str) -> None:
    """Raises CxrayError where the data set was made by another encoder than is wanted ('one | or another')."""
    name = made.manifest["encoder"]["name"]
    if wanted and name not in [one.strip() for one in wanted.split("|")]:
        raise CxrayError(
            f"{made.place}: was made by the encoder {name}, and `{setting}` is {wanted}; name other {made.manifest['schema']}, "
            "or make these again"
        )


def lists(values: np.ndarray, kind: Any) -> pa.Array:
    """[n, k] -> n fixed lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values, kind).ravel()), values.shape[1])
