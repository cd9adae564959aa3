"""`cxray texts CONFIG`: a cohort's charts and reports -> one text encoder's embeddings, with the passages that each note asked for.

.venv/bin/cxray texts configs/mimic/texts.yaml
"""

import gc
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from contracts.chart import CHART_COLUMNS, Chart
from contracts.dataset import Dataset, open_dataset
from contracts.errors import RowError
from contracts.schema import Schema, Section, texts_schema
from contracts.storage import Place
from models.encoders import load_text
from pipelines.inputs.reading import Inputs, InputsConfig
from pipelines.job import Job, RowsConfig, Summary, block, each
from pipelines.knowledge.retrieve import Knowledge
from pipelines.pool import EncoderResources, encoder_pool, one_thread_on_cpu

KIND = "segments.list.element.kind"  # in Parquet: to be read without the vectors beside it


class TextsConfig(RowsConfig, InputsConfig):
    cohort: str = "cohort"
    knowledge: str | None = None  # the folder that `cxray knowledge` made; without it notes fetch no passages
    into: str = "texts"
    encoder: str = "st:all-MiniLM-L6-v2"
    report: tuple[Section, ...] = ("findings", "impression")  # the sections that stand for the report, in this order
    resources: EncoderResources = EncoderResources(batch=64)  # equal segments of a batch are encoded once

    def inputs(self) -> dict[str, Place]:
        return {"cohort": self.at(self.cohort)} | ({"knowledge": self.at(self.knowledge)} if self.knowledge else {})

    def reading(self) -> InputsConfig:
        """What decides how a chart is read, without where it comes from."""
        return InputsConfig(**{name: getattr(self, name) for name in InputsConfig.model_fields})


def run(cfg: TextsConfig) -> Summary:
    """Raises CxrayError where there is no cohort or knowledge, where the encoder cannot be loaded, or is not the knowledge's own."""
    cohort = open_dataset(cfg.at(cfg.cohort), "cohort")
    encoder = load_text(cfg.encoder, device="cpu")
    knowledge = Knowledge(cfg.at(cfg.knowledge)) if cfg.knowledge else None
    Inputs(cfg.reading(), encoder, knowledge)  # says now, and not in a worker, what does not go together
    about = {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim, "joint": encoder.joint}
    known = {"uri": str(knowledge.where), "fingerprint": knowledge.fingerprint} if knowledge else None
    del encoder, knowledge
    schema = texts_schema(about["dim"])
    with Job("texts", cfg, schema, made_by=[cohort.fingerprint, about["fingerprint"], known["fingerprint"] if known else ""]) as job:
        indication = {"report_indication"} if cfg.notes.indication else set()
        rows = job.read(cohort, ["study_id", *CHART_COLUMNS, *sorted({f"report_{s}" for s in cfg.report} | indication)])
        rows = rows.map_batches(EncodeTexts, fn_constructor_args=(cfg, schema), **encoder_pool(cfg.resources, job.missing))
        return job.write(rows, cpus=0.25, notes=_told, encoder=about, knowledge=known, reading=cfg.reading().model_dump(mode="json"))


class EncodeTexts:
    """An actor that holds one text encoder, and the knowledge base, which is small."""

    def __init__(self, cfg: TextsConfig, schema: Schema) -> None:
        one_thread_on_cpu()
        self.cfg, self.schema, self.encoder = cfg, schema, load_text(cfg.encoder)
        knowledge = Knowledge(cfg.at(cfg.knowledge)) if cfg.knowledge else None
        self.inputs = Inputs(cfg.reading(), self.encoder, knowledge)
        gc.freeze()  # what stays for good need not be walked again with every batch of charts

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(keys, study_id, chart, report sections) -> TEXTS. A chart that holds what no chart may is a reject."""
        rows = list(each(batch, self._read))
        if good := [row for row in rows if "chart" in row]:
            readings = self.inputs([row["chart"] for row in good], [row["group_id"] for row in good])
            for row, reading in zip(good, readings, strict=True):
                row |= {"segments": reading.rows(), "note_tokens": reading.tokens, "note_cut": reading.cut}
                row |= {"removed": [{"rule": rule, "count": n} for rule, n in sorted(reading.note.removed.items())]}
            self._reports(good)
        return block(rows, self.schema)

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        report = " ".join(part for s in self.cfg.report if (part := row[f"report_{s}"]))
        try:
            return {"study_id": row["study_id"], "chart": Chart.from_row(row, indication=self.cfg.notes.indication), "report": report}
        except ValidationError:
            raise RowError("bad_chart") from None

    def _reports(self, rows: list[dict[str, Any]]) -> None:
        """Add the report's embedding where there is a report: what a model is held against, never what it is given."""
        have = [row for row in rows if row["report"]]
        if not have:
            return
        found = self.encoder([row["report"] for row in have])
        for row, vector, tokens, cut in zip(have, found.embedding, found.tokens, found.truncated, strict=True):
            row |= {"report_embedding": vector, "report_tokens": int(tokens), "report_truncated": bool(cut)}


def _told(texts: Dataset) -> list[str]:
    """Lines for the summary: what stands in the notes, what was taken out, what did not fit."""
    table = texts.table(["note_tokens", "note_cut", "removed", "report_tokens", "report_truncated"])
    kinds = Counter(pc.struct_field(pc.list_flatten(texts.leaves([KIND])["segments"]), "kind").to_pylist())
    taken = pc.sum(pc.struct_field(pc.list_flatten(table["removed"]), "count")).as_py() or 0
    from_notes = pc.sum(pc.greater(pc.list_value_length(table["removed"]), 0)).as_py() or 0
    rows, tokens = max(table.num_rows, 1), pc.sum(table["note_tokens"]).as_py() or 0
    return [
        f"a note has {kinds['note'] / rows:.1f} segments, {tokens / rows:.0f} tokens and {kinds['passage'] / rows:.1f} passages",
        f"taken out by the leakage filter: {taken:,} statements, in {from_notes:,} notes",
        f"notes that were too long, and cut: {pc.sum(pc.greater(table['note_cut'], 0)).as_py() or 0:,}",
        f"without a report: {table['report_tokens'].null_count:,}; "
        f"longer than the encoder reads, and cut: {pc.sum(table['report_truncated']).as_py() or 0:,}",
    ]
