"""Weights on disk: found, safe to open, and named by what they are."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from contracts.errors import CxrayError

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, or None where it can only be a name on the hub.

    Raises CxrayError where it is written as a path and there is no such folder.
    """
    if not source:
        raise CxrayError("no folder or name stands after the colon")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.startswith(("/", "./", "../", "~")):
        raise CxrayError(f"there is no folder {source}")
    return None


def refuse_pickles(folder: Path) -> None:
    """Raises CxrayError if weights lie in this very folder only as pickles, which can run code when opened."""
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES and not any(folder.glob("*.safetensors")):
            raise CxrayError(
                f"{path} is a pickle, and no .safetensors lies beside it: convert it on a machine you do not mind "
                "(load it with torch.load(weights_only=True), write it with safetensors.torch.save_file)"
            )


@contextmanager
def loading(where: str) -> Iterator[None]:
    """Turns whatever a model library raises into one line for the user; the traceback goes to the debug log."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of a second's loading, in each actor
    try:
        yield
    except CxrayError:
        raise
    except Exception as error:  # what a folder or a hub can hold is not ours, so neither is the list of errors
        logging.getLogger(__name__).debug("loading from %s failed", where, exc_info=True)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = lines[0][:300] if lines else type(error).__name__
        raise CxrayError(f"looked in {where}: {cause}") from None


def fingerprint(state: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> str:
    """sha256 hex over the names, dtypes, shapes and bytes of a state dict, and over JSON settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """What a Hugging Face tokenizer does to a text, as JSON; how it last padded or cut is left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    rules = json.loads(backend.to_str())
    return {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
