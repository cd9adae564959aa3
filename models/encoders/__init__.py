"""One string names one encoder: images or texts in, vectors and token states out.

    open_clip:hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224      image and text, one space
    open_clip:local-dir:/path  open_clip:/path  open_clip:ViT-B-32/openai          the same from a folder, or by tag
    hf:microsoft/rad-dino  hf:/path                    image (ViT, DINOv2) or text (BERT, ModernBERT)
    st:all-MiniLM-L6-v2  st:/path                      text, a sentence-transformers model
    hog:                                               image, without weights
    nvclip:http://host:8000                            image and text, one space, by NVIDIA's NV-CLIP service
    run:/path                                          an encoder that cxray trained (not built yet)

Several names with `|` between them are tried in order; which one is used, and why not those before it, is said aloud.
The heavy libraries are imported by the scheme that needs them, when it is asked for.
"""

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from contracts.errors import CxrayError

if TYPE_CHECKING:
    from models.encoders.base import ImageEncoder, TextEncoder

log = logging.getLogger(__name__)

SCHEMES = {"open_clip": "openclip", "hf": "hf", "st": "st", "hog": "hog", "nvclip": "nvclip", "run": ""}


def load_image(name: str, device: str | None = None) -> "ImageEncoder":
    """The image encoder of that name, on `device` ('cpu', 'cuda:1'; None: the GPU where there is one).

    Its `name` is the one of the alternatives that was loaded.
    Raises CxrayError if a scheme is unknown, or if no alternative can be loaded or has an image tower.
    """
    return _first(name, "image", device)


def load_text(name: str, device: str | None = None) -> "TextEncoder":
    """The text encoder of that name; as `load_image`."""
    return _first(name, "text", device)


def load_known(tower: Literal["image", "text"], about: Mapping[str, Any], then: str, device: str | None = None) -> Any:
    """The encoder by which something was made. about: its name and fingerprint, as noted there; then: what was made, for a sentence.

    Raises CxrayError as `load_image` does, and where it has other weights now.
    """
    encoder = _first(about["name"], tower, device)
    if encoder.fingerprint != about["fingerprint"]:
        raise CxrayError(f"`{about['name']}` has other weights now than {then}; put those back, or make that again")
    return encoder


def _first(names: str, tower: str, device: str | None) -> Any:
    alternatives = [name.strip() for name in names.split("|")]
    for name in alternatives:  # a misspelt scheme is a mistake in the config, not a reason to fall back
        scheme, colon, _ = name.partition(":")
        if not colon or scheme not in SCHEMES:
            known = ", ".join(f"{scheme}:" for scheme in SCHEMES)
            raise CxrayError(f"no encoder is called '{name}': a name begins with one of {known}")
    failures: list[str] = []
    for name in alternatives:
        try:
            encoder = _load(name, tower, device)
        except CxrayError as error:
            failures.append(str(error))
            continue
        if failures:
            log.warning("using %s encoder %s, because: %s", tower, name, "; ".join(failures))
        return encoder
    raise CxrayError("; ".join(failures))


def _load(name: str, tower: str, device: str | None) -> Any:
    scheme, _, source = name.partition(":")
    if scheme == "run":
        raise CxrayError(f"{name}: encoders from cxray's own run folders are not built yet; name another scheme")
    module = import_module(f"models.encoders.{SCHEMES[scheme]}")
    load = getattr(module, f"load_{tower}", None)
    if load is None:
        raise CxrayError(f"{name}: {scheme}: has no {tower} tower")
    from models.encoders.device import choose
    from models.encoders.weights import loading

    try:
        with loading(source or scheme):
            encoder = load(source, choose(device))
    except CxrayError as error:
        raise CxrayError(f"cannot load {tower} encoder {name}: {error}") from None
    encoder.name = name
    return encoder
