"""2,000 damaged files, and bombs, through the step that makes a picture: each a row or a reject, soon, in little memory; no worker dies."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from test_dicom import BUNDLED, SEEDS, dataset, file, head
from trees import cohort, write_tree

from contracts.config import load
from contracts.dataset import open_dataset
from contracts.errors import RowError
from contracts.storage import place
from pipelines.images.decode import Limits
from pipelines.images.job import ImagesConfig, picture, run

FILES = 2_000
SECONDS = 10  # on the core, for any one file; the dearest is a JPEG 2000 that says it has 100 million pixels
GROWN_MB = 300  # beyond what the first whole pictures took, over all mutations
BOMB_MB = 1_300  # the same for what is as large as the limits allow, and means it

SHARED = Path(os.environ.get("CXRAY_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
LIES = (
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\0\0\0",
    b"\0\0\0\0",
    b"\0\0\0\1",
    b"\xfe\xff\0\xe0",
    b"\xff\xd8\xff\xe1",
)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def seeds() -> dict[str, list[bytes]]:
    """Whole files of each kind: built here, those that pydicom brings, and real X-rays where they are on this machine."""
    ramp = np.linspace(0, 180, 140 * 160).reshape(160, 140) + np.random.default_rng(0).normal(0, 20, (160, 140))
    image = Image.fromarray(ramp.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [
        saved(image, "JPEG", exif=exif),
        saved(image.convert("RGB"), "JPEG"),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "JPEG", progressive=True),
        saved(image.convert("RGB"), "JPEG", progressive=True),
        cv2.imencode(".jpg", np.asarray(image), [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1].tobytes(),
    ]
    pngs = [saved(image.convert(mode), "PNG") for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "I;16")]
    dicoms = [file(dataset()), file(dataset(WindowCenter=500, WindowWidth=100, PixelPaddingValue=0))]
    dicoms += [(BUNDLED / f"{name}.dcm").read_bytes() for name in SEEDS if (BUNDLED / f"{name}.dcm").exists()]
    real = sorted(SHARED.glob("cxr-ccby/images/*.jpg"), key=lambda f: f.stat().st_size)[:3]
    return {
        "jpeg": jpegs + [f.read_bytes() for f in real],
        "png": pngs + [f.read_bytes() for f in sorted(SHARED.glob("cxr-ccby/images/*.png"))[:1]],
        "dicom": dicoms + [f.read_bytes() for f in sorted(SHARED.glob("dicom/*.dcm"))],
    }


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, a cut, a hole, lengths that lie, a stretch said many times, or the head of one file on the body of another."""
    out, kind = bytearray(data), rng.integers(7)
    first = int(rng.integers(len(out)))
    if kind == 0:
        return bytes(out[:first])
    if kind == 1:
        del out[first : first + int(rng.integers(1, 400))]
    elif kind == 2:
        out[first:first] = out[first : first + int(rng.integers(1, 200))] * int(rng.integers(1, 2_000))
    elif kind == 3:
        return data[:first] + other[int(rng.integers(len(other))) :]
    else:
        reach = len(out) if kind == 4 else min(len(out), 1_500)
        for at in rng.integers(0, max(1, reach - 4), int(rng.integers(1, 12))):
            if kind == 6:
                out[at : at + 4] = LIES[rng.integers(len(LIES))]
            else:
                out[at] ^= 1 << int(rng.integers(8))
    # Half of the damaged PNGs get right checksums again, or none would come further than these.
    return mended(bytes(out)) if data[:4] == b"\x89PNG" and rng.integers(2) else bytes(out)


def mended(data: bytes) -> bytes:
    """A PNG with the right checksum for whatever stands in its chunks."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out) and (end := at + 12 + int.from_bytes(out[at : at + 4])) <= len(out):
        out[end - 4 : end] = zlib.crc32(out[at + 4 : end - 4]).to_bytes(4)
        at = end
    return bytes(out)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros(count: int, raw: bool = False) -> bytes:
    """So many zeros, deflated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS)
    return b"".join(packer.compress(bytes(min(1 << 22, count - at))) for at in range(0, count, 1 << 22)) + packer.flush()


def big_png(width: int, height: int, depth: int, colour: int, data: bytes, more: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + more + chunk(b"IEND", b"")


def big_jpeg(side: int, channels: int, progressive: bool) -> bytes:
    return cv2.imencode(".jpg", np.zeros((side, side, channels), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)])[1].tobytes()


def codestream(side: int, components: int) -> bytes:
    """A JPEG 2000 of no data that says how large it is (T.800, A.5.1 and A.6)."""
    size = struct.pack(">H8IH", 0, side, side, 0, 0, side, side, 0, 0, components) + b"\x07\1\1" * components
    style = b"\xff\x52\0\x0c\0\0\0\1\0\5\4\4\0\1\xff\x5c\0\x13" + b"\x40" * 17
    return (
        b"\xff\x4f\xff\x51"
        + struct.pack(">H", len(size) + 2)
        + size
        + style
        + b"\xff\x90\0\x0a\0\0\0\0\0\0\0\1\xff\x93"
        + bytes(16)
        + b"\xff\xd9"
    )


def wrapped(code: bytes, syntax: uid.UID, side: int, samples: int = 1) -> bytes:
    made = dataset(np.zeros((2, 2), np.uint8), 8, syntax, Rows=side, Columns=side, SamplesPerPixel=samples)
    made.PhotometricInterpretation, made.PlanarConfiguration = ("RGB" if samples == 3 else "MONOCHROME2"), 0
    made.PixelData = pydicom.encaps.encapsulate([code])
    return file(made)


def many_dicom_elements(wrapper: bytes) -> bytes:
    return head(uid.ImplicitVRLittleEndian) + wrapper + struct.pack("<HHI", 0x11, 0x10, 0) * 2_000_000


def bombs() -> dict[str, Callable[[], bytes]]:
    """Small files that ask for much memory or time."""
    small = big_jpeg(300, 1, False)
    nested = struct.pack("<HHIHHI", 0x11, 0x3010, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF)
    table = struct.pack("<HHIHHI", 0x28, 0x3000, 16_000_008, 0xFFFE, 0xE000, 16_000_000)
    return {
        "png grey": lambda: big_png(9_999, 9_999, 8, 0, zeros(9_999 * 10_000)),
        "png of 16 bits and transparent": lambda: big_png(4_999, 4_999, 16, 6, zeros(4_999 * (4_999 * 8 + 1))),
        "png of 16 bits, over the limit": lambda: big_png(9_999, 9_999, 16, 6, zeros(1_000)),
        "png of 4 billion a side": lambda: big_png(2**32 - 1, 2**32 - 1, 8, 0, zeros(1_000)),
        "png with more data than pixels": lambda: big_png(300, 300, 8, 0, zeros(1 << 28)),
        "png with a huge profile": lambda: big_png(300, 300, 8, 0, zeros(301 * 300), chunk(b"iCCP", b"a\0\0" + zeros(1 << 28))),
        "png of empty chunks": lambda: big_png(300, 300, 8, 0, zeros(301 * 300), chunk(b"IDAT", b"") * 2_000_000),
        "jpeg": lambda: big_jpeg(9_999, 1, False),
        "jpeg, progressive, in colour": lambda: big_jpeg(9_999, 3, True),
        "jpeg of empty segments": lambda: small[:2] + b"\xff\xe5\0\2" * 8_000_000 + small[2:],
        "jpeg of filling": lambda: small[:2] + b"\xff" * 30_000_000 + small[2:],
        "jpeg of stuffing": lambda: small[:2] + b"\xff\0" * 15_000_000 + small[2:],
        "dicom, jpeg 2000": lambda: wrapped(codestream(9_999, 1), uid.JPEG2000, 9_999),
        "dicom, jpeg 2000 of 300 components": lambda: wrapped(codestream(5_000, 300), uid.JPEG2000, 5_000),
        "dicom, jpeg in colour": lambda: wrapped(big_jpeg(5_700, 3, False), uid.JPEGBaseline8Bit, 5_700, 3),
        "dicom, rle": lambda: wrapped(struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 781_094, uid.RLELossless, 9_999),
        "dicom, deflated": lambda: head(uid.DeflatedExplicitVRLittleEndian) + zeros(1 << 28, raw=True),
        "dicom of empty elements": lambda: many_dicom_elements(b""),
        "dicom of empty elements in a sequence": lambda: many_dicom_elements(nested),
        "dicom of empty elements in a table": lambda: file(dataset()) + table + struct.pack("<HHI", 0x11, 0x10, 0) * 2_000_000,
    }


def peak_mb() -> float:
    """The most memory that this process held, in MB. (getrusage counts what its parent held when it began, too.)"""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def attempt(name: str, data: bytes, dicom: str) -> dict:
    """What became of one file. What is no RowError propagates, and ends the child."""
    begun = time.thread_time()
    try:
        row = picture(data, load(ImagesConfig, {"dicom": dicom, "regions": "edges"}), Limits())
        came = "row" if row["image"] and len(row["edges"]) == 256 else "half a row"
    except RowError as error:
        came = error.reason
    return {"name": name, "came": came, "seconds": time.thread_time() - begun, "peak_mb": peak_mb()}


def work(what: str) -> None:
    """In a child: all files of a kind, a line for each. Address space and time on the core have an end, so that a bomb ends here."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    cv2.setNumThreads(1)
    whole = seeds()
    for kind, files in whole.items():
        for number, data in enumerate(files):
            print(json.dumps(attempt(f"whole {kind} {number}", data, "clinical")), flush=True)
    if what == "bombs":
        for name, make in bombs().items():
            print(json.dumps(attempt(name, make(), "clinical")), flush=True)
        return
    kinds = list(whole)
    for number in range(FILES):
        rng = np.random.default_rng(number)
        files = whole[kinds[number % len(kinds)]]
        other = whole[kinds[rng.integers(len(kinds))]]
        data = mutated(files[rng.integers(len(files))], other[rng.integers(len(other))], rng)
        print(json.dumps(attempt(f"mutation {number}", data, ("clinical", "mimic_jpg")[number // len(kinds) % 2])), flush=True)


def in_a_child(what: str) -> tuple[list[dict], list[dict]]:
    """(whole files, the others): what a child that works through them said of each. It must live to the end."""
    done = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, timeout=400, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} after {said[-1:]}: {done.stderr[-2_000:]}"
    whole = [s for s in said if s["name"].startswith("whole")]
    return whole, said[len(whole) :]


def test_2000_mutations_are_each_a_row_or_a_reject_soon_and_in_little_memory():
    whole, others = in_a_child("mutations")
    assert len(others) == FILES and {w["came"] for w in whole} == {"row"}
    came = Counter(o["came"] for o in others)
    assert came["half a row"] == 0 and came["row"] > 100 and {"truncated", "corrupt", "corrupt_dicom", "not_an_image"} <= set(came)
    assert max(others, key=lambda o: o["seconds"])["seconds"] < SECONDS
    assert others[-1]["peak_mb"] - whole[-1]["peak_mb"] < GROWN_MB


@pytest.mark.fault
def test_bombs_cost_little_time_and_bounded_memory():
    whole, others = in_a_child("bombs")
    assert len(others) == len(bombs())
    assert max(others, key=lambda o: o["seconds"])["seconds"] < SECONDS
    assert others[-1]["peak_mb"] - whole[-1]["peak_mb"] < BOMB_MB
    refused = {o["name"]: o["came"] for o in others if o["came"] != "row"}
    assert {"png of empty chunks", "jpeg of empty segments", "dicom, jpeg 2000 of 300 components", "dicom, deflated"} <= set(refused)


def noted(folder: Path) -> Callable[..., dict]:
    """`picture`, which leaves behind who tried a file before it looks at it: a worker that dies of one is known by another's second try."""

    def step(data: bytes, cfg: ImagesConfig, limits: Limits) -> dict:
        (folder / f"{zlib.crc32(data):08x}-{os.getpid()}-{time.time_ns()}").touch()
        return picture(data, cfg, limits)

    return step


def test_hostile_files_end_no_worker_of_a_job(local_ray, tmp_path, monkeypatch):
    """60 of them between whole ones: each id in rows or in rejects, once, each tried once, and those who tried are alive."""
    whole = seeds()
    files = {f"whole{i}": data for i, data in enumerate(whole["jpeg"] + whole["png"])}
    for number in range(50):
        rng, kind = np.random.default_rng(number), list(whole)[number % 3]
        files[f"wild{number:02}"] = mutated(whole[kind][number % len(whole[kind])], whole["png"][0], rng)
    cheap = (
        "png of 4 billion a side",
        "png of 16 bits, over the limit",
        "png of empty chunks",
        "jpeg of empty segments",
        "jpeg of filling",
    )
    cheap += ("dicom, jpeg 2000 of 300 components", "dicom, deflated", "dicom of empty elements", "png with a huge profile", "jpeg")
    files |= {f"bomb{i}": bombs()[name]() for i, name in enumerate(cheap)}
    images = [{"dicom_id": n, "subject_id": 10000000 + i, "study_id": 50000000 + i} for i, n in enumerate(files)]
    for row in cohort(write_tree(tmp_path / "tree", metadata=images), tmp_path)[0]:
        Path(row["image_uri"]).parent.mkdir(parents=True, exist_ok=True)
        Path(row["image_uri"]).write_bytes(files[row["row_id"]])
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setattr("pipelines.images.job.picture", noted(seen))
    run(load(ImagesConfig, {"out": str(tmp_path)}))
    made = open_dataset(place(tmp_path / "images"), "images")
    done = Counter(r for outcome in ("row", "reject") for r in made.table(["row_id"], outcome=outcome)["row_id"].to_pylist())
    assert done == Counter(files.keys()) and made.rows >= len(files) - 60
    tries = [name.name.split("-") for name in seen.iterdir()]
    assert Counter(content for content, *_ in tries) == Counter(f"{zlib.crc32(data):08x}" for data in files.values())
    assert all(Path(f"/proc/{worker}").exists() for _, worker, _ in tries)


if __name__ == "__main__":
    work(sys.argv[1])
