"""`hf:` — models of the transformers library: ViT and DINOv2 for images (RAD-DINO), BERT and ModernBERT for texts.

Weights are safetensors, in a folder or on the hub; a repository's own code is never run.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from contracts.errors import CxrayError
from models.encoders.base import ImageEncoder, ImageOutput, TextEncoder, padding, unit
from models.encoders.device import autocast, on, together
from models.encoders.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels
from models.encoders.weights import fingerprint, local_folder, refuse_pickles, tokenizer_settings

log = logging.getLogger(__name__)


class HfImage(ImageEncoder):
    """Embedding: the class token's last state after the final norm (which RAD-DINO's model card takes), at length 1.
    Tokens: the patches' last states; class and register tokens are left out."""

    joint = False

    def __init__(self, model: Any, pixels: Pixels, device: torch.device) -> None:
        self.model, self.pixels, self.device = model, pixels, device
        self.size = pixels.size
        self.grid = pixels.size // model.config.patch_size
        self.dim = self.token_dim = model.config.hidden_size
        self.fingerprint = fingerprint(model.state_dict(), {"pixels": vars(pixels)})

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> ImageOutput:
        pixels = self.pixels(images, self.device)
        with autocast(self.device):
            embedding, tokens = self._forward(pixels)
        return ImageOutput(unit(embedding.float().cpu().numpy()), tokens.float().cpu().numpy())

    @property
    def module(self) -> nn.Module:
        return self.model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._forward(self.pixels.of(images))

    def _forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model(pixel_values=pixels).last_hidden_state
        # Patches come last in all of these models, after the class token and however many registers there are.
        return states[:, 0], states[:, states.shape[1] - self.grid**2 :]


@dataclass(frozen=True)
class Tokeniser:
    """Texts -> `input_ids`, `attention_mask` (and what else the tokenizer gives), int64 [B, L]."""

    tokenizer: Any
    context: int
    prompt: str = ""  # before each text

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        how = {"padding": True, "pad_to_multiple_of": padding(self.context), "truncation": True, "max_length": self.context}
        return dict(self.tokenizer([self.prompt + text for text in texts], **how, return_tensors="pt"))


class HfText(TextEncoder):
    """Embedding: the mean of the last states over all tokens that are not padding, at length 1."""

    joint = False

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model, self.tokenizer, self.device, self.together = model, tokenizer, device, together(device)
        config = model.config
        # RoBERTa's kind numbers its positions from the padding token's id + 1, so the table is that much longer.
        unused = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        self.context = min(tokenizer.model_max_length, config.max_position_embeddings - unused)
        self.tokenise = Tokeniser(tokenizer, self.context)
        self.dim = self.token_dim = config.hidden_size
        settings = {
            "context": self.context,
            "padding": padding(self.context),
            "pooling": "mean",
            "tokenizer": tokenizer_settings(tokenizer),
        }
        self.fingerprint = fingerprint(model.state_dict(), settings)

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        ids = self.tokenizer(texts, verbose=False).input_ids if texts else []
        return np.array([len(row) for row in ids], np.int64)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> np.ndarray:
        return self.forward(on(self.device, self.tokenise(texts))).cpu().numpy()

    @torch.inference_mode()
    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        tokens = on(self.device, self.tokenise(texts))
        return [state[keep.bool()].cpu().numpy() for state, keep in zip(self._states(tokens), tokens["attention_mask"])]

    @property
    def module(self) -> nn.Module:
        return self.model

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = tokens["attention_mask"][..., None].float()
        return (self._states(tokens) * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _states(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state.float()


def load_image(source: str, device: torch.device) -> HfImage:
    """`source`: a folder in transformers' layout, or a name on the hub."""
    place, config = _config(source)
    if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
        raise CxrayError(f"a {config.model_type} model has no image tower that hf: can read")
    return HfImage(_model(place, device), _pixels(place, config), device)


def load_text(source: str, device: torch.device) -> HfText:
    """`source`: a folder in transformers' layout, or a name on the hub."""
    from transformers import AutoTokenizer

    if (Path(source).expanduser() / "modules.json").is_file():
        raise CxrayError(f"{source} is a sentence-transformers model, which says how to pool: name it st:{source}")
    place, config = _config(source)
    if not hasattr(config, "vocab_size") or not hasattr(config, "max_position_embeddings"):
        raise CxrayError(f"a {config.model_type} model has no text tower that hf: can read")
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    return HfText(_model(place, device), tokenizer, device)


def _config(source: str) -> tuple[str, Any]:
    from transformers import AutoConfig

    folder = local_folder(source)
    if folder:
        if not (folder / "config.json").is_file():
            raise CxrayError(f"{folder} has no config.json")
        refuse_pickles(folder)
    place = str(folder or source)
    return place, AutoConfig.from_pretrained(place, trust_remote_code=False)


def _model(place: str, device: torch.device) -> Any:
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(
        place, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused here; many checkpoints lack it, and then its weights are random at every load
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        kind = model.config.model_type
        raise CxrayError(f"its weights lack {len(missing)} tensors of a {kind}, such as {missing[0]}")
    return model.to(device).eval()


def _pixels(place: str, config: Any) -> Pixels:
    """What the model's image processor does; without one, the usual: its own size, bicubic, ImageNet's mean and std."""
    from transformers import AutoImageProcessor

    try:
        how = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError):
        side = config.image_size
        log.warning("%s has no preprocessor_config.json: assuming %d px, bicubic, ImageNet mean and std", place, side)
        return Pixels(side, side, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    resize = how.size.shortest_edge or how.size.height
    size = how.crop_size.height if getattr(how, "do_center_crop", False) else resize
    names = {2: "bilinear", 3: "bicubic"}
    mean, std = (how.image_mean, how.image_std) if how.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return Pixels(
        resize,
        size,
        names.get(int(how.resample), str(how.resample)),
        tuple(mean),
        tuple(std),
        how.rescale_factor if how.do_rescale else 1.0,
    )
