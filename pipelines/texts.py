"""`cxray texts CONFIG`: a cohort's reports -> one text encoder's embeddings.

.venv/bin/cxray texts configs/demo/texts.yaml
"""

from typing import Any

import pyarrow as pa

from contracts.dataset import open_dataset
from contracts.schema import Schema, Section, texts_schema
from contracts.storage import Place
from models.encoders import load_text
from pipelines.job import KEY_NAMES, Job, RowsConfig, Summary, block
from pipelines.pool import EncoderResources, encoder_pool, one_thread_on_cpu


class TextsConfig(RowsConfig):
    cohort: str = "cohort"
    into: str = "texts"
    encoder: str = "st:all-MiniLM-L6-v2"
    report: tuple[Section, ...] = ("findings", "impression")  # the sections that stand for the report, in this order
    resources: EncoderResources = EncoderResources()

    def inputs(self) -> dict[str, Place]:
        return {"cohort": self.at(self.cohort)}


def run(cfg: TextsConfig) -> Summary:
    """Raises CxrayError where there is no cohort, or where the encoder cannot be loaded. A row without a report has no embedding."""
    cohort = open_dataset(cfg.at(cfg.cohort), "cohort")
    encoder = load_text(cfg.encoder, device="cpu")
    about = {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint}
    del encoder
    schema = texts_schema(about["dim"])
    with Job("texts", cfg, schema, made_by=[cohort.fingerprint, about["fingerprint"]]) as job:
        rows = job.read(cohort, ["study_id", *(f"report_{s}" for s in cfg.report)])
        args = (about["name"], cfg.report, schema)
        rows = rows.map_batches(EncodeReports, fn_constructor_args=args, **encoder_pool(cfg.resources))
        return job.write(rows, cpus=0.25, notes=_without_report, encoder=about)


def _without_report(texts: Any) -> list[str]:
    none = texts.table(["report_tokens"])["report_tokens"].null_count
    cut = sum(bool(cut) for cut in texts.table(["report_truncated"])["report_truncated"].to_pylist())
    return [f"without a report: {none:,}; longer than the encoder reads, and cut: {cut:,}"]


class EncodeReports:
    """An actor that holds one text encoder."""

    def __init__(self, name: str, report: tuple[str, ...], schema: Schema) -> None:
        one_thread_on_cpu()
        self.encoder, self.report, self.schema = load_text(name), report, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(keys, study_id, report sections) -> TEXTS."""
        rows = batch.to_pylist()
        said = [" ".join(part for s in self.report if (part := row[f"report_{s}"])) for row in rows]
        have = [i for i, text in enumerate(said) if text]
        done = [{k: row[k] for k in (*KEY_NAMES, "study_id")} | {"segments": []} for row in rows]
        if have:
            found = self.encoder([said[i] for i in have])
            for i, vector, tokens, cut in zip(have, found.embedding, found.tokens, found.truncated, strict=True):
                done[i] |= {"report_embedding": vector, "report_tokens": int(tokens), "report_truncated": bool(cut)}
        return block(done, self.schema)
