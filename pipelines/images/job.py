"""`cxray images CONFIG`: a cohort's image files -> 8-bit grey pictures of 518 x 518, the only thing an encoder ever sees.

.venv/bin/cxray images configs/mimic/images.yaml
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, Literal

import pyarrow as pa

from contracts.config import Config
from contracts.dataset import Dataset, open_dataset
from contracts.errors import RowError
from contracts.schema import IMAGES
from contracts.storage import Place
from pipelines.images.decode import Limits, decode
from pipelines.images.fetch import fetcher
from pipelines.images.stored import SIDE, edge_grid, quality_flags, to_stored
from pipelines.job import Job, RowsConfig, Summary, block, each
from pipelines.pool import RETRIES, keep_memory

EDGE_GRID = 16  # cells a side of the optional edge-density grid


# Of a core. Ray takes a tenth of a second and more to hand out the next block, and a store takes its time to answer: with two tasks a
# core there is always one that computes. With three on two cores, these stood still for 8 % of the time, so for 3 %.
CPUS = 0.5


class Resources(Config):
    batch: int = 32  # images a table that a task hands on
    fetches: int = 8  # files under way at once in one task, where the store bears it


class ImagesConfig(RowsConfig):
    cohort: str = "cohort"
    into: str = "images"
    dicom: Literal["mimic_jpg", "clinical"] = "mimic_jpg"  # what a DICOM is made to look like: the official JPGs, or its own window
    regions: Literal["none", "edges"] = "none"
    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000  # of a frame; each channel counts in PNG and DICOM
    resources: Resources = Resources()

    def inputs(self) -> dict[str, Place]:
        return {"cohort": self.at(self.cohort)}


def run(cfg: ImagesConfig) -> Summary:
    """Raises CxrayError where there is no cohort, or where the bucket refuses; an image that cannot be read is a reject."""
    cohort = open_dataset(cfg.at(cfg.cohort), "cohort")
    # Of what made the cohort only its ids, patients and splits decide what stands here: another chart needs no second look at the images.
    with Job("images", cfg, IMAGES, made_by=[cohort.rows_fingerprint]) as job:
        rows = job.read(cohort, ["image_uri"])
        rows = rows.map_batches(prepare(cfg), batch_format="pyarrow", batch_size=None, num_cpus=CPUS, max_retries=RETRIES)
        return job.write(rows, cpus=CPUS, notes=equal_images)


def prepare(cfg: ImagesConfig) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """The step from a block of (keys, image_uri) to tables of IMAGES. Files are fetched while those before them are decoded."""
    limits = Limits(max_bytes=cfg.max_bytes, max_pixels=cfg.max_pixels)

    def step(rows: pa.Table) -> Iterator[pa.Table]:
        import cv2

        cv2.setNumThreads(1)  # one task, one core: Ray shares the cores out
        keep_memory()
        store = fetcher(cfg.storage, cfg.resources.fetches, cfg.max_bytes)  # pyright: ignore[reportArgumentType]
        files = store.each(rows["image_uri"].to_pylist())

        def columns(row: dict[str, Any]) -> dict[str, Any]:
            data = next(files)
            if isinstance(data, RowError):
                raise data
            try:
                return picture(data, cfg, limits)
            except RowError:
                whole = store.mended(row["image_uri"], data)
                if whole is None:
                    raise
                return picture(whole, cfg, limits)

        for start in range(0, rows.num_rows, cfg.resources.batch):
            yield block(each(rows.slice(start, cfg.resources.batch), columns), IMAGES)

    return step


def picture(data: bytes, cfg: ImagesConfig, limits: Limits) -> dict[str, Any]:
    """A file's bytes -> the columns of IMAGES besides the keys. Raises RowError."""
    found = decode(data, preset=cfg.dicom, limits=limits, at_least=SIDE)
    stored = to_stored(found)
    return {
        "image": stored.jpeg,
        "width": found.width,
        "height": found.height,
        "scale": stored.scale,
        "pad_x": stored.pad_x,
        "pad_y": stored.pad_y,
        "source": found.kind,
        "source_bytes": len(data),
        "source_hash": sha256(data).hexdigest(),
        "content_hash": stored.content_hash,
        "flags": [*found.notes, *quality_flags(found.grey)],
        "edges": edge_grid(found.grey, EDGE_GRID).tobytes() if cfg.regions == "edges" else None,
    }


def equal_images(images: Dataset) -> list[str]:
    """Pictures that stand under two patients: what a split by patient does not keep apart."""
    table = images.table(["content_hash", "group_id", "split"])
    patients, splits = defaultdict(set), defaultdict(set)
    for content, patient, split in zip(*(table[c].to_pylist() for c in table.column_names), strict=True):
        patients[content].add(patient)
        splits[content].add(split)
    shared = [content for content, people in patients.items() if len(people) > 1]
    if not shared:
        return []
    across = sum(len(splits[content]) > 1 for content in shared)
    return [f"equal pictures under two patients: {len(shared):,}, of which across splits: {across:,}"]
