"""`nvclip:http://host:port` — NVIDIA's NV-CLIP service (a NIM) over HTTP: images and texts in one space, no tokens.

Documented at https://docs.api.nvidia.com/nim/reference/nvidia-nvclip-infer: POST /v1/embeddings with texts, or images
as base64 data URLs. Run the service yourself: MIMIC's data use agreement does not let images or
reports go to somebody else's. A key, where the service wants one, is read from NVCLIP_API_KEY at each request.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch

from contracts.errors import CxrayError
from models.encoders.base import ImageEncoder, ImageOutput, TextEncoder, unit

MODEL = "nvidia/nvclip"
SIDE = 224  # what the model sees; a PNG of that size stays far below the service's 200 KB an image
BATCH = 32
TIMEOUT_S = 60


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the picture to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


class Service:
    """One NV-CLIP service. dim: the width of its embeddings, asked for once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise CxrayError("the address must read http://host:port, with no query")
        if parts.username or parts.password:
            raise CxrayError("the address must not hold a key or a password: put the key into NVCLIP_API_KEY")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1/embeddings"
        self.opener = urllib.request.build_opener(_StayHere)
        self.dim = self.embed(["chest X-ray"]).shape[1]
        self.fingerprint = f"nvclip/1 {MODEL} {SIDE}px {self.dim}d"

    def embed(self, inputs: list[str]) -> np.ndarray:
        """float32 [B, dim] in the order of the inputs. Raises CxrayError if the service answers anything else."""
        parts = [self._post(inputs[start : start + BATCH]) for start in range(0, len(inputs), BATCH)]
        return np.concatenate(parts)

    def _post(self, inputs: list[str]) -> np.ndarray:
        body = json.dumps({"input": inputs, "model": MODEL, "encoding_format": "float"}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get("NVCLIP_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        try:
            with self.opener.open(request, timeout=TIMEOUT_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            # Not the body: it can repeat what was sent.
            hint = ": is NVCLIP_API_KEY right?" if error.code in (401, 403) else ""
            raise CxrayError(f"{self.url} answered HTTP {error.code}{hint}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise CxrayError(f"{self.url} did not answer ({reason}): is the service running there?") from None
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError):
            vectors = np.zeros(0)
        if vectors.ndim != 2 or len(vectors) != len(inputs):
            raise CxrayError(f"{self.url} did not answer with one embedding for each of {len(inputs)} inputs")
        return vectors


class NvClipImage(ImageEncoder):
    """Embeddings of pictures, sent as 224 px PNG; no tokens."""

    size, grid, token_dim, joint = SIDE, 0, 0, True

    def __init__(self, service: Service) -> None:
        self.service, self.dim, self.fingerprint = service, service.dim, service.fingerprint

    def encode(self, images: np.ndarray) -> ImageOutput:
        return ImageOutput(unit(self.service.embed([_data_url(image) for image in images])), None)


class NvClipText(TextEncoder):
    """Embeddings of texts. The service does not say how it tokenises: lengths are 0, and none is flagged as cut."""

    token_dim, context, joint = 0, 0, True

    def __init__(self, service: Service) -> None:
        self.service, self.dim, self.fingerprint = service, service.dim, service.fingerprint

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        return np.zeros(len(texts), np.int64)

    def embed(self, texts: list[str]) -> np.ndarray:
        return self.service.embed(texts)

    def embed_tokens(self, texts: list[str]) -> list[np.ndarray]:
        raise CxrayError(f"{self.name} gives no token states; take embeddings, or another text encoder")


def load_image(source: str, device: torch.device) -> NvClipImage:
    """`source`: http://host:port. The device is the service's."""
    return NvClipImage(Service(source))


def load_text(source: str, device: torch.device) -> NvClipText:
    """`source`: http://host:port. The device is the service's."""
    return NvClipText(Service(source))


def _data_url(image: np.ndarray) -> str:
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    done, png = cv2.imencode(".png", small)
    if not done:
        raise ValueError("OpenCV could not write a PNG")
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()
