"""Whatever bytes come in, a picture or a RowError with a fixed reason comes out."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from contracts.errors import RowError
from pipelines.images import decode as decoder
from pipelines.images.decode import Limits, decode

SHARED = Path(os.environ.get("CXRAY_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
REAL = sorted(SHARED.glob("cxr-ccby/images/*"))


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something with soft shapes, a ramp and a little noise, as uint8 [height, width]."""
    rng = np.random.default_rng(seed)
    shapes = cv2.resize(rng.normal(size=(9, 7)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = shapes + np.linspace(0, 2, width, dtype=np.float32) + rng.normal(0, 0.03, (height, width))
    return cv2.normalize(noisy, np.empty(0), 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(grey: np.ndarray, **options) -> bytes:
    return saved(Image.fromarray(grey), "JPEG", quality=95, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def reason(data: bytes, **options) -> str:
    with pytest.raises(RowError) as caught:
        decode(data, **options)
    return caught.value.reason


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


GREY = smooth(300, 240)


@pytest.mark.parametrize(
    ("image", "kind", "notes", "bound"),
    [
        (Image.fromarray(GREY), "PNG", (), 0),
        (Image.fromarray(GREY).convert("RGB"), "PNG", ("rgb",), 0),
        (Image.fromarray(GREY).convert("RGBA"), "PNG", ("rgb", "alpha"), 0),
        (Image.fromarray(GREY).convert("LA"), "PNG", ("alpha",), 0),
        (Image.fromarray(GREY).convert("P"), "PNG", ("palette",), 0),
        (Image.fromarray(GREY), "JPEG", (), 2),
        (Image.fromarray(GREY).convert("RGB"), "JPEG", ("rgb",), 2),
        (Image.fromarray(GREY).convert("CMYK"), "JPEG", ("cmyk",), 3),
    ],
)
def test_a_grey_picture_stays_the_same_in_every_wrapping(image, kind, notes, bound):
    picture = decode(saved(image, kind))
    assert (picture.kind, picture.notes, picture.width, picture.height) == (kind.lower(), notes, 240, 300)
    assert picture.grey.dtype == np.uint8
    assert apart(picture.grey, GREY) <= bound


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_colour_becomes_luma_and_a_tint_is_said(kind):
    tinted = np.dstack([GREY // 2, GREY // 2 + 40, GREY // 2 + 100])
    picture = decode(saved(Image.fromarray(tinted), kind))
    luma = tinted @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert picture.notes == ("rgb", "tinted")
    assert apart(picture.grey, luma.round()) < 1.5


def test_transparency_lets_black_through():
    alpha = np.zeros_like(GREY)
    alpha[:100], alpha[100:200] = 255, 128
    grey = decode(saved(Image.fromarray(np.dstack([GREY, GREY, GREY, alpha])), "PNG")).grey
    assert (grey[:100] == GREY[:100]).all() and (grey[200:] == 0).all()
    assert apart(grey[100:200], GREY[100:200] * (128 / 255)) <= 1


def test_sixteen_bits_are_spread_from_lowest_to_highest():
    deep = 1000 + GREY.astype(np.uint16) * 12
    picture = decode(saved(Image.fromarray(deep), "PNG"))
    assert picture.notes == ("16bit",)
    assert apart(picture.grey, GREY) <= 1 and picture.grey.min() == 0 and picture.grey.max() == 255


def test_one_bit_is_black_and_white():
    picture = decode(saved(Image.fromarray(GREY > 120), "PNG"))
    assert (picture.grey == np.where(GREY > 120, 255, 0)).all()


def test_of_an_animation_the_first_frame_is_taken():
    data = saved(Image.fromarray(GREY), "PNG", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    assert b"acTL" in data and (decode(data).grey == GREY).all()


def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    picture = decode(jpeg(GREY, exif=exif), at_least=60)
    assert picture.notes == ("rotated",)
    assert (picture.height, picture.width) == picture.grey.shape == (240, 300)
    assert apart(picture.grey, np.rot90(GREY, -1)) < 2


@pytest.mark.parametrize(("at_least", "factor"), [(None, 1), (400, 1), (300, 2), (151, 2), (150, 4), (75, 8), (1, 8)])
def test_a_jpeg_is_reduced_as_far_as_asked_and_no_further(at_least, factor):
    grey = smooth(600, 481)
    picture = decode(jpeg(grey), at_least=at_least)
    assert picture.grey.shape == (-(-600 // factor), -(-481 // factor))
    assert (picture.height, picture.width) == (600, 481)
    assert picture.notes == (("reduced",) if factor > 1 else ())


@pytest.mark.parametrize("at_least", [300, 150])
def test_reduced_is_close_to_full_decode_and_area_resize(at_least):
    data = jpeg(smooth(608, 480))
    quick = decode(data, at_least=at_least).grey
    full = cv2.resize(decode(data).grey, quick.shape[::-1], interpolation=cv2.INTER_AREA)
    assert apart(quick, full) < 1 and np.abs(quick.astype(int) - full).max() < 8


def test_names_do_not_matter_and_garbage_after_the_end_neither():
    for data in (jpeg(GREY), saved(Image.fromarray(GREY), "PNG")):
        assert (decode(data + b"\x00garbage" * 50).grey == decode(data).grey).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_cut_short_is_truncated_not_half_grey(kind, share):
    data = saved(Image.fromarray(GREY), kind)
    assert reason(data[: int(len(data) * share)]) == "truncated"


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image():
    exif = Image.Exif()
    exif[0x010E] = "thumbnail \xff\xd9"
    data = jpeg(GREY, exif=b"Exif\0\0" + jpeg(smooth(40, 40)))
    assert b"\xff\xd9" in data[:-1000] and reason(data[:-500]) == "truncated"


def test_a_png_with_a_flipped_bit_is_corrupt():
    data = bytearray(saved(Image.fromarray(GREY), "PNG"))
    data[len(data) // 2] ^= 4
    assert reason(bytes(data)) == "corrupt"


def test_what_is_no_image_is_said_so():
    assert reason(b"") == "empty_file"
    for data in (b"<html>503 Slow Down</html>", b"GIF89a" + bytes(100), bytes(5000), b"%PDF-1.7", b"\x08\x00"):
        assert reason(data) == "not_an_image"


def test_limits_hold():
    data = jpeg(GREY)
    assert reason(data, limits=Limits(max_bytes=len(data) - 1)) == "too_many_bytes"
    assert reason(data, limits=Limits(max_pixels=300 * 240 - 1)) == "too_many_pixels"
    assert reason(jpeg(GREY[:12]), at_least=8) == "too_small"
    assert decode(data, limits=Limits(max_bytes=len(data), max_pixels=300 * 240)).width == 240


def test_a_bomb_costs_nothing():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    small = jpeg(GREY)
    at = small.index(b"\xff\xc0") + 5
    huge = small[:at] + struct.pack(">HH", 65_000, 65_000) + small[at + 4 :]
    begun = time.perf_counter()
    assert reason(png) == reason(huge) == "too_many_pixels"
    assert time.perf_counter() - begun < 0.2


def test_a_progressive_jpeg_of_a_thousand_scans_is_refused():
    data = jpeg(GREY, progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert decode(data).width == 240
    assert reason(data[:-2] + data[scan:-2] * 1000 + b"\xff\xd9") == "corrupt"


def test_the_more_pixels_a_progressive_jpeg_has_the_fewer_scans_it_may_have(monkeypatch):
    data = jpeg(GREY, progressive=True)
    scans = data.count(b"\xff\xda") * GREY.size
    monkeypatch.setattr(decoder, "MAX_PASSED", scans)
    assert decode(data).width == 240
    monkeypatch.setattr(decoder, "MAX_PASSED", scans - 1)
    assert reason(data) == "corrupt" and decode(jpeg(GREY)).width == 240


def test_a_jpeg_of_another_kind_is_refused_by_name():
    data = bytearray(jpeg(GREY))
    data[data.index(b"\xff\xc0") + 1] = 0xC3  # lossless
    assert reason(bytes(data)) == "unsupported_jpeg"


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A cut, a few wild bytes anywhere or in the header, a hole, or wild lengths."""
    out = bytearray(data)
    kind = rng.integers(5)
    if kind == 0:
        return bytes(out[: rng.integers(1, len(out))])
    if kind == 1:
        first = int(rng.integers(len(out)))
        del out[first : first + int(rng.integers(1, 400))]
        return bytes(out)
    reach = len(out) if kind == 2 else min(len(out), 1500)
    for at in rng.integers(0, reach - 4, int(rng.integers(1, 12))):
        if kind == 4:
            out[at : at + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0"][rng.integers(3)]
        else:
            out[at] = rng.integers(256)
    return bytes(out)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "progressive", "palette"])
def test_150_mutations_give_a_picture_or_a_reason_each_quickly(kind):
    image = Image.fromarray(smooth(160, 140))
    data = {
        "JPEG": lambda: saved(image.convert("RGB"), "JPEG"),
        "PNG": lambda: saved(image.convert("RGBA"), "PNG"),
        "progressive": lambda: saved(image, "JPEG", progressive=True),
        "palette": lambda: saved(image.convert("P"), "PNG"),
    }[kind]()
    outcomes = set()
    for seed in range(150):
        begun = time.perf_counter()
        try:
            picture = decode(mutated(data, np.random.default_rng(seed)), at_least=64)
            assert picture.grey.dtype == np.uint8 and picture.grey.ndim == 2
            outcomes.add("picture")
        except RowError as error:
            outcomes.add(error.reason)
        assert time.perf_counter() - begun < 2
    assert "truncated" in outcomes and len(outcomes) >= 3


@pytest.mark.skipif(not REAL, reason="the shared chest X-rays are not on this machine")
def test_real_x_rays_are_read_whole():
    for file in REAL[::4] + [f for f in REAL if f.suffix == ".png"]:
        picture = decode(file.read_bytes(), at_least=518)
        with Image.open(file) as image:
            assert (picture.width, picture.height) == image.size
            colour = image.mode != "L"
        assert ("rgb" in picture.notes) == colour
        assert max(picture.grey.shape) >= min(518, max(picture.width, picture.height))
        assert picture.grey.std() > 5
