"""A search index: words, an encoded image, or both -> the studies most like them."""

import base64
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.dataset import open_dataset
from contracts.errors import CxrayError, RowError
from contracts.storage import Place
from serve.backends import by_value
from serve.deployments.image import ImageSource
from serve.deployments.text import TextSource
from serve.messages import Encoded, Loaded, Match, Question
from serve.pictures import Pictures
from serve.settings import Scale
from serve.worker import Worker, answer

if TYPE_CHECKING:
    from serve.app import Graph

THREADS = 4  # FAISS and DuckDB let others run while they look, and a slow filter must not keep the rest waiting
THUMBNAIL = 192  # pixels a side
KEPT = 4096  # thumbnails, of about 6 KB


class Settings(Scale):
    run: str = "index"
    images: str | None = None  # the stored pictures, for thumbnails beside the answers


def build(graph: "Graph", settings: Settings) -> Any:
    """Raises CxrayError where there is no index, or no images."""
    run = graph.at(settings.run)
    about = graph.json(run, "model/config.json", "no index here; make one with `cxray index`")
    if "image_encoder" not in about:
        raise CxrayError(f"{run}: holds no index; models.search serves the folder of a finished `cxray index`")
    images = open_dataset(graph.at(settings.images), "images").place if settings.images else None
    image, report = about["image_encoder"], about["text_encoder"]
    texts = {"report": TextSource(report["name"], report["fingerprint"])} if report else {}
    texts |= {"image": TextSource(image["name"], None)} if image["joint"] else {}
    asked = {by: graph.text(source) for by, source in texts.items()}
    return graph.deploy("search", Search, settings, run, images, graph.image(ImageSource(image, None, "mimic_jpg")), asked)


class Search:
    def __init__(self, settings: Settings, run: Place, images: Place | None, image: Any, texts: dict[str, Any]) -> None:
        """image: an encoder to see pictures again by, where uploads were encoded by another; texts: by what words are compared with,
        the encoder for them; all handles. images: where the stored pictures lie."""
        from pipelines.search.ask import Index

        self.run, self.image, self.index = run, by_value(image), Index(run)
        self.texts = {by: by_value(text) for by, text in texts.items()}
        self.pictures = Pictures(open_dataset(images, "images")) if images else None
        self._worker = Worker(settings.timeout_s, THREADS)
        self._drawn: dict[str, str | None] = {}
        self._drawing, self._loaded = threading.Lock(), self._card()

    async def search(self, question: Question) -> list[Match] | RowError:
        image = question.image
        if image is not None and self.image is not None:
            image = await answer(self.image.encode_stored.remote(image.stored))
            if isinstance(image, RowError):
                return image
        text = None
        if question.text is not None:
            try:
                by = self.index.words_by(question.via)
            except CxrayError as error:
                return self._refused(error)
            text = (await answer(self.texts[by].encode.remote([question.text]))).embedding
        return await self._worker.run(self.find, question, text, image)

    async def about(self) -> Loaded:
        return self._loaded

    async def check_health(self) -> None:
        if len(self.index.images) and await self._worker.probe(self._itself) is False:
            raise RuntimeError("the index does not find any more what lies in it")

    def find(self, question: Question, text: np.ndarray | None, image: Encoded | None) -> list[Match] | RowError:
        """text: the words' vector, float32 [1, width]."""
        vector = None if image is None else np.asarray(image.row["embedding"], np.float32)[None]
        try:
            answers = self.index.search(text, vector, question.via, question.where, question.k)
        except CxrayError as error:
            return self._refused(error)
        pictures = self.thumbnails([a.row_id for a in answers]) if question.pictures else {}
        return [
            Match(
                study_id=a.study_id, split=a.split, view=a.view or "", score=a.score, labels=a.labels, impression=a.impression,
                picture=pictures.get(a.row_id),
            )
            for a in answers
        ]  # fmt: skip

    def thumbnails(self, row_ids: Sequence[str]) -> dict[str, str | None]:
        """base64 JPEGs; None of a picture that is not there, or is damaged."""
        if self.pictures is None:
            return {}
        with self._drawing:
            drawn = {row_id: self._drawn[row_id] for row_id in row_ids if row_id in self._drawn}
        missing = [row_id for row_id in row_ids if row_id not in drawn]
        stored = self.pictures.read(missing)
        new = {row_id: _thumbnail(stored[row_id]) if row_id in stored else None for row_id in missing}
        with self._drawing:
            self._drawn |= new
            for row_id in list(self._drawn)[:-KEPT]:
                del self._drawn[row_id]
        return drawn | new

    def _itself(self) -> bool:
        """Whether an image's own vector finds an image just like it."""
        (answer,) = self.index.search(None, self.index.images.of(np.zeros(1, np.int64)), "image", None, 1)
        return abs(answer.score - 1) < 1e-3

    def _card(self) -> Loaded:
        about, rows = self.index.about, self.index.rows
        card = self.run / "model" / "README.md"
        sides = {"images": self.index.images, "reports": self.index.reports}
        return Loaded(
            name=self.run.name,
            task="search",
            route="/v1/search",
            fingerprint=about["fingerprint"],
            data={
                "studies": len(rows["study_id"].unique()),
                "encoders": {side: of["name"] for side in ("image", "text") if (of := about[f"{side}_encoder"])},
                **{name: {"vectors": len(side), "index": side.kind} for name, side in sides.items() if side is not None},
            },
            metrics={},
            card=card.read_text() if card.exists() else None,
        )

    def _refused(self, error: CxrayError) -> RowError:
        return RowError("bad_question", str(error).removeprefix(f"{self.run}: "))


def _thumbnail(stored: bytes) -> str | None:
    import cv2

    from pipelines.images.stored import from_stored

    try:
        small = cv2.resize(from_stored(stored), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    except RowError:
        return None
    return base64.b64encode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()).decode()
