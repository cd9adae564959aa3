"""`cxray train CONFIG`, task `fusion`: image x notes with their evidence x clinical features -> the 14 CheXpert findings.

Stage 1: the encoders are frozen, and what they made once (features, texts) is read. MDFNet is what is trained.
Stage 2 (`unfreeze`): the encoders train along, on the stored pictures and the words (finetune.py).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from contracts.errors import CxrayError
from contracts.runs import finished, read_run, record
from contracts.storage import Place
from evaluation.metrics import judge
from models.encoders.grid import dequantise
from models.mdfnet import KINDS, MODALITIES, MDFNet, MDFNetConfig, components
from models.unfrozen import Unfrozen
from pipelines.images.stored import from_stored
from pipelines.inputs.clinical import CLINICAL
from pipelines.knowledge.retrieve import Knowledge
from trainers import finetune
from trainers.engine import Batch, Data, Fitted, Seen, Task, dry_run, fit
from trainers.finetune import Side, Unfreeze
from trainers.losses import combined, pos_weight
from trainers.sources import Exported, FusionConfig, Network, Sources

log = logging.getLogger(__name__)
CLIP = 8.0  # standard deviations: a mistyped value must not outweigh all others


class Fusion(Task):
    """MDFNet over image tokens, note and evidence segments, and clinical features; 14 CheXpert findings."""

    limits = (
        "Labels were read from reports by a program and are wrong in places; blank findings count as the policy says. A note holds only "
        "what was charted before the image. Not examined on another hospital's data."
    )

    def __init__(self, cfg: FusionConfig, sources: Sources | Exported) -> None:
        self.cfg, self.made, self.policy_name = cfg, sources.made, cfg.policy.name
        image, text = self.made.encoders["image"], self.made.encoders["text"]
        assert image is not None
        self.has_tokens = self.made.token_dim > 0
        self.patches = image["grid"] ** 2 if self.has_tokens else 1
        self.image_dim, self.token_dim = image["dim"], self.made.token_dim or image["dim"]
        self.text_dim = text["dim"] if text else 1
        stored = ["embedding", *(["tokens", "token_scales"] if self.has_tokens else [])]
        self.columns = [*(["image"] if cfg.unfreeze else stored), "clinical", "target", *(["segments"] if text else [])]
        known = sources.knowledge
        self.unfrozen: list[Side] = [side for side in cfg.unfreeze.encoders if self.made.encoders[side]] if cfg.unfreeze else []
        self.passages = {i: place for place, i in enumerate(known.ids)} if known else {}
        self.limits = f"{type(self).limits} {known.told}" if known else type(self).limits
        # Of each passage what the network reads of it: its vector, or where the text encoder trains along its words.
        self.passage_vectors: Any = known.vectors(known.ids) if known and "text" not in self.unfrozen else ()
        if known and not np.isfinite(self.passage_vectors).all():
            raise CxrayError(f"{known.where}: its vectors of passages are not finite; make the knowledge base again")
        self.passage_texts = [known.text(i) for i in known.ids] if known and "text" in self.unfrozen else []
        self.tokenise: Any = None  # where the text encoder trains along, or did: its own
        self.start: dict[str, Tensor] | None = None
        if cfg.unfreeze and isinstance(sources, Sources):
            # Says now, and not each worker by itself, what is wrong with an encoder.
            found = {side: finetune.encoder(side, self.made.encoders[side] or {}) for side in self.unfrozen}
            self.tokenise = found["text"].tokenise if "text" in found else None
            self.start = finetune.start(cfg.at(cfg.unfreeze.start), self._about()) if cfg.unfreeze.start else None

    @classmethod
    def exported(cls, said: Mapping[str, Any], sources: Exported) -> "Fusion":
        """The task of an exported model's config.json: what `prepare`, `collate`, `forward` and `predict` need, but for `tokenise`."""
        same = {n: said[n] for n in ("modalities", "kinds", "findings")}
        unfreeze = Unfreeze(**{**said["unfreeze"], "augment": None}) if said.get("unfreeze") else None
        network = Network(**{n: said["network"][n] for n in Network.model_fields})
        task = cls(FusionConfig(**same, network=network, unfreeze=unfreeze), sources)
        task.mean, task.scale = (np.array(said["clinical"][n], np.float32) for n in ("mean", "scale"))
        task.policy_name = said["policy"]
        return task

    def network(self) -> MDFNetConfig:
        dims = {"vision_dim": self.token_dim, "embedding_dim": self.image_dim if self.has_tokens else 0, "text_dim": self.text_dim}
        return MDFNetConfig(**dims, clinical_dim=len(CLINICAL), findings=len(self.cfg.findings), **self.cfg.network.model_dump())

    def fit(self, train: pa.Table) -> dict[str, Any]:
        """Scale of each clinical feature and weight of each finding's positives, of the train split alone."""
        values = np.stack(train["clinical"].to_numpy(zero_copy_only=False))
        target = np.stack(train["target"].to_numpy(zero_copy_only=False))
        known = np.isfinite(values)
        count = np.maximum(known.sum(0), 1)
        self.mean = (np.where(known, values, 0).sum(0) / count).astype(np.float32)
        spread = np.sqrt((np.where(known, values - self.mean, 0) ** 2).sum(0) / count)
        self.scale = np.where(spread > 1e-6, spread, 1).astype(np.float32)
        self.positives = np.maximum((target == 1).sum(0), 1)
        drawn = self.balance(train) if self.cfg.training.sampling == "balanced" else None
        found = pos_weight(target, target >= 0, self.cfg.findings, self.cfg.loss.pos_weight_cap, drawn)
        self.pos_weight = torch.from_numpy(found)
        weights = dict(zip(self.cfg.findings, self.pos_weight.tolist(), strict=True))
        return {
            "clinical_mean": self.mean.tolist(),
            "clinical_scale": self.scale.tolist(),
            "pos_weight": weights,
            "policy": self.policy_name,
        }

    def balance(self, train: pa.Table) -> np.ndarray:
        """A row counts as much as its rarest positive finding: the inverse of that finding's number of positives."""
        target = np.stack(train["target"].to_numpy(zero_copy_only=False))
        return np.maximum((target == 1) / self.positives, 1 / len(target)).max(1)

    def build(self) -> nn.Module:
        network = MDFNet(self.network())
        if self.cfg.unfreeze is None:
            return network
        if self.start is not None:
            network.load_state_dict(self.start)
        return finetune.unfrozen(self.made.encoders, self.unfrozen, network)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        if self.cfg.unfreeze is None or not isinstance(model, Unfrozen):
            return super().groups(model)
        rate, found = self.cfg.training.lr * self.cfg.unfreeze.lr_scale, super().groups(model.fusion)
        for tower in (model.encoder, model.text_encoder):
            found += finetune.groups(tower, rate, self.cfg.unfreeze.layer_decay) if tower is not None else []
        return found

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        if isinstance(model, MDFNet):
            return components(model)
        assert isinstance(model, Unfrozen)
        towers = {"image encoder": model.encoder, "text encoder": model.text_encoder}
        return {name: tower for name, tower in towers.items() if tower is not None} | components(model.fusion)

    def prepare(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        values = np.asarray(row["clinical"], np.float32)
        known = np.isfinite(values)
        scaled = np.where(known, np.clip((values - self.mean) / self.scale, -CLIP, CLIP), 0)
        segments = [s for s in row["segments"] if s["kind"] in self.cfg.kinds] if "segments" in self.columns else []
        return {
            "row_id": row["row_id"], **(self._picture(row, rng) if "image" in row else self._tokens(row)),
            "text": self._words(segments) if "text" in self.unfrozen else self._vectors(segments),
            "kinds": [KINDS.index(s["kind"]) for s in segments],
            "names": [s["id"] if s["kind"] == "passage" else s["name"] for s in segments],
            "clinical": scaled, "known": known, "target": np.asarray(row["target"], np.float32),
        }  # fmt: skip

    def _tokens(self, row: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """image [patches, token_dim] and embedding [image_dim], as they were stored."""
        embedding = np.asarray(row["embedding"], np.float32)
        if not self.has_tokens:
            return {"image": embedding[None], "embedding": embedding}
        tokens = np.frombuffer(row["tokens"], np.int8).reshape(1, self.patches, self.token_dim)
        scales = np.frombuffer(row["token_scales"], np.float16).reshape(1, self.patches)
        return {"image": dequantise(tokens, scales)[0], "embedding": embedding}

    def _picture(self, row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """picture uint8 [518, 518]: of the train split another look at it each epoch."""
        picture, augment = from_stored(row["image"]), self.cfg.unfreeze.augment if self.cfg.unfreeze else None
        return {"picture": augment(picture, rng) if augment and row["split"] == "train" else picture}

    def _vectors(self, segments: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """[S, text_dim], as they were stored."""
        vectors = [self.passage_vectors[self.passages[s["id"]]] if s["kind"] == "passage" else s["embedding"] for s in segments]
        return np.array(vectors, np.float32).reshape(len(segments), self.text_dim)

    def _words(self, segments: Sequence[Mapping[str, Any]]) -> list[str]:
        return [self.passage_texts[self.passages[s["id"]]] if s["kind"] == "passage" else s["text"] for s in segments]

    def collate(self, rows: Sequence[dict[str, Any]]) -> Batch:
        longest = max(1, *(len(r["kinds"]) for r in rows))
        kinds, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), bool)
        for i, row in enumerate(rows):
            n = len(row["kinds"])
            kinds[i, :n], mask[i, :n] = row["kinds"], True
        target = torch.from_numpy(np.stack([r["target"] for r in rows]))
        same = [name for name in ("picture", "image", "embedding", "clinical", "known") if name in rows[0]]
        batch: Batch = {name: torch.from_numpy(np.stack([r[name] for r in rows])) for name in same}
        shown = torch.tensor([m in self.cfg.modalities for m in MODALITIES]).expand(len(rows), -1)
        batch |= {"text_mask": torch.from_numpy(mask), "kinds": torch.from_numpy(kinds)}
        batch |= self._tokenised(rows, longest) if "text" in self.unfrozen else self._stacked(rows, longest)
        return batch | {"presence": shown, "target": target.clamp(min=0), "mask": target >= 0, "row_id": [r["row_id"] for r in rows]}

    def _stacked(self, rows: Sequence[dict[str, Any]], longest: int) -> Batch:
        text = np.zeros((len(rows), longest, self.text_dim), np.float32)
        for i, row in enumerate(rows):
            text[i, : len(row["text"])] = row["text"]
        return {"text": torch.from_numpy(text)}

    def _tokenised(self, rows: Sequence[dict[str, Any]], longest: int) -> Batch:
        """tokens of each distinct text once, of at least one; which int64 [B, longest], the text of each segment."""
        first: dict[str, int] = {}
        which = np.zeros((len(rows), longest), np.int64)
        for i, row in enumerate(rows):
            which[i, : len(row["text"])] = [first.setdefault(text, len(first)) for text in row["text"]]
        return {"tokens": self.tokenise(list(first) or [""]), "which": torch.from_numpy(which)}

    def forward(self, model: Any, batch: Batch, attention: bool = False) -> Any:
        names = ["tokens", "which"] if "tokens" in batch else ["text"]
        names += ["picture"] if "picture" in batch else ["image", "embedding"] if self.has_tokens else ["image"]
        given = {n: batch[n] for n in [*names, "text_mask", "kinds", "clinical", "known", "presence"]}
        return model(**given, attention=attention)

    def weight(self, batch: Batch) -> Tensor:
        return batch["mask"].sum()

    def loss(self, model: Any, batch: Batch) -> Tensor:
        logits = self.forward(model, batch)
        return combined(self.cfg.loss, logits, batch["target"], batch["mask"], self.pos_weight.to(logits.device)).sum()

    def predict(self, model: Any, batch: Batch) -> dict[str, Any]:
        logits = self.forward(model, batch).float()
        label = torch.where(batch["mask"], batch["target"], torch.nan)
        return {"score": logits.sigmoid(), "label": label, "row_id": batch["row_id"]}

    def metrics(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of rows as they are; `cxray evaluate` judges studies. A soft target counts for neither class."""
        label = predictions["label"]
        hard = np.where((label == 0) | (label == 1), label, np.nan)
        found = judge(predictions["score"], hard, self.cfg.findings)
        return {f"macro_{name}": float(found["macro"][name]["value"]) for name in ("auroc", "auprc")}

    def export(self, model: nn.Module, folder: Path) -> None:
        if isinstance(model, Unfrozen):
            finetune.save(model, folder)
            model = model.fusion
        save_model(model, str(folder / "model.safetensors"))
        if self.made.knowledge and self.passages:  # a model in use fetches passages too
            known = Knowledge(Place(self.made.knowledge["uri"], self.cfg.storage))
            if known.fingerprint != self.made.knowledge["fingerprint"]:
                raise CxrayError(f"{known.where}: is another knowledge base now than when training began; put that back, then train on")
            known.copy(folder / "knowledge")
        said = self._about() | {"clinical": {"names": CLINICAL, "mean": self.mean.tolist(), "scale": self.scale.tolist()}}
        (folder / "config.json").write_text(json.dumps(said, indent=1))

    def _about(self) -> dict[str, Any]:
        """Of config.json all but what `fit` learnt."""
        return {
            "task": "fusion", "network": self.network().model_dump(), "modalities": self.cfg.modalities, "kinds": self.cfg.kinds,
            "findings": self.cfg.findings, "policy": self.policy_name, **self.made.model_dump(),
            "unfreeze": self.cfg.unfreeze.model_dump() if self.cfg.unfreeze else None,
        }  # fmt: skip


@dataclass
class Before(Fitted):
    """A run that stands there finished."""

    def __str__(self) -> str:
        return f"finished before, and unchanged; delete its run.json to export it anew. It was: {super().__str__()}"


def run(cfg: FusionConfig) -> Fitted:
    """Train, and export the best; a run that is finished and unchanged stays as it is, with what `cxray evaluate` added to its model.

    Raises CxrayError before any worker starts for what does not go together.
    """
    out = cfg.output()
    if finished(out, "train", cfg, cfg.inputs()) and (out / "model" / "model.safetensors").exists():
        return Before(**(read_run(out) or {})["summary"] | {"where": str(out)})
    task, data, made_by = opened(cfg)
    fitted = fit(task, cfg.training, data, out, made_by)
    record(out, "train", cfg, cfg.inputs(), fitted.__dict__)
    return fitted


def try_out(cfg: FusionConfig) -> Seen:
    """`cxray train CONFIG --dry-run`: one batch through everything; nothing is kept."""
    task, data, _ = opened(cfg)
    return dry_run(task, cfg.training, data)


def opened(cfg: FusionConfig) -> tuple[Fusion, Data, list[str]]:
    """The task, its rows, and what else decides the weights. Raises CxrayError for what does not go together."""
    sources = Sources(cfg)
    data = sources.data(cfg)
    check_validate(data, cfg.findings)
    return Fusion(cfg, sources), data, sources.made_by(cfg)


def check_validate(data: Data, findings: Sequence[str]) -> None:
    """Raises CxrayError where validate has both classes of no finding: no epoch could be called the best. Says which findings it lacks."""
    column = data.small_columns("validate", ["target"])["target"].combine_chunks()
    target = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, len(findings))
    lacking = [f for f, there in zip(findings, (target == 1).any(0) & (target == 0).any(0), strict=True) if not there]
    if len(lacking) == len(findings):
        raise CxrayError(
            "validate has positives and negatives of none of the findings, so the best epoch could not be told: name others (`findings`), "
            "or make a cohort with more studies to validate on"
        )
    if lacking:
        log.warning("validate has not both positives and negatives of %s: the best epoch is chosen by the others", ", ".join(lacking))
