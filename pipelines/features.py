"""`cxray features CONFIG`: stored pictures -> one image encoder's embedding and token grid.

.venv/bin/cxray features configs/mimic/features.yaml --set encoder=hog:
"""

from typing import Any

import numpy as np
import pyarrow as pa

from contracts.dataset import open_dataset
from contracts.errors import RowError
from contracts.schema import Schema, features_schema
from contracts.storage import Place
from models.encoders import load_image
from models.encoders.base import ImageEncoder
from models.encoders.grid import pool_grid, quantise
from pipelines.images.stored import from_stored
from pipelines.job import Job, RowsConfig, Summary, block, each
from pipelines.pool import EncoderResources, encoder_pool, keep_memory, one_thread_on_cpu


class FeaturesConfig(RowsConfig):
    images: str = "images"
    into: str = "features"
    encoder: str = "hog:"
    grid: int | None = 7  # tokens are pooled to grid x grid; null keeps the encoder's own grid
    resources: EncoderResources = EncoderResources()

    def inputs(self) -> dict[str, Place]:
        return {"images": self.at(self.images)}


def run(cfg: FeaturesConfig) -> Summary:
    """Raises CxrayError where there are no images, or where the encoder cannot be loaded."""
    images = open_dataset(cfg.at(cfg.images), "images")
    encoder = load_image(cfg.encoder, device="cpu")  # here only to be asked what it is; the actors load their own
    grid = min(cfg.grid or encoder.grid, encoder.grid)
    schema = features_schema(encoder.dim, grid, encoder.token_dim)
    about = {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint, "grid": grid}
    del encoder
    with Job("features", cfg, schema, made_by=[images.fingerprint, about["fingerprint"]]) as job:
        rows = job.read(images, ["image"])
        rows = rows.map_batches(EncodeImages, fn_constructor_args=(about["name"], grid, schema), **encoder_pool(cfg.resources, job.missing))
        return job.write(rows, cpus=0.25, encoder=about)


class EncodeImages:
    """An actor that holds one image encoder."""

    def __init__(self, name: str, grid: int, schema: Schema) -> None:
        one_thread_on_cpu()
        keep_memory()
        self.encoder, self.grid, self.schema = load_image(name), grid, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(keys, image) -> FEATURES. A stored picture that was damaged since, or that the encoder cannot put into numbers, is a reject."""
        rows = list(each(batch, lambda row: {"picture": from_stored(row["image"])}))
        good = [row for row in rows if "picture" in row]
        for row, found in zip(good, self.rows([row.pop("picture") for row in good]), strict=True):
            row |= found
        return block(rows, self.schema)

    def rows(self, pictures: list[np.ndarray]) -> list[dict[str, Any]]:
        """What FEATURES holds of each; of a batch that is refused each by itself, or why not."""
        if not pictures:
            return []
        try:
            return encoded(self.encoder, self.grid, np.stack(pictures))
        except RowError as error:
            if len(pictures) == 1:
                return [{"reason": error.reason, "lasting": error.lasting}]
            return [row for picture in pictures for row in self.rows([picture])]


def encoded(encoder: ImageEncoder, grid: int, pictures: np.ndarray) -> list[dict[str, Any]]:
    """uint8 [B, 518, 518] -> what FEATURES holds of each: `embedding` and, where the encoder has any, `tokens` and `token_scales`.

    Raises RowError not_finite where one of them makes the encoder overflow.
    """
    found = encoder(pictures)
    if not np.isfinite(found.embedding).all():
        raise RowError("not_finite")
    rows: list[dict[str, Any]] = [{"embedding": embedding} for embedding in found.embedding]
    if found.tokens is not None and grid:
        pooled = pool_grid(found.tokens, encoder.grid, grid)
        try:
            tokens, scales = quantise(pooled)
        except ValueError as error:
            raise RowError("not_finite") from error
        for row, token, scale in zip(rows, tokens, scales, strict=True):
            row |= {"tokens": token.tobytes(), "token_scales": scale.tobytes()}
    return rows
