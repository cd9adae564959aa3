"""`cxray ablate CONFIG`: does knowledge help, and for whom? The same network and budget on more and less of what is known.

    .venv/bin/cxray ablate configs/mimic/ablate.yaml

What a variant is shown. `image only`: the image. `chart only`: the chart in numbers (the clinical vector), no words. The others: the image,
the chart in numbers, and the chart in words: as charted (`image + raw note`), as a filtered narrative (`image + note`), or that with the
passages it fetched (`image + note + knowledge`). All three have the numbers, because the note is written from them: without, a gain of the
words could be nothing but these numbers in another form. So between the last two the passages alone differ, and they have to
add to all the rest.

The control reads passages too, but another patient's: seeded, a cyclic shift over shuffled patients, within each split, at
training as at test. What it gains comes from more weights to train and from the general look of passages, not from what they say of
this patient.

All variants train on the same rows. Each of variant and seed is a run folder OUT/<variant>/<seed> as `cxray train` leaves it, with
`predictions` of validate and test; what is finished is not done again. OUT has metrics.json and report.html.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
from pydantic import Field, model_validator
from torch import nn

from contracts.config import Config
from contracts.dataset import Dataset, open_dataset, read_manifest
from contracts.errors import CxrayError
from contracts.runs import finished, record
from contracts.schema import SPLITS
from evaluation.metrics import plain
from evaluation.predictions import Predictions, read
from evaluation.studies import COUNTS, counts, rare
from evaluation.verdict import judged, page
from models.encoders.device import choose
from models.mdfnet import MODALITIES
from trainers.engine import fit
from trainers.engine.data import Rows
from trainers.evidence import evidence, looked_at
from trainers.fusion import Fusion, check_validate
from trainers.scored import scored, write
from trainers.sources import FusionConfig, Kind, Modality, Sources


class Variant(Config):
    """What the network is shown. shuffled: its passages are those of another patient."""

    modalities: tuple[Modality, ...] = MODALITIES
    kinds: tuple[Kind, ...] = ("note",)
    shuffled: bool = False


VARIANTS = {
    "image only": Variant(modalities=("image",)),
    "chart only": Variant(modalities=("clinical",)),
    "image + raw note": Variant(kinds=("raw",)),
    "image + note": Variant(),
    "image + note + knowledge": Variant(kinds=("note", "passage")),
    "image + note + shuffled knowledge": Variant(kinds=("note", "passage"), shuffled=True),
}


class AblateConfig(FusionConfig):
    """A training config, which may be `extends:`, and what to compare. `modalities`, `kinds` and the seed are for the variants to say."""

    into: str = "ablation"
    variants: dict[str, Variant] = VARIANTS
    treatment: str = "image + note + knowledge"  # what the hypothesis is about: it against every other variant
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    groups: dict[str, tuple[str, ...]] = {}  # findings to compare on by themselves, such as two that look alike
    resamples: int = Field(default=2000, ge=1)

    @model_validator(mode="after")
    def _comparable(self) -> "AblateConfig":
        if self.treatment not in self.variants or self.variants[self.treatment].shuffled:
            raise ValueError(
                f"treatment {self.treatment!r} must be one of the variants, and not a shuffled one: {', '.join(self.variants)}"
            )
        if self.unfreeze:
            raise ValueError("unfreeze: variants are compared on what the encoders made once; leave it out")
        if not self.rivals:
            raise ValueError("variants: there is none to compare the treatment with")
        if len({folder(name) for name in self.variants}) < len(self.variants) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("variants and seeds: two would write into the same folder; give each another name")
        if any("passage" in v.kinds and "text" not in v.modalities for v in self.variants.values()):
            raise ValueError("variants: one has passages among its kinds, but no text among its modalities")
        return self

    @property
    def rivals(self) -> list[str]:
        return [name for name, v in self.variants.items() if name != self.treatment and not v.shuffled]

    @property
    def controls(self) -> list[str]:
        return [name for name, v in self.variants.items() if v.shuffled]

    def one(self, name: str, seed: int) -> FusionConfig:
        """The training config of one variant and seed."""
        shown = self.variants[name]
        mine = {f: getattr(self, f) for f in FusionConfig.model_fields}
        training = self.training.model_copy(update={"seed": seed})
        into = f"{self.into}/{folder(name)}/{seed}"
        return FusionConfig(**mine | {"modalities": shown.modalities, "kinds": shown.kinds, "training": training, "into": into})


def folder(name: str) -> str:
    """'image + note' -> 'image-note'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Shuffled(Fusion):
    """Fusion that is given, for each row, the passages of another patient's row. others: {row_id: passage ids}."""

    def __init__(self, cfg: FusionConfig, sources: Sources, others: Mapping[str, Sequence[str]]) -> None:
        super().__init__(cfg, sources)
        self.others = others

    def prepare(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        own = [s for s in row["segments"] if s["kind"] != "passage"]
        theirs = [{"kind": "passage", "id": id, "name": None} for id in self.others[row["row_id"]]]
        return super().prepare({**row, "segments": own + theirs}, rng)


def exchanged(keys: pa.Table, passages: Mapping[str, Sequence[str]], seed: int) -> dict[str, Sequence[str]]:
    """{row_id: the passages of a row of another patient of the same split}; the n-th row gets the other one's n-th, round and round.

    Raises CxrayError where a split has one patient only.
    """
    rng, given = np.random.default_rng(seed), {}
    for split in SPLITS:
        there = keys.filter(pc.equal(keys["split"], split)).sort_by("row_id")
        rows: dict[str, list[str]] = {}
        for row_id, patient in zip(there["row_id"].to_pylist(), there["group_id"].to_pylist()):
            rows.setdefault(patient, []).append(row_id)
        if len(rows) == 1:
            raise CxrayError(f"split {split} has one patient: there is no other whose passages could be taken; leave the control out")
        order = rng.permutation(sorted(rows)).tolist()
        for patient, other in zip(order, order[1:] + order[:1]):
            given |= {row: passages[rows[other][n % len(rows[other])]] for n, row in enumerate(rows[patient])}
    return given


def passages_of(texts: Dataset) -> dict[str, list[str]]:
    """{row_id: ids of its passages, best first}."""
    table = texts.leaves(["row_id", "segments.list.element.kind", "segments.list.element.id"])
    return {row["row_id"]: [s["id"] for s in row["segments"] if s["kind"] == "passage"] for row in table.to_pylist()}


class Bench:
    """What all variants share: the opened data sets, and the rows that all of them have."""

    def __init__(self, cfg: AblateConfig) -> None:
        self.cfg = cfg
        whole = cfg.one(cfg.treatment, cfg.seeds[0]).model_copy(update={"modalities": MODALITIES})
        self.sources = Sources(whole)  # says now what does not go together
        self.data = self.sources.data(whole).anchored()
        check_validate(self.data, cfg.findings)
        texts = self.sources.texts
        self.passages = passages_of(texts) if texts is not None and cfg.controls else {}

    def trained(self, name: str, seed: int) -> tuple[Fusion, nn.Module, Dataset]:
        """A variant and seed: its task, its network with the best weights, its predictions; made unless they stand there."""
        one = self.cfg.one(name, seed)
        out, data = one.output(), self.data
        sources = Sources(one)
        shuffled = self.cfg.variants[name].shuffled
        task = Shuffled(one, sources, exchanged(data.keys, self.passages, seed)) if shuffled else Fusion(one, sources)
        verb = "train" + (", on the passages of others" if shuffled else "")
        if not finished(out, verb, one, one.inputs()):
            fitted = fit(task, one.training, data, out, made_by=[*sources.made_by(one), verb])
            record(out, verb, one, one.inputs(), fitted.__dict__)
        task.fit(data.small_columns("train", task.columns))
        weights = (out / "model" / "model.safetensors").read()
        module = task.build()
        module.load_state_dict(safetensors.torch.load(weights))
        made_by = hashlib.sha256(weights).hexdigest()
        module.to(choose(None)).eval()  # the workers had what the config says; this machine may have no GPU
        there = read_manifest(out / "predictions")
        if there is None or there["weights"] != made_by:
            parts = [scored(task, module, self.rows(task, split), one.training.micro_batch) for split in SPLITS[1:]]
            write(out / "predictions", parts, sources.cohort, task, name, made_by, made_by)
        return task, module, open_dataset(out / "predictions", "predictions")

    def rows(self, task: Fusion, split: str) -> Rows:
        """Raises CxrayError where the split is empty: nothing could be compared on it."""
        rows = Rows(task, self.data, split, task.cfg.training.seed, task.cfg.training.resources.cache)
        if not len(rows):
            raise CxrayError(f"the {split} split has no rows to predict")
        return rows


@dataclass
class Ablated:
    """For a person (`str`), and for run.json."""

    where: str
    found: dict[str, Any]

    def __str__(self) -> str:
        return f"ablate: {self.found['answer']}\n  -> {self.where}/report.html"


def run(cfg: AblateConfig) -> Ablated:
    """Raises CxrayError where data sets do not go together, where a split is empty, and what training raises."""
    bench, out = Bench(cfg), cfg.output()
    said: dict[str, list[Predictions]] = {}
    looks = []
    for name in cfg.variants:
        for seed in cfg.seeds:
            task, module, told = bench.trained(name, seed)
            said.setdefault(name, []).append(read(told, splits=("test",)))
            if name == cfg.treatment and "passage" in cfg.variants[name].kinds:
                looks.append(looked_at(task, module, bench.data, seed))
    groups = {"rare findings": tuple(rare(bench.sources.cohort, cfg.findings)), **cfg.groups}
    many = counts(bench.sources.cohort, said[cfg.treatment][0].studies) >= COUNTS
    found = judged(said, cfg.treatment, cfg.controls, groups, many, cfg.resamples)
    found |= {"evidence": evidence(looks, cfg.resamples) if looks else None, "policy": cfg.policy.name, "seeds": list(cfg.seeds)}
    (out / "metrics.json").write(json.dumps(plain(found), indent=1, allow_nan=False).encode())
    (out / "report.html").write(page(found).html().encode())
    told = {k: found[k] for k in ("answer", "knowledge_gain_low", "shuffled_gain_low", "auroc")}
    record(out, "ablate", cfg, cfg.inputs(), plain(told))
    return Ablated(str(out), found)
