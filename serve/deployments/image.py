"""An image encoder: an upload, whatever it is -> what FEATURES holds of it. Preprocessing is `cxray images`' and `cxray features`' own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve

from contracts.errors import RowError
from contracts.storage import Place
from serve.messages import Encoded
from serve.settings import Batched
from serve.worker import Worker

if TYPE_CHECKING:
    from pipelines.images.dicom import Preset

DECODERS = 2  # threads; OpenCV lets others run while it decodes, and the encoder has a thread of its own
# Of an upload, as Limits.max_pixels: a large detector's 4,300 x 4,300, three times over for a PNG in colours. A job may take its time for
# more; here others wait.
MAX_PIXELS = 60_000_000


@dataclass(frozen=True)
class ImageSource:
    """Which encoder. about: as a data set's dataset.json has it (name, fingerprint, dim, joint, grid). tuned: the run of stage 2 in which
    it trained along, and whose weights it has. dicom: how DICOM values were made greys of."""

    about: dict[str, Any]
    tuned: Place | None
    dicom: "Preset"

    def load(self) -> Any:
        """Raises CxrayError where it cannot be loaded, or has other weights now."""
        from models.encoders import load_known

        encoder = load_known("image", self.about, "when the model or index was made")
        if self.tuned is None:
            return encoder
        from trainers import finetune

        return finetune.tuned("image", encoder, self.tuned / "model")


class ImageEncoder:
    """Files are decoded in threads as they come; the encoder gets a batch of pictures."""

    def __init__(self, settings: Batched, source: ImageSource) -> None:
        import cv2

        from pipelines.pool import one_thread_on_cpu

        one_thread_on_cpu()
        cv2.setNumThreads(1)
        self.source, self.encoder = source, source.load()
        self._decoders, self._worker = Worker(settings.timeout_s, DECODERS), Worker(settings.timeout_s)
        self._batched.set_max_batch_size(settings.batch)
        self._batched.set_batch_wait_timeout_s(settings.wait_s)
        self._fixed = np.random.default_rng(0).integers(0, 255, (1, 518, 518), np.uint8)
        self._stored = cv2.imencode(".jpg", self._fixed[0])[1].tobytes()
        self._said = self.rows(self._fixed)[0]["embedding"]

    async def encode(self, data: bytes) -> Encoded | RowError:
        """Any JPEG, PNG or DICOM."""
        return await self._encode(self.opened, data)

    async def encode_stored(self, stored: bytes) -> Encoded | RowError:
        """A picture that another encoder has seen."""
        return await self._encode(_opened, stored)

    async def about(self) -> dict[str, Any]:
        about = self.source.about
        return {"name": about["name"], "fingerprint": self.encoder.fingerprint, "dim": self.encoder.dim}

    async def check_health(self) -> None:
        if isinstance(await self._decoders.probe(_opened, self._stored), RowError):
            raise RuntimeError("the decoder does not read any more what it has written")
        rows = await self._worker.probe(self.rows, self._fixed)
        if rows is not None and not np.allclose(rows[0]["embedding"], self._said, atol=1e-3):
            raise RuntimeError("the image encoder does not say any more what it said at its start")

    def opened(self, data: bytes) -> tuple[bytes, np.ndarray] | RowError:
        """The JPEG as stored, and what is in it, uint8 [518, 518]."""
        from pipelines.images.decode import Limits
        from pipelines.images.stored import stored_jpeg

        try:
            return _opened(stored_jpeg(data, self.source.dicom, Limits(max_pixels=MAX_PIXELS)))
        except RowError as error:
            return error

    def rows(self, pictures: np.ndarray | Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Pictures -> rows of FEATURES."""
        from pipelines.features import encoded

        return encoded(self.encoder, self.source.about["grid"], np.stack(list(pictures)))

    async def _encode(self, opened: Any, data: bytes) -> Encoded | RowError:
        found = await self._decoders.run(opened, data)
        if isinstance(found, RowError):
            return found
        stored, picture = found
        await self._worker.free()
        return Encoded(await self._batched(picture), stored)

    @serve.batch
    async def _batched(self, pictures: list[np.ndarray]) -> list[dict[str, Any]]:
        return await self._worker.run(self.rows, pictures)


def _opened(stored: bytes) -> tuple[bytes, np.ndarray] | RowError:
    from pipelines.images.stored import from_stored

    try:
        return stored, from_stored(stored)
    except RowError as error:
        return error
