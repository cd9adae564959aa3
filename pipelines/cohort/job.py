"""`cxray cohort CONFIG`: MIMIC's tables -> one row an image, and a data card.

.venv/bin/cxray cohort configs/mimic/cohort.yaml --set root=TREE
"""

import json
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import Config
from contracts.dataset import Dataset, publish
from contracts.errors import CxrayError
from contracts.runs import finished, read_run, record
from contracts.schema import COHORT
from contracts.storage import Place
from pipelines.cohort.card import describe, draw
from pipelines.cohort.charts import LABS, build_charts, read_charts
from pipelines.cohort.pieces import pieces
from pipelines.cohort.reports import read_reports
from pipelines.cohort.sources import Found, Sources, Tables, find, sizes
from pipelines.cohort.splits import SplitConfig, assign_splits, write_kept
from pipelines.cohort.studies import choose_rows, read_images, read_studies
from pipelines.cohort.targets import read_targets
from pipelines.cohort.visits import link_visits, read_visits
from pipelines.job import VerbConfig
from pipelines.lease import Lease
from pipelines.ledger import ids_hash

ROWS_A_FILE = 20_000


class Resources(Config):
    memory: str | None = None  # DuckDB's limit, such as '4GB'; beyond it joins spill to disk
    spill_to: str | None = None


class CohortConfig(VerbConfig):
    root: str | None = None  # sources that are not named are looked for below it
    sources: Sources = Sources()
    into: str = "cohort"
    images: Literal["one_frontal", "frontal", "all"] = "one_frontal"
    # AP and PA give the 243,334 frontal images that are published for MIMIC-CXR; axial and decubitus views are another picture.
    frontal_views: tuple[str, ...] = ("AP", "PA")
    labels: Literal["chexpert", "negbio"] = "chexpert"
    splits: SplitConfig = SplitConfig()
    ed_window_hours: float = 24.0
    lab_hours: float = 24.0  # how far back a lab may have become known
    lab_items: tuple[int, ...] = LABS
    reports_required: bool = False  # drop studies whose report is absent or short
    resources: Resources = Resources()

    outside_fingerprint: ClassVar[frozenset[str]] = VerbConfig.outside_fingerprint | {"root", "sources"}


@dataclass
class CohortSummary:
    where: str
    card: dict[str, Any]
    seconds: float

    def __str__(self) -> str:
        c = self.card
        dropped = ", ".join(f"{reason} {n:,}" for reason, n in c["images"]["dropped"].items()) or "none"
        return "\n".join(
            [
                f"cohort: {c['images']['rows']:,} rows of {c['images']['in_table']:,} images -> {self.where}",
                f"  {c['patients']:,} patients, {c['studies']:,} studies; dropped: {dropped}",
                f"  with an emergency visit: {c['ed']['linked']:,}; with a report: {c['reports']['present']:,}",
                "  absent sources (their columns are empty): " + (", ".join(c["absent"]) or "none"),
                f"  data card: {self.where}/cohort.html ({self.seconds:.1f} s)",
            ]
        )


def run(cfg: CohortConfig) -> CohortSummary:
    """Raises CxrayError for a source, table or column that is not there, and for a cohort without rows."""
    started = time.monotonic()
    found = find(cfg.sources, cfg.root, cfg.storage)
    with Lease(cfg.output() / "_lease") as lease:
        card = _make(cfg, found, lease)
    return CohortSummary(str(cfg.output()), card, time.monotonic() - started)


def _make(cfg: CohortConfig, found: Found, lease: Lease) -> dict[str, Any]:
    """The cohort -> its card."""
    out, tables = cfg.output(), Tables(cfg.resources.memory, cfg.resources.spill_to)

    read_studies(tables, found, cfg.labels)
    read_images(tables, found, cfg.sources.image_format, cfg.frontal_views)
    kept = assign_splits(tables, cfg.splits, out)
    studies = tables.con.execute("SELECT DISTINCT subject_id, study_id FROM images ORDER BY ALL").fetchall()
    tables.con.register("reports", read_reports(found.reports, studies))
    choose_rows(tables, cfg.images, cfg.reports_required)
    if not _count(tables, "rows"):
        raise CxrayError(f"the cohort is empty: {_why_empty(tables)}")
    read_visits(tables, found)
    link_visits(tables, cfg.ed_window_hours)
    read_charts(tables, found, cfg.lab_items, cfg.lab_hours)
    build_charts(tables, cfg.lab_hours)
    read_targets(tables, found)
    _assemble(tables)

    files = _write(tables, out)
    lease.renew()
    if kept is not None:
        write_kept(out, cfg.splits, kept)
    card = describe(tables, found)
    fingerprint = cfg.fingerprint(COHORT.name, str(COHORT.version), json.dumps(sizes(found), sort_keys=True))
    rows_fingerprint = cfg.splits.fingerprint(cfg.sources.image_format)
    cohort = publish(out, COHORT, fingerprint, files, rows_fingerprint=rows_fingerprint, card=card, **_ids(tables))
    _remove_others(out, cohort)
    draw(card, out)
    record(out, "cohort", cfg, {}, {
        "rows": cohort.rows, "dropped": card["images"]["dropped"], "sources": found.named(), "sizes": sizes(found),
    })  # fmt: skip
    return card


def unchanged(verb: str, cfg: CohortConfig) -> bool:
    """True where the cohort of just these settings stands, and its tables have the sizes they had."""
    before = read_run(cfg.output())
    if before is None or not finished(cfg.output(), verb, cfg, {}):
        return False
    found = find(cfg.sources, cfg.root, cfg.storage)
    return before["summary"]["sources"] == found.named() and before["summary"]["sizes"] == sizes(found)


def _assemble(tables: Tables) -> None:
    tables.con.execute("""
        CREATE VIEW assembled AS
        SELECT r.n, r.row_id, r.subject_id::VARCHAR AS group_id, r.split, r.study_id::VARCHAR AS study_id, r.study_time, r.view, r.frontal,
               r.image_uri, r.pixels AS image_pixels, v.stay_id::VARCHAR AS stay_id, v.hadm_id::VARCHAR AS hadm_id, v.stay_offset_hours,
               c.* EXCLUDE (n), l.study_id IS NOT NULL AS label_row, l.* EXCLUDE (study_id),
               r.report_status, p.* EXCLUDE (study_id, status), t.* EXCLUDE (n)
        FROM rows r JOIN visits v USING (n) JOIN charts c USING (n) JOIN targets t USING (n)
        LEFT JOIN labels l USING (study_id) LEFT JOIN reports p USING (study_id)""")


def _write(tables: Tables, out: Place) -> list[dict[str, Any]]:
    """The cohort -> Parquet under names of its own; nothing reads them before dataset.json lists them."""
    fs, root = out.arrow()
    fs.create_dir(f"{root}/data", recursive=True)

    def put(piece: pa.Table) -> dict[str, Any]:
        path = f"data/{uuid.uuid4().hex}.parquet"
        pq.write_table(piece, f"{root}/{path}", filesystem=fs, compression="zstd", row_group_size=5_000)
        return {"path": path, "outcome": "row", "rows": piece.num_rows, "bytes": fs.get_file_info(f"{root}/{path}").size}

    files: list[Future[dict[str, Any]]] = []
    with ThreadPoolExecutor(1) as writer:
        for piece in pieces(tables, _count(tables, "rows"), ROWS_A_FILE):
            if files:
                files[-1].result()  # one is written while the next is made, and no more than these are in memory
            files.append(writer.submit(put, piece))
    return [file.result() for file in files]


def _remove_others(out: Place, now: Dataset) -> None:
    """Delete the files of the cohort that stood here before, and what a killed run left."""
    listed = {f["path"] for f in now.manifest["files"]}
    for file in (out / "data").files(".parquet"):
        if file.relative(out) not in listed:
            file.remove()


def _ids(tables: Tables) -> dict[str, Any]:
    ids = tables.con.sql("SELECT row_id FROM cohort").to_arrow_table()["row_id"]
    return {"rows_in": len(ids), "ids_hash": ids_hash(ids), "columns": [f"{f.name}: {f.type}" for f in COHORT.columns]}


def _count(tables: Tables, table: str) -> int:
    return tables.con.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]


def _why_empty(tables: Tables) -> str:
    reasons = tables.con.execute("SELECT reason, count(*) FROM dropped GROUP BY reason ORDER BY 2 DESC, 1").fetchall()
    return ", ".join(f"{n:,} images dropped as {reason}" for reason, n in reasons) or "the metadata table has no images"
