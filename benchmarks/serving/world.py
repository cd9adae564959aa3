"""What the benchmark of serving serves: X-rays of MIMIC's size, a fusion run and an index, all of random weights and drawn data."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from search import world as vectors_of
from search import write

from contracts.config import load
from contracts.findings import FINDINGS, label_column
from contracts.runs import record
from contracts.schema import COHORT, features_schema, texts_schema

WIDTH, HEIGHT, DISTINCT, GRID = 2544, 3056, 24, 7
# Of the image encoder, a ViT/16: DeiT-tiny's and DeiT-small's, and BiomedCLIP's and RAD-DINO's. The words' is as wide: all-MiniLM-L6-v2
# itself, and beside the base, as in BiomedCLIP, a BERT-base.
SHAPES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
LAYERS = 12
MINILM = "st:all-MiniLM-L6-v2"
WORDS = (
    "left",
    "right",
    "basal",
    "apical",
    "small",
    "large",
    "mild",
    "effusion",
    "edema",
    "opacity",
    "nodule",
    "fracture",
    "stable",
    "new",
)


def pictures() -> list[bytes]:
    """Smooth shapes and detector noise, as JPEG: about 1.6 MB each, as MIMIC's are."""
    rng, made = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        shape = cv2.resize(rng.integers(20, 235, (24, 20)).astype(np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(shape + rng.normal(0, 3, shape.shape), 0, 255).astype(np.uint8)
        made.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 93])[1].tobytes())
    return made


def questions(count: int) -> list[str]:
    """Sentences as long as a report's: five to fifteen words."""
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 16))) for _ in range(count)]


def make(out: Path, shape: str, rows: int) -> None:
    """Run folders `fusion` and `index` below `out`: networks that have learnt nothing, over embeddings that were drawn, not computed."""
    import torch
    from transformers import ViTConfig, ViTModel

    from models.encoders import load_image, load_text
    from pipelines.search import index
    from trainers.fusion import Fusion
    from trainers.sources import FusionConfig, Sources

    torch.manual_seed(0)
    of: dict[str, Any] = {"num_hidden_layers": LAYERS, "image_size": 224, "patch_size": 16} | SHAPES[shape]
    ViTModel(ViTConfig(**of)).save_pretrained(out / "vit")
    image, text = load_image(f"hf:{out}/vit", "cpu"), load_text(_bert(out / "bert", shape) if shape == "base" else MINILM, "cpu")
    about, rng = _about(image) | {"grid": GRID}, np.random.default_rng(0)
    drawn = vectors_of(rows, image.dim, 1)
    keys = pa.table({"row_id": [f"{n:07d}" for n in range(rows)], "group_id": drawn.patient.astype(str), "split": ["train"] * rows})
    states = {label_column(finding): pa.array(rng.integers(0, 2, rows), pa.int8()) for finding in FINDINGS}
    said = {"study_id": drawn.study.astype(str), "view": ["PA"] * rows, "label_row": [True] * rows, "report_impression": questions(rows)}
    write(out / "cohort", COHORT, pa.table({name: keys[name] for name in keys.column_names} | said | states))
    vectors = keys.append_column("embedding", _fixed(drawn.vectors))
    write(out / "indexed", features_schema(image.dim, 0, 0), vectors, encoder=about)
    few = vectors.slice(0, 64)
    few = few.append_column("tokens", pa.array([rng.bytes(GRID**2 * image.dim) for _ in range(64)], pa.binary(GRID**2 * image.dim)))
    few = few.append_column("token_scales", pa.array([bytes(2 * GRID**2)] * 64, pa.binary(2 * GRID**2)))
    write(out / "features", features_schema(image.dim, GRID, image.token_dim), few, encoder=about)
    reports = rng.standard_normal((rows, text.dim), np.float32)
    reports /= np.linalg.norm(reports, axis=1, keepdims=True)
    write(out / "texts", texts_schema(text.dim), keys.append_column("report_embedding", _fixed(reports)), encoder=_about(text))
    index.run(load(index.IndexConfig, {"out": str(out), "features": "indexed", "texts": "texts"}))

    cfg = load(FusionConfig, {"out": str(out), "texts": None, "modalities": ["image", "clinical"]})
    sources = Sources(cfg)
    task, model = Fusion(cfg, sources), out / "fusion" / "model"
    task.fit(sources.data(cfg).small_columns("train", task.columns))
    model.mkdir(parents=True)
    task.export(task.build(), model)
    record(cfg.output(), "train", cfg, cfg.inputs(), {})


def _bert(folder: Path, shape: str) -> str:
    """A BERT of that shape, of random weights, that knows the questions' words: its name for `load_text`."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=256).save_pretrained(folder)
    BertModel(BertConfig(num_hidden_layers=LAYERS, **SHAPES[shape]), add_pooling_layer=False).save_pretrained(folder)
    return f"hf:{folder}"


def _about(encoder) -> dict:
    return {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint}


def _fixed(vectors: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])


def config(out: Path, port: int, replicas: int) -> Path:
    """The YAML to serve both by: everything as it comes but for the image encoder's replicas and the time-outs."""
    args = {"out": str(out), "models": {"fusion": {}, "search": {}}, "image": {"replicas": replicas, "timeout_s": 60}}
    args |= {"gateway": {"rate_per_minute": 10**9, "deadline_s": 60}}  # two cores may need 20 s for 64 X-rays
    said = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [{"name": "cxray", "route_prefix": "/", "import_path": "serve.app:app", "args": args}],
    }
    file = out / "serve.yaml"
    file.write_text(json.dumps(said))
    return file
