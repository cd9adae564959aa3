"""Who trains and who tests. Official splits, or one's own by patient, stratified by finding, kept once made."""

import hashlib
from collections import Counter, defaultdict
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from contracts.config import Config
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, label_column
from contracts.schema import SPLITS
from contracts.storage import Place
from pipelines.cohort.sources import Tables, quoted

KEPT = "splits.parquet"  # beside the cohort: every patient ever assigned


class SplitConfig(Config):
    kind: Literal["official", "own"] = "official"
    seed: int = 0  # of 'own'
    shares: tuple[float, float, float] = (0.70, 0.15, 0.15)  # train, validate, test


def assign_splits(tables: Tables, cfg: SplitConfig, out: Place) -> pa.Table | None:
    """`images`, `split`, `labels` -> `splits` (row_id, split, official). Returns the table of patients to keep, for own splits."""
    official = "CREATE TABLE official AS SELECT dicom_id AS row_id, any_value(split) AS official FROM split GROUP BY dicom_id"
    tables.con.execute(official)
    if cfg.kind == "official":
        tables.con.execute("CREATE TABLE splits AS SELECT row_id, official AS split, official FROM official")
        return None
    positives = ", ".join(f"max(coalesce({label_column(f)} = 1, false)) AS {quoted(f)}" for f in FINDINGS)
    people = tables.con.sql(f"""
        SELECT subject_id::VARCHAR AS patient, {positives}
        FROM images LEFT JOIN labels USING (study_id) GROUP BY subject_id ORDER BY subject_id""").to_arrow_table()
    kept = stratify(people, cfg, read_kept(out, cfg))
    tables.con.register("own_splits", kept)
    tables.con.execute("""
        CREATE TABLE splits AS
        SELECT i.row_id, o.split, f.official
        FROM images i JOIN own_splits o ON o.patient = i.subject_id::VARCHAR LEFT JOIN official f USING (row_id)""")
    return kept


def stratify(people: pa.Table, cfg: SplitConfig, kept: dict[str, str]) -> pa.Table:
    """Patients with their findings (one boolean column each) -> (patient, split), shares held within each finding.

    A patient belongs to the rarest finding they have, so that rare ones are shared out first. Within a finding, patients go in the
    order of a hash to the split that lags furthest behind its share. `kept` assignments stand; only others are made.
    """
    counts = {f: sum(people[f].to_pylist()) for f in FINDINGS}
    rare_first = sorted(FINDINGS, key=lambda f: (counts[f], f))
    stratum = dict.fromkeys(people["patient"].to_pylist(), "none")
    for finding in reversed(rare_first):
        for patient, has in zip(people["patient"].to_pylist(), people[finding].to_pylist(), strict=True):
            if has:
                stratum[patient] = finding
    members: dict[str, list[str]] = defaultdict(list)
    for patient, finding in stratum.items():
        members[finding].append(patient)
    split_of = dict(kept)
    for finding in (*rare_first, "none"):
        have = Counter(split_of[p] for p in members[finding] if p in split_of)
        new = [p for p in members[finding] if p not in split_of]
        for patient in sorted(new, key=lambda p: hashlib.sha256(f"{cfg.seed}/{p}".encode()).digest()):
            total = sum(have.values()) + 1
            split = max(SPLITS, key=lambda s: (cfg.shares[SPLITS.index(s)] * total - have[s], -SPLITS.index(s)))
            split_of[patient] = split
            have[split] += 1
    return pa.table({"patient": list(split_of), "split": list(split_of.values())})


def read_kept(out: Place, cfg: SplitConfig) -> dict[str, str]:
    """Patients assigned by an earlier cohort in this folder. Raises CxrayError where they were assigned by other settings."""
    if not (out / KEPT).exists():
        return {}
    table = pq.read_table(pa.BufferReader((out / KEPT).read()))
    if (table.schema.metadata or {}).get(b"made_by") != cfg.fingerprint().encode():
        raise CxrayError(f"{out / KEPT}: patients here were split with another seed or other shares; name another folder (`into`)")
    return dict(zip(table["patient"].to_pylist(), table["split"].to_pylist(), strict=True))


def write_kept(out: Place, cfg: SplitConfig, kept: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(kept.replace_schema_metadata({"made_by": cfg.fingerprint()}), sink)
    (out / KEPT).write(sink.getvalue().to_pybytes())
