"""`open_clip:` — image and text towers that share one space: BiomedCLIP's kind (timm ViT and a BERT) and CLIP's own.

From a folder only `open_clip_model.safetensors` is read. From the hub safetensors are preferred; where a repository has
only a pickle, open_clip reads it with `torch.load(weights_only=True)`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from contracts.errors import CxrayError
from models.encoders.base import PAD, ImageEncoder, ImageOutput, TextEncoder, unit
from models.encoders.device import autocast, on, together
from models.encoders.pixels import Pixels
from models.encoders.weights import fingerprint, local_folder, tokenizer_settings

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


class OpenClipImage(ImageEncoder):
    """open_clip's `encode_image`. Tokens: the last layer's patch states, before the projection; none for a tower that
    is not a plain vision transformer."""

    joint = True

    def __init__(self, visual: Any, device: torch.device) -> None:
        self.visual, self.device = visual, device
        settings = visual.preprocess_cfg
        height, width = np.broadcast_to(settings["size"], 2).tolist()
        if height != width:
            raise CxrayError(f"it sees {height} x {width} px; cxray's pictures are square")
        mean, std = (tuple(np.broadcast_to(settings[key], 3).tolist()) for key in ("mean", "std"))
        self.pixels = Pixels(height, height, settings["interpolation"], mean, std)
        self.size, self.grid = height, _grid(visual)
        if self.grid and not hasattr(visual, "trunk"):
            visual.output_tokens = True
        self.fingerprint = fingerprint(visual.state_dict(), {"pixels": vars(self.pixels)})
        self.dim, self.token_dim = 0, 0
        blank = self.encode(np.zeros((1, height, height), np.uint8))  # towers state their widths in too many ways
        self.dim = blank.embedding.shape[1]
        self.token_dim = 0 if blank.tokens is None else blank.tokens.shape[2]

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> ImageOutput:
        pixels = self.pixels(images, self.device)
        with autocast(self.device):
            embedding, tokens = self._forward(pixels)
        return ImageOutput(
            unit(embedding.float().cpu().numpy()),
            None if tokens is None else tokens.float().cpu().numpy(),
        )

    @property
    def module(self) -> nn.Module:
        return self.visual

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._forward(self.pixels.of(images))

    def _forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.grid:
            return self.visual(pixels), None
        if hasattr(self.visual, "trunk"):  # timm: its forward() is these three steps, and keeps the states to itself
            trunk = self.visual.trunk
            states = trunk.forward_features(pixels)
            return self.visual.head(trunk.forward_head(states)), states[:, trunk.num_prefix_tokens :]
        return self.visual(pixels)


@dataclass(frozen=True)
class Tokeniser:
    """Texts -> `ids` int64 [B, L]. pad: of a BERT, which masks its padding: columns that are all padding only cost time."""

    tokenizer: Any
    pad: int | None

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        ids = self.tokenizer(texts)
        if self.pad is not None:
            longest = int((ids != self.pad).any(0).nonzero().max()) + 1
            ids = ids[:, : -(-longest // PAD) * PAD]
        return {"ids": ids}


class OpenClipText(TextEncoder):
    """open_clip's `encode_text`. Token states: the last layer's, after its norm and before the projection."""

    joint = True

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.model, self.tokenizer, self.device, self.together = model, tokenizer, device, together(device)
        model.visual = None  # the image tower is the other encoder's
        tower = getattr(model, "text", model)
        self.tokenise = Tokeniser(tokenizer, tower.config.pad_token_id if hasattr(tower, "config") else None)
        self.last = tower.transformer if hasattr(tower, "config") else tower.ln_final
        self.context = tokenizer.context_length
        rules = tokenizer.tokenizer if hasattr(tokenizer, "tokenizer") else None
        settings = {
            "context": self.context,
            "clean": tokenizer.clean_fn.__name__ if hasattr(tokenizer, "clean_fn") else "",
            "tokenizer": tokenizer_settings(rules) if rules is not None else tokenizer.vocab_size,
        }
        self.fingerprint = fingerprint(model.state_dict(), settings)
        embedding, states = self._forward([""])
        self.dim, self.token_dim = embedding.shape[1], states.shape[-1]

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        if hasattr(self.tokenizer, "encode"):  # CLIP's own: start and end of text come on top
            return np.array([len(self.tokenizer.encode(text)) + 2 for text in texts], np.int64)
        clean = getattr(self.tokenizer, "clean_fn", str)
        ids = self.tokenizer.tokenizer([clean(text) for text in texts], verbose=False).input_ids if texts else []
        return np.array([len(row) for row in ids], np.int64)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> np.ndarray:
        return self.forward(on(self.device, self.tokenise(texts))).float().cpu().numpy()

    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        states = self._forward(texts)[1].float().cpu().numpy()
        if states.ndim != 3:
            raise CxrayError(f"{self.name} keeps its token states to itself; take embeddings, or another text encoder")
        lengths = np.minimum(self.count_tokens(texts), self.context)
        return [state[:length] for state, length in zip(states, lengths)]

    @property
    def module(self) -> nn.Module:
        return self.model

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model.encode_text(tokens["ids"])

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = on(self.device, self.tokenise(texts))
        seen: list[Any] = []
        hook = self.last.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            embedding = self.forward(tokens)
        finally:
            hook.remove()
        return embedding, getattr(seen[-1], "last_hidden_state", seen[-1])


def load_image(source: str, device: torch.device) -> OpenClipImage:
    """See `_model` for what `source` can be."""
    return OpenClipImage(_model(source, device)[0].visual, device)


def load_text(source: str, device: torch.device) -> OpenClipText:
    """See `_model` for what `source` can be."""
    import open_clip

    model, name = _model(source, device)
    words = (open_clip.get_model_config(name) or {}).get("text_cfg", {}).get("hf_tokenizer_name")
    options: dict[str, Any] = {"trust_remote_code": False} if words else {}  # CLIP's own tokenizer takes no such word
    return OpenClipText(model, open_clip.get_tokenizer(name, **options), device)


def _model(source: str, device: torch.device) -> tuple[Any, str]:
    """`hf-hub:org/name`, `local-dir:/path`, `/path` or `architecture/tag` -> the model, and open_clip's name for it."""
    import open_clip
    from transformers import AutoConfig

    folder = None if source.startswith("hf-hub:") else local_folder(source.removeprefix("local-dir:"))
    tag = None
    if folder:
        name = f"local-dir:{folder}"
        _check(folder)
    elif source.startswith("hf-hub:"):
        name = source
    elif source.startswith("local-dir:"):
        raise CxrayError(f"there is no folder {source.removeprefix('local-dir:')}")
    else:
        name, _, tag = source.rpartition("/")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags:
            hint = f"{name} has the tags {', '.join(tags)}" if tags else "see open_clip.list_pretrained()"
            raise CxrayError(f"no folder {source}, and open_clip knows no such architecture/tag: {hint}")

    text_cfg = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    if tower := text_cfg.get("hf_model_name"):
        if folder and (folder / tower).is_dir():
            tower = str(folder / tower)
        try:  # open_clip would ask on the terminal whether to run a repository's code
            AutoConfig.from_pretrained(tower, trust_remote_code=False)
        except (OSError, ValueError):
            raise CxrayError(
                f"cannot get the config of its text tower {tower}: without the hub, put that model's config.json into "
                f'the folder and set "hf_model_name": "." in its {CONFIG}'
            ) from None
        text_cfg = {**text_cfg, "hf_model_name": tower, "hf_model_pretrained": False}
    options: dict[str, Any] = {"text_cfg": text_cfg} if folder else {}
    model = open_clip.create_model(name, tag, device=device, pretrained_text=False, require_pretrained=True, weights_only=True, **options)
    return model.eval(), name


def _check(folder: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise CxrayError(
                f"{folder} has no {file}; cxray opens no pickled weights from a folder: convert them with safetensors.torch.save_file"
            )
    json.loads((folder / CONFIG).read_text())


def _grid(visual: Any) -> int:
    """n of the n x n patches of a plain vision transformer, else 0."""
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        shape = trunk.patch_embed.grid_size if hasattr(trunk, "num_prefix_tokens") else (0, 0)
    else:
        plain = getattr(visual, "attn_pool", "") is None and visual.pool_type != "none"
        shape = visual.grid_size if plain else (0, 0)
    return shape[0] if shape[0] == shape[1] else 0
