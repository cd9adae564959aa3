"""DICOM bytes -> an 8-bit grey picture, as in the official JPGs of MIMIC-CXR or as on a viewing station.

Everything between a stored pixel value and its grey level depends on that value alone. So each step, pydicom's look-up
tables and windows included, is worked out once for all 256 or 65,536 possible values, and the picture takes its greys
from that table.
"""

import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Literal

import cv2
import numpy as np
from pydicom import Dataset, dcmread, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.errors import BytesLengthException
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing
from pydicom.pixels.utils import pixel_array
from pydicom.tag import Tag

from contracts.errors import RowError

Preset = Literal["mimic_jpg", "clinical"]

# A damaged file is answered by a RowError; pydicom's remarks on top of it would fill the workers' logs.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom\.")

# Only these are read. Names, dates and notes of the patient never enter memory as values.
_SHAPE = "SamplesPerPixel PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated BitsStored"
_MEANING = "PixelRepresentation PhotometricInterpretation PixelPaddingValue PixelPaddingRangeLimit"
_SHOWN = "RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction VOILUTSequence"
_PALETTE = " ".join(f"{c}PaletteColorLookupTable{x}" for c in ("Red", "Green", "Blue") for x in ("Descriptor", "Data"))
_TAGS: list = [Tag(name) for name in f"{_SHAPE} {_MEANING} {_SHOWN} {_PALETTE} PresentationLUTShape PixelData".split()]

# What pydicom 3.0 and its plugins raise for damaged files: seen with mutated files of every transfer syntax, or found
# in their source. There is no common base class. Caught only around reading, decoding and their look-up tables.
_BAD_DATA = (
    *(AttributeError, BytesLengthException, EOFError, IndexError, KeyError, NotImplementedError, OSError),
    *(OverflowError, RecursionError, RuntimeError, TypeError, ValueError, struct.error, zlib.error),
)

# The kind of frame header tells the transfer syntax, where a file does not (T.81 table B.1; T.87 for 0xF7).
_SYNTAX = {0xC0: uid.JPEGBaseline8Bit, 0xC1: uid.JPEGExtended12Bit, 0xC3: uid.JPEGLosslessSV1, 0xF7: uid.JPEGLSLossless}
# Any marker but filling and those that stand alone.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
MAX_SEGMENTS = 10_000  # the longest headers, of colour profiles and metadata in pieces of 64 KB, have some hundreds
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # without tables and a reserved one


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of its payload) of a JPEG's header segments, the first SOS last (ITU-T T.81, B.1.1).

    Ends after MAX_SEGMENTS of them: 64 MiB of empty ones would keep a worker for a minute.
    """
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found.start() > len(data) - 4:
            return
        at = found.start()
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        yield marker, at + 4, at + 2 + length
        if marker == 0xDA or length < 2:
            return
        at += 2 + length


def jpeg_frame(data: bytes) -> tuple[int, int, int, int, int] | None:
    """(marker, precision in bits, height, width, components) of a JPEG or JPEG-LS frame header, or None without one."""
    for marker, start, end in jpeg_segments(data):
        if marker in _FRAME_HEADERS and end - start >= 6 and start + 6 <= len(data):
            return marker, *struct.unpack(">BHHB", data[start : start + 6])
    return None


def grey_from_dicom(data: bytes, preset: Preset, max_bytes: int, max_pixels: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The first frame, which every file has and which alone is decoded, as uint8 [H, W], and notes on what was found.

    mimic_jpg: (value - lowest) / (highest - lowest) * 255 truncated, MONOCHROME1 inverted, histogram equalised; no VOI
    LUT (Johnson et al. 2019, arXiv:1901.07042). clinical: modality LUT or rescale, then VOI LUT, else the first window,
    else lowest to highest, then inversion (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2). In both, padding counts for neither
    end and is black. max_bytes bounds what a deflated file may grow to, max_pixels the values in a frame.

    RowError: no_pixels, unsupported_transfer_syntax, unsupported_bits, too_many_pixels, too_many_bytes, corrupt_dicom.
    """
    try:
        dataset = _read(data, max_bytes)
        _check(dataset, max_pixels)
        # The quicker plugin for RLE panics on damaged data, which no `except Exception` holds: pydicom's own does not.
        rle = dataset.file_meta.TransferSyntaxUID == uid.RLELossless
        pixels = pixel_array(dataset, index=0, decoding_plugin="pydicom" if rle else "")
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset)
    except _BAD_DATA as error:
        raise RowError("corrupt_dicom", type(error).__name__) from error
    notes = ["multiframe"] if (dataset.get("NumberOfFrames") or 1) > 1 else []
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.ndim == 3:
        notes.append("palette" if dataset.PhotometricInterpretation == "PALETTE COLOR" else "rgb")
        pixels = cv2.cvtColor(np.ascontiguousarray(pixels.view(f"u{pixels.itemsize}")), cv2.COLOR_RGB2GRAY)
        dataset = Dataset()  # luma is no stored value: look-up tables, windows and padding do not apply to it
    if pixels.itemsize > 1:
        notes.append("16bit")
    levels = 256**pixels.itemsize
    lowest = -levels // 2 if pixels.dtype.kind == "i" else 0
    values = np.arange(lowest, lowest + levels, dtype=np.int32)
    unsigned = np.ascontiguousarray(pixels).view(f"u{pixels.itemsize}")
    index = unsigned ^ unsigned.dtype.type(-lowest)  # two's complement with its sign bit flipped counts from the lowest
    seen = cv2.calcHist([index], [0], None, [levels], [0, levels]).ravel() > 0
    padding = _padding(dataset, values)
    if (seen & padding).any() and (seen & ~padding).any():
        seen &= ~padding
        notes.append("padding")
    else:
        padding[:] = False

    lowest, highest = values[seen][[0, -1]]
    try:
        table = _scaled(values, lowest, highest) if preset == "mimic_jpg" else _displayed(values, seen, dataset).round()
    except _BAD_DATA as error:
        raise RowError("corrupt_dicom", f"look-up table: {type(error).__name__}") from error
    table = table.astype(np.uint8)  # truncates
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        notes.append("monochrome1")
    # A Presentation LUT Shape of INVERSE says the same, and mostly stands beside MONOCHROME1 (PS3.3 C.8.11.3.1.2).
    if "monochrome1" in notes or (preset == "clinical" and dataset.get("PresentationLUTShape") == "INVERSE"):
        table = 255 - table
    table[padding] = 0
    grey = np.take(table, index)
    return (cv2.equalizeHist(grey) if preset == "mimic_jpg" else grey), tuple(notes)


class _Stream(BytesIO):
    """Bytes that pydicom reads. It takes some three reads for an element, an object for many: 24 MB of empty ones kept it for 5 s."""

    left = 100_000

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise RowError("corrupt_dicom", "too many elements")
        return super().read(size)


def _read(data: bytes, max_bytes: int) -> Dataset:
    """The elements in `_TAGS`, with a transfer syntax: the file's own or, where that is missing, the likeliest."""
    stream = _Stream(data)
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        # pydicom inflates without a bound: a 64 MiB bomb would come to 64 GiB.
        unzip = zlib.decompressobj(-zlib.MAX_WBITS)
        body = unzip.decompress(stream.read(), max_bytes)
        if unzip.unconsumed_tail:
            raise RowError("too_many_bytes", "deflated")
        _check_items(body)
        dataset = read_dataset(_Stream(body), False, True, specific_tags=_TAGS)
        dataset.file_meta = FileMetaDataset(meta)
    else:
        _check_items(data)
        dataset = dcmread(_Stream(data), force=True, specific_tags=_TAGS)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = _guessed_syntax(dataset)
    return dataset


def _check_items(data: bytes) -> None:
    # pydicom makes an object of each item of a sequence, wanted or not: 32 MB of empty ones came to 5 GB and a minute.
    if max(data.count(b"\xfe\xff\x00\xe0"), data.count(b"\xff\xfe\xe0\x00")) > 10_000:
        raise RowError("corrupt_dicom", "too many sequence items")


def _guessed_syntax(dataset: Dataset) -> uid.UID:
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:  # compressed
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        if b"\xff\x4f\xff\x51" in frame[:200]:
            return uid.JPEG2000
        header = jpeg_frame(frame) if frame[:2] == b"\xff\xd8" else None
        return _SYNTAX.get(header[0], uid.JPEGBaseline8Bit) if header else uid.RLELossless
    implicit, little = dataset.original_encoding
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _check(dataset: Dataset, max_pixels: int) -> None:
    """Refuse, before anything is decoded, what cannot be read, is too large, or contradicts itself."""
    if not dataset.get("PixelData"):
        raise RowError("no_pixels")
    if dataset.BitsAllocated not in (1, 8, 16):  # radiographs have 8 or 16; 32 are doses and maps
        raise RowError("unsupported_bits")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        get_decoder(syntax)
    except NotImplementedError as error:  # video, private and unknown ones
        raise RowError("unsupported_transfer_syntax") from error
    if dataset.Rows * dataset.Columns * dataset.SamplesPerPixel > max_pixels:
        raise RowError("too_many_pixels")
    for name in ("ModalityLUTSequence", "VOILUTSequence"):  # a table has at most 128 KB; pydicom makes an object of each element in it
        if name in dataset and len(getattr(dataset.get_item(name), "value", None) or b"") > 1 << 20:
            raise RowError("corrupt_dicom", "a look-up table of that length")
    if syntax.is_encapsulated and syntax != uid.RLELossless:
        # A decoder allocates what the codestream says: Rows and Columns alone would let a bomb through.
        frame = get_frame(dataset.PixelData, 0, number_of_frames=dataset.get("NumberOfFrames") or 1)
        if _codestream_size(frame) != (dataset.Rows, dataset.Columns, dataset.SamplesPerPixel):
            raise RowError("corrupt_dicom", "the codestream has another size")


def _codestream_size(frame: bytes) -> tuple[int, int, int] | None:
    """(height, width, components) that a JPEG, JPEG-LS or JPEG 2000 codestream gives itself (T.81 B.2.2, T.800 A.5.1: SIZ)."""
    if frame[:2] == b"\xff\xd8":
        return (header := jpeg_frame(frame)) and header[2:5]
    at = 0
    if frame[4:8] == b"jP  ":  # the boxes of a JP2 file; pydicom would stand for ever before one without a length
        while frame[at + 4 : at + 8] != b"jp2c":
            if (length := int.from_bytes(frame[at : at + 4])) < 8:
                return None
            at += length
        at += 8
    if frame[at : at + 4] != b"\xff\x4f\xff\x51":
        return None
    right, bottom, left, top = struct.unpack(">4I", frame[at + 8 : at + 24])
    return bottom - top, right - left, int.from_bytes(frame[at + 40 : at + 42])


def _padding(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """bool [values]: which are Pixel Padding, a value or a range with both ends (PS3.3 C.7.5.1.1.2)."""
    first, last = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(first, int):
        return np.zeros(values.size, bool)
    last = last if isinstance(last, int) else first
    return (values >= min(first, last)) & (values <= max(first, last))


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """float [values], 0 at `black` and 255 at `white`, whichever is higher; all 0 where the two are one."""
    if not np.isfinite(white - black):
        raise RowError("corrupt_dicom", "a rescale or window that is not finite")
    return np.clip((values - black) / ((white - black) or 1) * 255, 0, 255)


def _displayed(values: np.ndarray, seen: np.ndarray, dataset: Dataset) -> np.ndarray:
    """float [values], 0 to 255: what the modality LUT, then the VOI LUT or the window, make of each value."""
    if dataset.get("ModalityLUTSequence"):
        _widen(dataset.ModalityLUTSequence[0])
    shown = apply_modality_lut(values, dataset)
    if dataset.get("VOILUTSequence"):
        entries, first, depth = _widen(dataset.VOILUTSequence[0])
        # pydicom holds the place in the table in 16 bits: clip to the table's ends before, or far values wrap around.
        inside = np.clip(np.rint(shown), first, first + (entries or 65536) - 1).astype(np.int32)
        return _scaled(apply_voi(inside, dataset), 0, 2**depth - 1)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        try:
            # What a window makes of minus and plus infinity is the range of its output, whichever function it has.
            return _scaled(apply_windowing(shown, dataset), *apply_windowing(np.array([-np.inf, np.inf]), dataset))
        except ValueError:  # a width below 1 or an unknown function: no window (PS3.3 C.11.2.1.2)
            pass
    return _scaled(shown, shown[seen].min(), shown[seen].max())


def _widen(table: Dataset) -> tuple[int, int, int]:
    """(entries, first value, bits) of a LUT; pydicom is told 16 bits, as it fails at 12 and at more than 256 of 8."""
    entries, first, depth = table.LUTDescriptor
    table.LUTDescriptor = [entries, first, 16]
    return entries, first, depth
