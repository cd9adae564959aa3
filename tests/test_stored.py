"""The stored square: where things lie on it, what it costs, and what is said of it."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest

from contracts.errors import RowError
from pipelines.images.decode import Picture, decode
from pipelines.images.stored import (
    SIDE,
    box_to_original,
    box_to_stored,
    edge_grid,
    from_stored,
    letterbox,
    quality_flags,
    to_stored,
)

SHARED = Path(os.environ.get("CXRAY_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
REAL = sorted(SHARED.glob("cxr-ccby/images/*"))


def picture(grey: np.ndarray) -> Picture:
    return Picture(grey, grey.shape[1], grey.shape[0], "png")


def phantom(height: int = 800, width: int = 660) -> np.ndarray:
    """Two dark lungs on a bright body in dark air, uint8 [height, width]."""
    grey = np.full((height, width), 20, np.uint8)
    cv2.ellipse(grey, (width // 2, height), (width // 2 - 20, height - 40), 0, 0, 360, 150, -1)
    for x in (width // 3, width - width // 3):
        cv2.ellipse(grey, (x, height // 2), (width // 8, height // 4), 0, 0, 360, 60, -1)
    grey[:, width // 2 - 40 : width // 2 + 40] = np.maximum(grey[:, width // 2 - 40 : width // 2 + 40], 190)
    return cv2.add(cv2.GaussianBlur(grey, (0, 0), 4), np.random.default_rng(0).integers(0, 9, grey.shape, np.uint8))


SIZES = [(800, 660), (3056, 2544), (200, 157), (518, 518), (40, 1000), (1000, 16), (519, 517)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_whole_picture_stands_centred_on_black_with_its_aspect(height, width):
    square, scale, pad_x, pad_y = letterbox(np.full((height, width), 200, np.uint8))
    assert square.shape == (SIDE, SIDE) and square.dtype == np.uint8
    inside = np.argwhere(square == 200)
    (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
    assert (left, top) == (pad_x, pad_y) and max(bottom - top, right - left) == SIDE
    assert abs((right - left) - width * scale) <= 1 and abs((bottom - top) - height * scale) <= 1
    assert abs(pad_x - (SIDE - right)) <= 1 and abs(pad_y - (SIDE - bottom)) <= 1
    assert len(inside) == (bottom - top) * (right - left) and (square[square != 200] == 0).all()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_box_there_and_back_is_the_same_box(height, width):
    stored = to_stored(picture(np.full((height, width), 100, np.uint8)))
    box = (0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height)
    there = box_to_stored(box, stored.scale, stored.pad_x, stored.pad_y)
    assert min(there) >= 0 and max(there) <= SIDE
    back = box_to_original(there, stored.scale, stored.pad_x, stored.pad_y)
    assert np.abs(np.subtract(back, box)).max() < 1e-6


@pytest.mark.parametrize("reduced", [False, True])
def test_a_box_lies_where_the_thing_lies(reduced):
    grey = np.zeros((2101, 1703), np.uint8)
    box = (400, 600, 800, 1500)
    grey[600:1500, 400:800] = 255
    data = cv2.imencode(".jpg", grey)[1].tobytes()
    found = decode(data, at_least=SIDE if reduced else None)
    assert ("reduced" in found.notes) == reduced
    stored = to_stored(found)
    bright = np.argwhere(from_stored(stored.jpeg) > 127)
    seen = (*bright.min(axis=0)[::-1], *(bright.max(axis=0)[::-1] + 1))
    assert np.abs(np.subtract(seen, box_to_stored(box, stored.scale, stored.pad_x, stored.pad_y))).max() <= 1


def test_what_is_stored_comes_back_nearly_as_it_was():
    grey = phantom()
    back = from_stored(to_stored(picture(grey)).jpeg)
    assert back.shape == (SIDE, SIDE) and back.dtype == np.uint8
    assert np.abs(back.astype(int) - letterbox(grey)[0]).mean() < 3


def test_the_hash_names_the_bytes_and_follows_the_pixels():
    grey = phantom()
    one, two = to_stored(picture(grey)), to_stored(replace(picture(grey.copy()), kind="dicom", notes=("16bit",)))
    assert one.content_hash == two.content_hash == sha256(one.jpeg).hexdigest()
    other = grey.copy()
    other[400:410, 300:310] = 255
    assert to_stored(picture(other)).content_hash != one.content_hash


def test_bytes_that_are_no_stored_picture_are_refused():
    wrong = cv2.imencode(".jpg", np.zeros((100, 100), np.uint8))[1].tobytes()
    for data in (b"", b"nothing", wrong):
        with pytest.raises(RowError, match="corrupt_stored"):
            from_stored(data)


@pytest.mark.skipif(not REAL, reason="the shared chest X-rays are not on this machine")
def test_an_x_ray_of_usual_size_takes_at_most_50_kilobytes_on_average():
    sizes = []
    for file in REAL[::6]:
        grey = decode(file.read_bytes()).grey
        sizes.append(len(to_stored(picture(cv2.resize(grey, (2544, 3056)))).jpeg))
    assert np.mean(sizes) <= 50_000


def test_a_decent_x_ray_has_no_flags():
    assert quality_flags(phantom()) == []


@pytest.mark.parametrize(
    ("grey", "flag"),
    [
        (np.full((400, 400), 90, np.uint8), "blank"),
        (phantom() // 12 + 100, "low_contrast"),
        (phantom() // 6, "dark"),
        (np.maximum(phantom(), 30) // 4 + 205, "bright"),
        (cv2.copyMakeBorder(phantom(), 400, 400, 300, 300, cv2.BORDER_CONSTANT, value=0), "mostly_border"),
        (255 - phantom(), "inverted_suspect"),
        (phantom(300, 200), "small"),
    ],
)
def test_each_flag_is_raised_by_its_fault(grey, flag):
    assert flag in quality_flags(grey)


@pytest.mark.skipif(not REAL, reason="the shared chest X-rays are not on this machine")
def test_real_x_rays_are_seldom_suspected():
    suspected = missed = 0
    files = REAL[::3]
    for file in files:
        grey = decode(file.read_bytes(), at_least=SIDE).grey
        flags = quality_flags(grey)
        assert not {"blank", "dark", "bright", "low_contrast", "mostly_border"} & set(flags)
        suspected += "inverted_suspect" in flags
        missed += "inverted_suspect" not in quality_flags(255 - grey)
    assert suspected <= 0.05 * len(files) and missed <= 0.35 * len(files)


def test_the_edge_grid_says_where_edges_are():
    grey = np.zeros((SIDE, SIDE), np.uint8)
    grey[100:140, 300:420] = 255
    grid = edge_grid(grey)
    assert grid.shape == (16, 16) and grid.dtype == np.uint8
    cell = SIDE / 16
    touched = np.zeros((16, 16), bool)
    touched[int(99 // cell) : int(140 // cell) + 1, int(299 // cell) : int(420 // cell) + 1] = True
    assert grid[touched].any() and not grid[~touched].any()
    assert edge_grid(phantom(), 4).shape == (4, 4)
