"""`cxray verify DIR [--json]`: rows in = rows out + rejects, each id once, the promised columns, finite vectors, no leak in a note.

It reads the files themselves, not the manifest's word for them.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contracts.dataset import Dataset, open_dataset
from contracts.storage import Place
from pipelines.inputs.leakage import scanned
from pipelines.ledger import decoded, ids_hash


@dataclass
class Verdict:
    where: str
    rows_in: int
    rows_out: int
    rejects: int
    reasons: dict[str, int]
    problems: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.problems

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"clean": self.clean}

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.rows_in:,} in, {self.rows_out:,} rows, {self.rejects:,} rejects"]
        lines += [f"  rejected, {reason}: {n:,}" for reason, n in sorted(self.reasons.items())]
        lines += [f"  PROBLEM: {p}" for p in self.problems]
        return "\n".join([*lines, "  clean" if self.clean else "  not whole: run the verb that makes it again"])


def verify(where: Place) -> Verdict:
    """Raises CxrayError where there is no finished data set; what is wrong with one is in the verdict."""
    data = open_dataset(where)
    promised = data.manifest["columns"]
    verdict = Verdict(str(where), data.manifest["rows_in"], 0, 0, {})
    ids: list[pa.Array] = []
    for file, table in _files(data, verdict):
        ids.extend(table["row_id"].chunks)
        if file["outcome"] == "row":
            verdict.rows_out += table.num_rows
            # Parquet calls a list's values `element`, Arrow `item`.
            has = {f"{f.name}: {f.type}".replace("<element: ", "<item: ") for f in table.schema}
            lacking = [c for c in promised if c not in has]
            if lacking:
                verdict.problems.append(f"{file['path']}: lacks {', '.join(lacking)}")
            found = _unreal(table) + (_leaks(table, data.manifest["reading"]) if data.manifest["schema"] == "texts" else [])
            verdict.problems += [f"{file['path']}: {p}" for p in found]
        else:
            verdict.rejects += table.num_rows
            for reason in table["reason"].to_pylist():
                verdict.reasons[reason] = verdict.reasons.get(reason, 0) + 1
    every = pa.chunked_array(ids, pa.string())
    twice = len(every) - pc.count_distinct(every).as_py()
    if twice:
        verdict.problems.append(f"{twice:,} ids stand more than once")
    if len(every) != verdict.rows_in:
        verdict.problems.append(f"rows in ({verdict.rows_in:,}) is not rows out + rejects ({len(every):,})")
    elif not twice and ids_hash(every) != data.manifest["ids_hash"]:
        verdict.problems.append("the ids are not those that went in")
    return verdict


def _files(data: Dataset, verdict: Verdict) -> Iterator[tuple[dict[str, Any], pa.Table]]:
    """Each listed file that can be read and has the rows it should, with its table."""
    for file in data.manifest["files"]:
        table = decoded(data.place / file["path"])
        if table is None:
            verdict.problems.append(f"{file['path']}: missing or not readable")
            continue
        if table.num_rows != file["rows"]:
            verdict.problems.append(f"{file['path']}: {table.num_rows:,} rows, where {file['rows']:,} were written")
        yield file, table


def _unreal(table: pa.Table) -> list[str]:
    """Columns of vectors that hold what is no number, and keys that hold nothing."""
    problems = [f"{name}: empty in some rows" for name in ("row_id", "group_id", "split") if table[name].null_count]
    for column in table.schema:
        if pa.types.is_fixed_size_list(column.type) and pa.types.is_floating(column.type.value_type):
            values = pc.list_flatten(table[column.name]).to_numpy()
            if not np.isfinite(values).all():
                problems.append(f"{column.name}: not finite in some rows")
        if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type) and "embedding" in column.type.value_type.names:
            values = pc.list_flatten(pc.struct_field(pc.list_flatten(table[column.name]), "embedding")).to_numpy()
            if not np.isfinite(values).all():
                problems.append(f"{column.name}: embeddings not finite in some rows")
    return problems


def _leaks(texts: pa.Table, reading: dict[str, Any]) -> list[str]:
    """Findings that the filtered notes name, with how many segments do. Passages are about findings and are exempt."""
    segments = pc.list_flatten(texts["segments"])
    notes = segments.filter(pc.equal(pc.struct_field(segments, "kind"), "note"))
    found = scanned(pc.struct_field(notes, "text").to_pylist(), reading["notes"]["leakage"]["peripheral_edema"])
    return [f"{n:,} note segments hold a term of {finding}" for finding, n in sorted(found.items())]
