"""`cxray features`, the step by itself: a bad picture costs itself and no other, and a row is as small as was promised."""

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.schema import features_schema
from models.encoders.base import ImageEncoder, ImageOutput, unit
from pipelines import features
from pipelines.features import EncodeImages

SCHEMA = features_schema(512, 7, 768)


class Noise(ImageEncoder):
    """A ViT-B/16's shapes. A white picture makes it overflow; `flaw` says where."""

    dim, size, grid, token_dim, joint, fingerprint = 512, 224, 14, 768, False, "noise"
    flaw = "tokens"

    def encode(self, images: np.ndarray) -> ImageOutput:
        rng = np.random.default_rng(0)
        tokens = rng.normal(size=(len(images), 196, 768)).astype(np.float32)
        embedding = unit(rng.normal(size=(len(images), 512)))
        white = images.min(axis=(1, 2)) == 255
        (tokens if self.flaw == "tokens" else embedding)[white] = {"tokens": 1e9, "embedding": np.nan}[self.flaw]
        return ImageOutput(embedding, tokens)


@pytest.fixture
def encode(monkeypatch) -> EncodeImages:
    monkeypatch.setattr(features, "load_image", lambda name: Noise())
    monkeypatch.setattr(features, "one_thread_on_cpu", lambda: None)
    return EncodeImages("noise", 7, SCHEMA)


def jpeg(grey: int, side: int = 518) -> bytes:
    return cv2.imencode(".jpg", np.full((side, side), grey, np.uint8))[1].tobytes()


def batch(*pictures: bytes | None) -> pa.Table:
    ids = [f"d{i}" for i in range(len(pictures))]
    return pa.table({"row_id": ids, "group_id": ids, "split": ["train"] * len(ids), "image": pa.array(pictures, pa.binary())})


def outcomes(table: pa.Table) -> list[str]:
    return [row["reason"] or "row" for row in sorted(table.to_pylist(), key=lambda row: row["row_id"])]


def test_a_stored_picture_that_was_damaged_since_is_a_reject_and_its_neighbours_are_rows(encode):
    found = encode(batch(jpeg(10), jpeg(20)[:300], b"", None, jpeg(30, side=100), jpeg(40)))
    assert outcomes(found) == ["row", *["corrupt_stored"] * 4, "row"]
    assert all(found["lasting"].drop_null().to_pylist()) and found["embedding"].null_count == 4
    assert outcomes(encode(batch(b"", b""))) == ["corrupt_stored"] * 2


@pytest.mark.parametrize("flaw", ["tokens", "embedding"])
def test_a_picture_that_the_encoder_cannot_put_into_numbers_is_a_reject(encode, flaw):
    encode.encoder.flaw = flaw
    found = encode(batch(jpeg(10), jpeg(255), jpeg(30)))
    assert outcomes(found) == ["row", "not_finite", "row"]


def test_a_grid_of_49_tokens_of_768_takes_at_most_45_kb_on_disk(encode, tmp_path):
    """Noise, which no compression makes smaller than a real picture's tokens."""
    pictures = [jpeg(grey) for grey in range(64)]
    pq.write_table(encode(batch(*pictures)), tmp_path / "x.parquet", compression="zstd")
    assert 30_000 < (tmp_path / "x.parquet").stat().st_size / len(pictures) <= 45_000
