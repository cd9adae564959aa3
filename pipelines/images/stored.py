"""Picture -> what stands in the data set: a 518 px square as JPEG, and what is said of it.

`from_stored` is the one decode that every encoder sees, in training and in serving, whatever the source was.
"""

from dataclasses import dataclass
from hashlib import sha256

import cv2
import numpy as np

from contracts.errors import RowError
from pipelines.images.decode import Limits, Picture, decode
from pipelines.images.dicom import Preset

SIDE = 518  # pixels; RAD-DINO's input, 37 patches of 14, and the largest of the encoders that are meant to be used
QUALITY = 90  # about 47 KB an X-ray; 85 would take 35 KB, 95 72 KB, PNG 134 KB

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class Stored:
    """jpeg: the square as bytes; scale: stored pixels an original pixel; pad_x, pad_y: stored pixels left and above.

    content_hash: sha256 of `jpeg`, in hex. Equal pixels give equal bytes, and anyone who holds the column can check it.
    """

    jpeg: bytes
    scale: float
    pad_x: int
    pad_y: int
    content_hash: str


def letterbox(grey: np.ndarray, side: int = SIDE) -> tuple[np.ndarray, float, int, int]:
    """uint8 [H, W] -> (uint8 [side, side], scale, pad_x, pad_y): the whole picture, its aspect kept, centred on black.

    A point x of the picture stands at x * scale + pad_x. Shrunk by area, which does not alias; enlarged linearly.
    """
    height, width = grey.shape
    scale = side / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(grey, (new_width, new_height), interpolation=method)
    pad_x, pad_y = (side - new_width) // 2, (side - new_height) // 2
    square = np.zeros((side, side), np.uint8)
    square[pad_y : pad_y + new_height, pad_x : pad_x + new_width] = resized
    return square, scale, pad_x, pad_y


def to_stored(picture: Picture) -> Stored:
    """The stored form of a picture; its scale is that of the original, also where `grey` was decoded smaller."""
    square, _, pad_x, pad_y = letterbox(picture.grey)
    _, jpeg = cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    data = jpeg.tobytes()
    return Stored(data, SIDE / max(picture.width, picture.height), pad_x, pad_y, sha256(data).hexdigest())


def from_stored(jpeg: bytes) -> np.ndarray:
    """Stored bytes -> uint8 [518, 518]. Raises RowError corrupt_stored if they are not such a picture."""
    square = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE) if jpeg else None
    if square is None or square.shape != (SIDE, SIDE):
        raise RowError("corrupt_stored")
    return square


def stored_jpeg(data: bytes, preset: Preset, limits: Limits) -> bytes:
    """A file's bytes, whatever they are -> the JPEG that `cxray images` would store of it. Raises RowError, as `decode` says."""
    return to_stored(decode(data, preset=preset, limits=limits, at_least=SIDE)).jpeg


def as_stored(data: bytes, preset: Preset = "mimic_jpg") -> np.ndarray:
    """The same, opened: uint8 [518, 518]."""
    return from_stored(stored_jpeg(data, preset, Limits()))


def box_to_stored(box: Box, scale: float, pad_x: int, pad_y: int) -> Box:
    """A box in pixels of the original -> in pixels of the stored square."""
    x0, y0, x1, y1 = box
    return x0 * scale + pad_x, y0 * scale + pad_y, x1 * scale + pad_x, y1 * scale + pad_y


def box_to_original(box: Box, scale: float, pad_x: int, pad_y: int) -> Box:
    """A box in pixels of the stored square -> in pixels of the original."""
    x0, y0, x1, y1 = box
    return (x0 - pad_x) / scale, (y0 - pad_y) / scale, (x1 - pad_x) / scale, (y1 - pad_y) / scale


def quality_flags(grey: np.ndarray) -> list[str]:
    """What a look at a thumbnail says against a picture: hints to filter or look by, no verdicts. Greys are 0 to 255.

    small          the shorter side has under 256 pixels; a picture of usual shape that was decoded smaller keeps more
    blank          standard deviation under 2: nothing is there, and no other flag is given
    low_contrast   5th and 95th percentile less than 40 apart (76 published X-rays: 45 and more)
    dark, bright   mean under 40, or over 215 (those: 89 to 163)
    mostly_border  over half of the area is rows or columns at the edges in which no grey differs by over 8
    inverted_suspect  the upper corners, air beside the neck, are brighter by over 20 than the strip of spine and heart
                   (those: none of 76 as they are, 84 % of them inverted)
    """
    flags = ["small"] if min(grey.shape) < 256 else []
    thumbnail = cv2.resize(grey, (128, 128), interpolation=cv2.INTER_AREA)
    if thumbnail.std() < 2:
        return [*flags, "blank"]
    low, high = np.percentile(thumbnail, (5, 95))
    mean = thumbnail.mean()
    rows, columns = (np.flatnonzero(np.ptp(thumbnail, axis=axis) > 8) for axis in (1, 0))
    inside = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) if rows.size and columns.size else 0
    corners = (thumbnail[:16, :16].mean() + thumbnail[:16, -16:].mean()) / 2
    found = {
        "low_contrast": high - low < 40,
        "dark": mean < 40,
        "bright": mean > 215,
        "mostly_border": inside < 128 * 128 / 2,
        "inverted_suspect": corners - thumbnail[32:110, 56:72].mean() > 20,
    }
    return flags + [name for name, so in found.items() if so]


def edge_grid(grey: np.ndarray, n: int = 16) -> np.ndarray:
    """uint8 [n, n]: the share of edge pixels in each cell of the letterboxed square, 255 for all (Canny 50, 150)."""
    square, *_ = letterbox(grey)
    return cv2.resize(cv2.Canny(square, 50, 150), (n, n), interpolation=cv2.INTER_AREA)
