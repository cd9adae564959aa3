"""Bytes of an image file, whatever its name -> an 8-bit grey picture.

What bytes are is decided from their first bytes. How large they will become is read from the header and held
against `Limits` before anything is decoded, so that a bomb costs nothing. What cannot be read is a RowError.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from contracts.errors import RowError
from pipelines.images.dicom import Preset, grey_from_dicom, jpeg_frame, jpeg_segments

# Damage is answered by a RowError, not by a line in a worker's log. (Out of OpenCV's reach is the one line that libjpeg
# itself writes for data damaged in the middle of the stream.)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {2: 3, 3: 3, 4: 4, 6: 4}  # as OpenCV decodes them, by PNG's colour type
MAX_CHUNKS = 100_000  # of a PNG; most writers fill one with 8 KB and more
MAX_SCANS = 100  # of a JPEG
MAX_PASSED = 2_000_000_000  # pixels in all of a JPEG's scans together: some seconds' work
_REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}


@dataclass(frozen=True)
class Limits:
    """What a file may be at most, and a picture at least."""

    max_bytes: int = 64 << 20  # the largest DICOMs of MIMIC-CXR have about 20 MB
    # width x height x channels of a frame (of a JPEG, whose colours are read reduced, without channels); a large detector has
    # 4,300 x 4,300 = 18 million
    max_pixels: int = 100_000_000
    min_side: int = 16  # pixels; below, nothing is left of a chest


@dataclass(frozen=True, eq=False)
class Picture:
    """grey: uint8 [H, W], perhaps smaller than the original; width, height: of the original, upright, in pixels.

    notes say what was found and done: 'reduced', 'rotated', 'rgb', 'tinted', 'cmyk', 'palette', 'alpha', '16bit', and
    of DICOM 'monochrome1', 'multiframe', 'padding'.
    """

    grey: np.ndarray
    width: int
    height: int
    kind: Literal["jpeg", "png", "dicom"]
    notes: tuple[str, ...] = ()


def decode(
    data: bytes,
    preset: Preset = "mimic_jpg",
    limits: Limits = Limits(),
    at_least: int | None = None,
) -> Picture:
    """The picture in these bytes: JPEG, PNG or DICOM; of several frames the first.

    preset: how DICOM values become greys, see `grey_from_dicom`; the others are shown as they are.
    at_least: a JPEG may come out at 1/2, 1/4 or 1/8 of its size as long as its longer side keeps this many pixels.

    Raises RowError: empty_file, not_an_image, too_many_bytes, too_many_pixels, too_small, truncated, corrupt,
    unsupported_jpeg, and those of `grey_from_dicom`.
    """
    if not data:
        raise RowError("empty_file")
    if len(data) > limits.max_bytes:
        raise RowError("too_many_bytes")
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data, limits, at_least)
    if data.startswith(_PNG):
        return _png(data, limits)
    if _looks_like_dicom(data):
        grey, notes = grey_from_dicom(data, preset, limits.max_bytes, limits.max_pixels)
        height, width = grey.shape
        _check_size(width, height, limits)
        return Picture(grey, width, height, "dicom", notes)
    raise RowError("not_an_image")


def _looks_like_dicom(data: bytes) -> bool:
    """Whether bytes are DICOM: 'DICM' after the preamble or, without one, a first element of group 0002 or 0008."""
    if data[128:132] == b"DICM":
        return True
    little, big = data[:2] in (b"\x02\0", b"\x08\0") and data[3:4] == b"\0", data[:3] == b"\0\x08\0"
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    return len(data) > 8 and ((little and (explicit or data[6:8] == b"\0\0")) or (big and explicit))


def _check_size(width: int, height: int, limits: Limits, channels: int = 1) -> None:
    if width * height * channels > limits.max_pixels:
        raise RowError("too_many_pixels")
    if min(width, height) < limits.min_side:
        raise RowError("too_small")


def _opencv(data: bytes, flag: int) -> np.ndarray | None:
    """Pixels as OpenCV gives them, None where it cannot read the data."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error:
        return None


def _jpeg(data: bytes, limits: Limits, at_least: int | None) -> Picture:
    segments = list(jpeg_segments(data))
    header = jpeg_frame(data)
    # Inside the scan a 0xFF byte is always stuffed, so an FFD9 after its header is the end of the image; one before it
    # may be a thumbnail's. Some decoders go on without it and fill the rest with grey. What follows it is ignored.
    if not segments or segments[-1][0] != 0xDA or data.rfind(b"\xff\xd9", segments[-1][1]) < 0:
        raise RowError("truncated")
    if header is None:
        raise RowError("corrupt", "no frame header")
    marker, precision, height, width, components = header
    _check_size(width, height, limits)
    if marker not in (0xC0, 0xC1, 0xC2) or precision != 8:  # lossless, arithmetic, hierarchical, JPEG-LS, 12 bits
        raise RowError("unsupported_jpeg")
    # Each scan is a pass over all pixels, and progressive encoders write about ten. A grey baseline JPEG has just one.
    scans = data.count(b"\xff\xda") if (marker, components) != (0xC0, 1) else 1
    if scans > MAX_SCANS or scans * width * height > MAX_PASSED:
        raise RowError("corrupt", "too many scans")

    # EXIF orientation is honoured, because whoever uploaded or labelled such a picture saw it turned. Where there may
    # be one, nothing is reduced, so that the decoded shape tells whether it was turned.
    exif = any(marker == 0xE1 and data[start : start + 4] == b"Exif" for marker, start, _ in segments)
    longest = max(width, height)
    factors = [f for f in (8, 4, 2) if at_least is not None and not exif and -(-longest // f) >= at_least]
    grey = _opencv(data, _REDUCED[factors[0]] if factors else cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise RowError("corrupt")
    notes = ["reduced"] if factors else []
    if not factors and grey.shape != (height, width):
        notes.append("rotated")
        height, width = grey.shape
    if components == 3:  # libjpeg's grey of these is the Y of YCbCr, which is luma
        notes += _colour_notes(_opencv(data, cv2.IMREAD_REDUCED_COLOR_8))
    elif components == 4:
        notes.append("cmyk")
    return Picture(grey, width, height, "jpeg", tuple(notes))


def _colour_notes(bgr: np.ndarray | None) -> list[str]:
    """'rgb' for three channels; 'tinted' too, if one pixel in a hundred has channels more than 12 of 255 apart (a
    threshold of our own: the noise of chroma in a grey picture that was saved as a colour JPEG stays below)."""
    if bgr is None:
        return ["rgb"]
    spread = cv2.subtract(bgr.max(axis=2), bgr.min(axis=2))
    limit = 12 if bgr.dtype == np.uint8 else 12 * 257
    return ["rgb", "tinted"] if np.count_nonzero(spread > limit) > 0.01 * spread.size else ["rgb"]


def _png(data: bytes, limits: Limits) -> Picture:
    if len(data) < 33:
        raise RowError("truncated")
    width, height, colour = struct.unpack(">IIxB", data[16:26])
    _check_size(width, height, limits, _CHANNELS.get(colour, 1))
    # Only what the pixels need goes to the decoder, so damaged profiles, texts and animations do not matter. The
    # default picture of an animation is its first frame.
    pixels = _opencv(_PNG + b"".join(_pixel_chunks(data)), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[:2] != (height, width):
        raise RowError("corrupt")
    notes = ["palette"] if colour == 3 else []
    if pixels.ndim == 2:
        grey = pixels
    else:
        colours = np.ascontiguousarray(pixels[..., :3])
        grey = cv2.cvtColor(colours, cv2.COLOR_BGR2GRAY)
        notes += _colour_notes(colours) if colour in (2, 6) else []
        if pixels.shape[2] == 4:  # on black, the ground of an X-ray
            notes.append("alpha")
            grey = cv2.multiply(grey, np.ascontiguousarray(pixels[..., 3]), scale=1 / np.iinfo(pixels.dtype).max)
    if grey.dtype == np.uint16:
        notes.append("16bit")
        grey = cv2.normalize(grey, np.empty(0), 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    return Picture(grey, width, height, "png", tuple(notes))


def _pixel_chunks(data: bytes) -> Iterator[bytes]:
    """The chunks that make the pixels, each checked against its CRC (PNG 3rd edition, 5.3)."""
    at = len(_PNG)
    kind = b""
    for _ in range(MAX_CHUNKS):
        if kind == b"IEND":
            return
        if at + 12 > len(data):
            raise RowError("truncated")
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if end > len(data):
            raise RowError("truncated")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
                raise RowError("corrupt", "a checksum is wrong")
            yield data[at:end]
        at = end
    raise RowError("corrupt", "too many chunks")
