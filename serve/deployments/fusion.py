"""The fusion network of a trained run: encoded images, a chart, or both -> probabilities of the findings, and what they rest on."""

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from contracts.errors import CxrayError, RowError
from contracts.runs import read_run
from contracts.storage import Place
from serve.backends import by_value
from serve.deployments.image import ImageSource
from serve.deployments.text import RemoteText, TextSource
from serve.messages import Classified, Encoded, Evidence, Finding, Loaded, PassageRead, SegmentRead
from serve.settings import Batched
from serve.worker import Worker, answer, together

if TYPE_CHECKING:
    from contracts.chart import Chart
    from pipelines.inputs.reading import Reading
    from serve.app import Graph
    from trainers.predictor import Part, Prediction

KEPT = 1 << 12  # entries of a kind that are kept written out: in training they are many more, but here they are words of patients


class Settings(Batched):
    run: str = "fusion"
    evaluation: str | None = None  # what `cxray evaluate` made of it, to be shown with the model


def build(graph: "Graph", settings: Settings) -> Any:
    """Raises CxrayError where the run, or its evaluation, is not there."""
    run = graph.at(settings.run)
    said = graph.json(run, "model/config.json", "no model here; name the folder of a finished `cxray train`")
    if said.get("task") != "fusion" or "encoders" not in said:
        raise CxrayError(f"{run}: holds a model of the task {said.get('task')!r}; models.fusion serves the task 'fusion'")
    judged = graph.at(settings.evaluation) if settings.evaluation else None
    if judged is not None:
        graph.json(judged, "metrics.json", "no evaluation here; name the folder of a finished `cxray evaluate`")
    image, text = (said["encoders"][side] if side in said["modalities"] else None for side in ("image", "text"))
    of = ImageSource(image, run if said.get("unfreeze") else None, said["dicom"]) if image else None
    ask = graph.text(TextSource(text["name"], text["fingerprint"])) if text else None
    return graph.deploy("fusion", Fusion, settings, run, judged, graph.image(of) if of else None, ask)


class Fusion:
    """Charts are read in one thread, the network runs in another: each in batches of what came meanwhile."""

    def __init__(self, settings: Settings, run: Place, judged: Place | None, image: Any, text: Any) -> None:
        """image: an encoder to see pictures again by, where uploads were encoded by another; text: the notes' encoder, a handle."""
        from pipelines.pool import one_thread_on_cpu
        from trainers.predictor import Model

        one_thread_on_cpu()
        self.run, self.judged, self.image, self.text = run, judged, by_value(image), by_value(text)
        self.model = Model(run)
        self._read: Any = None
        self._reader, self._network = Worker(settings.timeout_s), Worker(settings.timeout_s)
        for batched in (self._readings, self._said):
            batched.set_max_batch_size(settings.batch)
            batched.set_batch_wait_timeout_s(settings.wait_s)
        self._healthy, self._loaded = self._answer(), self._card()

    async def classify(
        self,
        images: list[Encoded],
        chart: Mapping[str, Any] | None,
        evidence: bool = False,
        overlay: bool = False,
        knowledge: bool = True,
    ) -> Classified | RowError:
        """A study: of several images the probabilities are averaged. knowledge: False leaves passages out."""
        if "image" not in self.model.shown:
            images = []
        elif self.image is not None:
            seen = await together(answer(self.image.encode_stored.remote(one.stored)) for one in images)
            if wrong := next((one for one in seen if isinstance(one, RowError)), None):
                return wrong
            images = seen
        known = await self._known(chart, knowledge)
        if isinstance(known, RowError):
            return known
        repaired, reading = known
        if not images and repaired is None:
            return RowError("nothing_to_read", f"the model reads {', '.join(self.model.shown)}")
        parts = self.parts(images, repaired, reading)
        await self._network.free()
        said = await self._said((parts, evidence or overlay))
        overlays = await asyncio.to_thread(_overlays, images, said) if overlay and images else None
        return self._classified(images, repaired, said, evidence and reading is not None, overlays)

    async def about(self) -> Loaded:
        return self._loaded

    async def check_health(self) -> None:
        await self._inputs()  # Ray asks once before a replica is given any requests: it is ready then
        await self._reader.probe(bool)  # reading a chart would ask the text encoder, which is asked after its own health
        said = await self._network.probe(self._answer)
        if said is not None and not np.allclose(said, self._healthy, atol=1e-3):
            raise RuntimeError("the network does not say any more what it said at its start")

    def parts(self, images: Sequence[Encoded], chart: "Chart | None", reading: "Reading | None") -> "list[Part]":
        """What the network is shown of a study: once for each image, or the chart alone."""
        from trainers.predictor import Part

        return [Part(row, chart, reading) for row in ([one.row for one in images] or [None])]

    def say(self, studies: "Sequence[tuple[list[Part], bool]]") -> "list[list[Prediction]]":
        """Of each study's parts; with the attention where a study wants it."""
        said = iter(self.model.say([part for parts, _ in studies for part in parts], any(wanted for _, wanted in studies)))
        return [[next(said) for _ in parts] for parts, _ in studies]

    def read(self, inputs: Any, charts: Sequence[tuple[Mapping[str, Any], bool]]) -> list[Any]:
        """(repaired chart, its reading) of each, or why it cannot be read. charts: each with whether it fetches passages."""
        found: list[Any] = []
        for given, _ in charts:
            try:
                found.append(self.model.chart(given))
            except RowError as error:
                found.append(error)
        good = [(one, asks) for one, (_, asks) in zip(found, charts, strict=True) if one is not None and not isinstance(one, RowError)]
        readings: Iterator[Any] = repeat(None)
        if inputs is not None and good:
            readings = iter(inputs([one for one, _ in good], asking=[asks for _, asks in good]))
        return [one if isinstance(one, RowError) else (one, next(readings) if one is not None else None) for one in found]

    async def _known(self, chart: Mapping[str, Any] | None, knowledge: bool) -> Any:
        if chart is None:
            return None, None
        await self._reader.free()
        return await self._readings((chart, knowledge))

    async def _inputs(self) -> Any:
        """What reads charts; None for a network that reads no text."""
        from pipelines.inputs.notes import NoteWriter

        if self._read is None and self.text is not None:
            about, timeout_s = await self.text.about.remote(), self._reader.timeout_s
            self._read = self.model.inputs(RemoteText(self.text, about, asyncio.get_running_loop(), timeout_s))
            self._read.write = NoteWriter(self._read.cfg.notes, KEPT)
        return self._read

    @serve.batch
    async def _readings(self, charts: list[tuple[Mapping[str, Any], bool]]) -> list[Any]:
        return await self._reader.run(self.read, await self._inputs(), charts)

    @serve.batch
    async def _said(self, studies: "list[tuple[list[Part], bool]]") -> "list[list[Prediction]]":
        return await self._network.run(self.say, studies)

    def _answer(self) -> np.ndarray:
        """Of a study of which nothing is known but that it has an image and a chart."""
        from trainers.predictor import NOTHING, Part

        task = self.model.task
        row: dict[str, Any] = {"embedding": np.full(task.image_dim, task.image_dim**-0.5, np.float32)}
        if task.has_tokens:
            scales = np.full(task.patches, 0.01, np.float16)
            row |= {"tokens": bytes([64]) * (task.patches * task.token_dim), "token_scales": scales.tobytes()}
        (said,) = self.model.say([Part(row, NOTHING, None)])
        return np.array(list(said.probabilities.values()))

    def _classified(
        self, images: Sequence[Encoded], chart: Any, said: "Sequence[Prediction]", evidence: bool, overlays: list[str | None] | None
    ) -> Classified:
        mean = np.mean([list(one.probabilities.values()) for one in said], axis=0).tolist()
        findings = [
            Finding(name=name, probability=p, threshold=t, positive=p >= t)
            for (name, t), p in zip(said[0].thresholds.items(), mean, strict=True)
        ]
        return Classified(
            model=self.run.name,
            calibrated=self.model.calibration is not None,
            findings=findings,
            images=len(images),
            read=[*(["image"] if images else []), *(["chart"] if chart is not None else [])],
            evidence=self._evidence(said) if evidence else None,
            overlays=overlays,
            pictures=[base64.b64encode(one.stored).decode() for one in images] if overlays is not None else None,
        )

    def _evidence(self, said: "Sequence[Prediction]") -> Evidence:
        def share(name: str) -> float:
            return float(np.mean([one.attention.read.get(name, 0.0) if one.attention else 0.0 for one in said]))

        known = self.model.knowledge
        first = said[0]
        return Evidence(
            note=[SegmentRead(name=s.name, text=s.text, share=share(s.name)) for s in first.note],
            passages=[
                PassageRead(
                    id=p.id,
                    topic=known.topic(p.id),
                    text=p.text,
                    source=known.source(p.id),
                    score=p.score,
                    asked_by=p.asked_by,
                    share=share(p.id),
                )
                for p in first.evidence
                if known is not None
            ],
        )

    def _card(self) -> Loaded:
        model, ran = self.model, read_run(self.run) or {}
        weights = hashlib.sha256((model.where / "model.safetensors").read() + json.dumps(model.said, sort_keys=True).encode()).hexdigest()
        card = model.where / "README.md"
        inputs = {name: {"name": Place(at["uri"]).name, "version": at["version"]} for name, at in ran.get("inputs", {}).items()}
        encoders = {side: about["name"] for side, about in model.said["encoders"].items() if about}
        return Loaded(
            name=self.run.name,
            task=model.said["task"],
            route="/v1/classify",
            fingerprint=weights,
            data={"inputs": inputs, "encoders": encoders, "policy": model.said["policy"], "trained": ran.get("finished")},
            metrics=self._metrics(),
            findings=list(model.findings),
            card=card.read_text() if card.exists() else None,
        )

    def _metrics(self) -> dict[str, Any]:
        """Of the test split where it was evaluated, else what training chose it by, on validate."""
        if self.judged is not None:
            said = json.loads((self.judged / "metrics.json").read())
            test = said["test"]
            return {"split": "test", "studies": test["studies"], "patients": test["patients"], "macro": test["macro"]} | {
                "warnings": said["warnings"],
                "findings": {name: {m: of.get(m) for m in ("auroc", "n_pos", "n_neg")} for name, of in test["findings"].items()},
            }
        at = self.run / "metrics.json"
        return {"split": "validate", **json.loads(at.read()).get("best", {})} if at.exists() else {}


def _overlays(images: Sequence[Encoded], said: "Sequence[Prediction]") -> list[str | None]:
    """Of each image a PNG, base64; None where the encoder has no patches to look at."""
    from pipelines.images.stored import from_stored
    from trainers.overlay import overlay

    drawn: list[str | None] = []
    for one, prediction in zip(images, said, strict=True):
        patches = prediction.attention.patches if prediction.attention else None
        png = None if patches is None else overlay(from_stored(one.stored), patches)
        drawn.append(None if png is None else base64.b64encode(png).decode())
    return drawn
