"""Stage 2 of the fusion network: its encoders train along, on the stored pictures, decoded and augmented as they come, and on the words
of notes and passages.

    unfreeze: {start: runs/fusion, lr_scale: 0.1, layer_decay: 0.8}      # in the config of `cxray train`

`features` still says which image encoder it is, and how coarse its grid; `texts` which text encoder, and which passages a note fetches.
These were found with the encoder as it was, and a model in use finds them so too: what is trained is how the network reads them.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from contracts.config import Config
from contracts.errors import CxrayError
from contracts.storage import Place
from models.encoders import load_known
from models.mdfnet import MDFNet
from models.unfrozen import Unfrozen
from trainers.augment import Augment

Side = Literal["image", "text"]
FILES: dict[Side, str] = {"image": "encoder.safetensors", "text": "text_encoder.safetensors"}
BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks|resblocks)\.(\d+)\.")  # transformers, timm, open_clip
BELOW = re.compile(r"embed|token|(?:^|\.)conv1\.|ln_pre|norm_pre")  # what stands before the first block


class Unfreeze(Config):
    images: str = "images"  # the stored pictures that the features were made of
    encoders: tuple[Side, ...] = ("image", "text")  # that train along; `text` where the network is shown text
    start: str | None = None  # a run of stage 1, whose weights the fusion network begins with; null: fresh ones
    lr_scale: float = Field(default=0.1, gt=0)  # the rate of an encoder's top, as a share of `lr`
    layer_decay: float = Field(default=0.8, gt=0, le=1)  # the rate of each block, as a share of that of the block above it
    augment: Augment | None = Augment()  # of the train split alone

    @field_validator("encoders")
    @classmethod
    def _sees(cls, encoders: tuple[Side, ...]) -> tuple[Side, ...]:
        if "image" not in encoders:
            raise ValueError("the image encoder trains along in stage 2: name image too")
        return encoders


def encoder(side: Side, about: Mapping[str, Any]) -> Any:
    """The ImageEncoder that the features were made by, or the TextEncoder of the texts, on the CPU.

    Raises CxrayError where it is another one now, or has no weights to train.
    """
    found = load_known(side, about, f"the {'features' if side == 'image' else 'texts'} were made with", "cpu")
    _ = found.module  # raises where there is nothing to train
    return found


def unfrozen(about: Mapping[Side, Any], sides: Sequence[Side], fusion: MDFNet) -> Unfrozen:
    """The network to train, on the CPU. about: both encoders; sides: those that train along."""
    text = encoder("text", about["text"]) if "text" in sides else None
    module = Unfrozen(encoder("image", about["image"]), fusion, about["image"]["grid"], text)
    module.freeze_unused()
    return module


def start(run: Place, wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fusion network's weights after a run of stage 1. wanted: of its config.json, what has to be the same (see `same`).

    Raises CxrayError where there is no such run, or where it learnt from other inputs.
    """
    file = run / "model" / "config.json"
    if not file.exists():
        raise CxrayError(f"start: {run} has no model/config.json; name the folder of a finished `cxray train`")
    said = json.loads(file.read())
    if said.get("unfreeze"):
        raise CxrayError(f"start: {run} has trained its encoders already; name a run of stage 1")
    there, here = same(said), same(wanted)
    if other := [name for name in here if there[name] != here[name]]:
        raise CxrayError(f"start: {run} was trained with another {', '.join(other)} than this config has; name a run that fits, or none")
    return safetensors.torch.load((run / "model" / "model.safetensors").read())


def same(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json, what two models must share for weights of one to mean something in the other."""
    encoders = said.get("encoders") or {}
    network = {k: v for k, v in (said.get("network") or {}).items() if not k.startswith("drop")}
    return {
        "image encoder": {k: (encoders.get("image") or {}).get(k) for k in ("fingerprint", "grid")},
        "text encoder": (encoders.get("text") or {}).get("fingerprint"),
        "knowledge": (said.get("knowledge") or {}).get("fingerprint"),
        "network": json.dumps(network, sort_keys=True),
        "findings": list(said.get("findings") or ()),
    }


def groups(tower: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
    """An encoder's parameters for AdamW, by depth: the top (last norm, projection) at `rate`, each block below at `decay` times the one
    above it, what stands before the first block lowest (ELECTRA, Clark et al. 2020, arXiv:2003.10555; BEiT, Bao et al. 2022,
    arXiv:2106.08254). No weight decay on biases and norms."""
    trained = [(name, p) for name, p in tower.named_parameters() if p.requires_grad]
    blocks = {name: int(at[1]) for name, _ in trained if (at := BLOCK.search(name))}
    count = max(blocks.values(), default=-1) + 1
    alike: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        depth = count - blocks[name] if name in blocks else count + 1 if BELOW.search(name) else 0
        alike.setdefault((depth, parameter.ndim < 2), []).append(parameter)
    return [
        {"params": parameters, "lr": rate * decay**depth, **({"weight_decay": 0.0} if flat else {})}
        for (depth, flat), parameters in sorted(alike.items(), key=lambda item: item[0])
    ]


def save(module: Unfrozen, folder: Path) -> None:
    """The encoders as they are now, beside the fusion network's weights."""
    towers: dict[Side, nn.Module | None] = {"image": module.encoder, "text": module.text_encoder}
    for side, tower in towers.items():
        if tower is not None:
            weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tower.state_dict().items()}
            safetensors.torch.save_file(weights, folder / FILES[side])


def tuned(side: Side, base: Any, model: Place) -> Any:
    """The encoder `base` with the weights that `save` left in the folder `model`, and a fingerprint of their own: its vectors are others
    now.

    Raises CxrayError where they are missing or another encoder's.
    """
    file = model / FILES[side]
    if not file.exists():
        raise CxrayError(
            f"{file}: the weights of the {side} encoder are missing; delete the run's run.json, and `cxray train` exports them again"
        )
    weights = file.read()
    try:
        base.module.load_state_dict(safetensors.torch.load(weights))
    except (SafetensorError, RuntimeError):
        raise CxrayError(f"{file}: does not hold weights of `{base.name}`; train the model again") from None
    base.fingerprint = hashlib.sha256(base.fingerprint.encode() + weights).hexdigest()
    return base
