"""What the gateway asks, in this process: canned answers, and an image deployment that really reads images."""

import asyncio
import base64
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from contracts.errors import RowError
from contracts.findings import FINDINGS
from models.encoders import load_image
from models.encoders.base import TextOutput
from pipelines.features import encoded
from pipelines.images.decode import decode
from pipelines.images.stored import SIDE, from_stored, to_stored
from serve.backends import Backends
from serve.messages import (
    Classified,
    Encoded,
    Evidence,
    Example,
    ExampleHead,
    Finding,
    Loaded,
    Match,
    PassageRead,
    Question,
    SegmentRead,
)

STORED = b"\xff\xd8\xff stored"


class Method:
    """`.remote(...)`: awaitable, as a handle's. asked: the arguments of each call so far; cancelled: how many were given up."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.asked: list[tuple] = []
        self.cancelled = 0

    async def remote(self, *args: Any) -> Any:
        self.asked.append(args)
        try:
            said = self.run(*args)
            return await said if asyncio.iscoroutine(said) else said
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class Fake:
    """A handle whose methods are these functions, plain or async."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, run in methods.items():
            setattr(self, name, Method(run))


def loaded(name: str, route: str) -> Loaded:
    return Loaded(name=name, task=name, route=route, fingerprint="f" * 24, data={"rows": 2}, metrics={"macro_auroc": 0.5}, card="# A card")


def looks_like_an_image(data: bytes) -> Encoded | RowError:
    if not data:
        return RowError("empty_file")
    if data.startswith((b"\xff\xd8\xff", b"\x89PNG")) or data[128:132] == b"DICM":
        return Encoded({"embedding": np.array([0.6, 0.8], np.float32)}, STORED)
    return RowError("not_an_image")


def classified(images: list[Encoded], chart: dict | None, evidence: bool, overlay: bool, knowledge: bool) -> Classified | RowError:
    """The more images the likelier everything; the chart adds what the age says."""
    if not images and chart is None:
        return RowError("nothing_to_read")
    probability = min(1.0, 0.1 * len(images) + ((chart or {}).get("age") or 0) / 1_000)
    read: list[Any] = ["image"] * bool(images) + ["chart"] * (chart is not None)
    made = Classified(
        model="fusion",
        calibrated=True,
        findings=[Finding(name=name, probability=probability, threshold=0.5, positive=probability >= 0.5) for name in FINDINGS],
        images=len(images),
        read=read,
    )
    if evidence and chart is not None:
        passage = PassageRead(id="p1", text="A passage.", score=0.5, asked_by="vitals", share=0.5)
        made.evidence = Evidence(note=[SegmentRead(name="vitals", text="SpO2 91 %.", share=0.5)], passages=[passage] if knowledge else [])
    if overlay:
        made.overlays = [base64.b64encode(b"png").decode()] * len(images)
    return made


def found(question: Question) -> list[Match]:
    match = Match(study_id="50000001", split="train", view="PA", score=0.7, labels={"Edema": 1}, impression="Edema.")
    return [match] * min(question.k, 2)


def vectors(texts: list[str]) -> TextOutput:
    count = len(texts)
    return TextOutput(np.tile(np.array([[0.6, 0.8]], np.float32), (count, 1)), np.full(count, 3), np.zeros(count, bool))


def example(name: str) -> Example | None:
    chart = {"age": 67.0, "sex": "F"}
    return Example(id="e1", title="PA", images=["QUJD"], chart=chart, report="A report.", labels={"Edema": 1}) if name == "e1" else None


def quick(**others: Any) -> Backends:
    """Canned answers, at once; `others` in their place, None for one that is not there."""
    fakes = {
        "image": Fake(encode=looks_like_an_image, about=lambda: {"name": "hog:", "fingerprint": "f", "dim": 2}),
        "text": Fake(
            encode=vectors, count=lambda texts: np.full(len(texts), 3), about=lambda: {"name": "toy:", "fingerprint": "f", "dim": 2}
        ),
        "fusion": Fake(classify=classified, about=lambda: loaded("fusion", "/v1/classify")),
        "search": Fake(search=found, about=lambda: loaded("search", "/v1/search")),
        "examples": Fake(list=lambda: [ExampleHead(id="e1", title="PA")], one=example, about=lambda: {"name": "examples"}),
    }
    return Backends(**(fakes | others))


def reading_images(encoder: str = "hog:", grid: int = 7) -> Fake:
    """An image deployment that really decodes, stores and encodes, in a thread; one at a time."""
    network, alone = load_image(encoder, "cpu"), threading.Lock()

    def encode(data: bytes) -> Encoded | RowError:
        with alone:
            try:
                stored = to_stored(decode(data, at_least=SIDE)).jpeg
                return Encoded(encoded(network, min(grid, network.grid), from_stored(stored)[None])[0], stored)
            except RowError as error:
                return error

    about = {"name": network.name, "fingerprint": network.fingerprint, "dim": network.dim}
    return Fake(encode=lambda data: asyncio.to_thread(encode, data), about=lambda: about)
