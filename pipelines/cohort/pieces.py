"""The cohort, a piece at a time: what DuckDB knows of some rows, with the lists that belong to them, as the Arrow table that is written.

Entries (vital signs, labs, earlier diagnoses, ...) stay flat until a piece is made: in whole they are many times the rows, some ten
million earlier diagnoses at MIMIC's size. And they become lists in Arrow, from counts: DuckDB's `list(... ORDER BY ...)` of structs
takes several times as long.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contracts.schema import COHORT
from pipelines.cohort.sources import Tables

# Column -> (the table of its entries, by row `n`; their order). The entries' fields are those that the schema names.
LISTS = {
    "chart_vitals": ("vitals_known", "hours, temperature, heartrate, resprate, o2sat, sbp, dbp, pain"),
    "chart_medicines": ("medicines_known", "hours, kind, name"),
    "chart_labs": ("labs_known", "hours, itemid, value, unit, abnormal"),
    "chart_history": ("history_known", "hours DESC, icd"),
    "target_icd": ("target_codes", "code, version"),
}


def pieces(tables: Tables, rows: int, size: int) -> Iterator[pa.Table]:
    """The cohort's `rows` rows in order, `size` at a time. After the last one DuckDB has a view `cohort` of what the data card asks for: no
    texts, lists as lengths."""
    codes = tables.con.sql("SELECT code, version, title FROM codes ORDER BY id").to_arrow_table().combine_chunks()
    kept = []
    for first in range(0, rows, size):
        piece = _piece(tables, codes, first, min(size, rows - first))
        short = {
            name: pc.list_value_length(column) if name in LISTS else column
            for name, column in zip(piece.column_names, piece.columns, strict=True)
            if name == "report_status" or not name.startswith("report_")
        }
        kept.append(pa.table(short))
        yield piece
    tables.con.register("cohort", pa.concat_tables(kept))


def _piece(tables: Tables, codes: pa.Table, first: int, count: int) -> pa.Table:
    those = f"n >= {first} AND n < {first + count}"
    flat = [name for name in COHORT.columns.names if name not in LISTS]
    table = tables.con.sql(f"SELECT {', '.join(flat)} FROM assembled WHERE {those} ORDER BY n").to_arrow_table()
    columns = dict(zip(flat, table.columns, strict=True))
    for name, (entries, order) in LISTS.items():
        fields = [f.name for f in COHORT.columns.field(name).type.value_type]
        stored = ["id", "hours"] if name == "chart_history" else fields
        found = tables.con.sql(f"SELECT n, {', '.join(stored)} FROM {entries} WHERE {those} ORDER BY n, {order}").to_arrow_table()
        if name == "chart_history":
            found = _coded(found, codes)
        columns[name] = listed(found.select(["n", *fields]), first, count)
    return pa.table([columns[name] for name in COHORT.columns.names], COHORT.columns.names).cast(COHORT.columns)


def _coded(entries: pa.Table, codes: pa.Table) -> pa.Table:
    """With `code`, `version` and `title` in place of the code's `id`. Sorted along with the entries they would take twice the time."""
    found = codes.take(entries["id"].combine_chunks())
    return pa.table([*entries.columns, *found.columns], [*entries.column_names, *found.column_names])


def listed(entries: pa.Table, first: int, count: int) -> pa.ListArray:
    """Entries sorted by their row `n` -> a list of structs for each of the rows from `first` on; null for a row that has none."""
    lengths = np.bincount(entries["n"].to_numpy() - first, minlength=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    structs = entries.drop_columns("n").to_struct_array().combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets), structs, mask=pa.array(lengths == 0))
