"""Rows by number, from large data sets and small tables.

A large data set streams once from its Parquet to each node's own disk, as an Arrow file that all workers of the node map into memory;
small tables come through the object store and are looked up by id. Rows can then be asked for in any order, which is what makes an
order that is known beforehand (order.py) possible.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch.utils.data
from filelock import FileLock

from contracts.dataset import Dataset
from contracts.errors import CxrayError
from contracts.storage import Place, told
from pipelines.job import KEY_NAMES
from trainers.engine.order import Index
from trainers.engine.task import Task

ROWS_A_PIECE = 1024


@dataclass(frozen=True)
class Data:
    """What a task is trained on.

    keys: row_id, group_id, split of the rows to use. large: data sets whose columns are read row by row (features, images); they may
    hold more rows. small: tables with a row_id that fit in memory (labels, charts). Every key must stand in all of them.
    """

    keys: pa.Table
    large: tuple[Dataset, ...] = ()
    small: tuple[pa.Table, ...] = ()

    def split(self, name: str) -> pa.Table:
        """The keys of a split, in the order of row_id: a row's number is its place here, in whatever files it lies."""
        return self.keys.select(KEY_NAMES).filter(pc.equal(self.keys["split"], name)).sort_by("row_id").combine_chunks()

    def plan(self, columns: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
        """Which of `columns` comes from which large data set, and from which small table; each must stand in exactly one."""
        sources = [list(d.schema().names) for d in self.large] + [list(t.column_names) for t in self.small]
        for column in columns:
            found = sum(column in names for names in sources)
            if found != 1:
                raise CxrayError(f"column {column!r} stands in {found or 'none'} of the data sets to train on; it must stand in one")
        taken = [[c for c in columns if c in names] for names in sources]
        return taken[: len(self.large)], taken[len(self.large) :]

    def small_columns(self, split: str, columns: Sequence[str]) -> pa.Table:
        """The keys of a split, and those of `columns` that stand in small tables."""
        keys = self.split(split)
        for table, wanted in zip(self.small, self.plan(columns)[1]):
            found = table.take(pa.array(places(keys["row_id"], table["row_id"], "a small table")))
            for name in wanted:
                keys = keys.append_column(name, found[name])
        return keys

    def anchored(self) -> "Data":
        """The same, with paths that hold in any working directory."""
        large = tuple(Dataset(anchored(d.place), d.manifest) for d in self.large)
        return Data(self.keys, large, self.small)


def anchored(place: Place) -> Place:
    return Place(str(place.local), place.options) if place.local else place


def places(wanted: Any, there: Any, where: str) -> np.ndarray:
    """For each id its index in `there`. Raises CxrayError where ids are missing, without repeating them."""
    found = pc.index_in(wanted, value_set=there)
    if found.null_count:
        raise CxrayError(f"{where}: {found.null_count:,} of {len(wanted):,} rows to train on are not there; make it for the same rows")
    return found.to_numpy(zero_copy_only=False).astype(np.int64)


def cached(source: Dataset, columns: Sequence[str], folder: Path) -> Path:
    """The data set's row_id and `columns` as an Arrow file on this node's disk; written once, by whichever worker comes first.

    Copies of the data set as it was before are deleted. Raises CxrayError for numbers that are not finite, where the disk is full, and
    where others could look into the folder.
    """
    where, version, which = (_hash(said) for said in (source.place.uri, source.version, repr(sorted(columns))))
    name = f"{where}-{version}-{which}"
    file, part = folder / f"{name}.arrow", folder / f"{name}.part"
    with told(Place(str(folder))):
        _private(folder)
        with FileLock(folder / f"{where}.lock"):
            for old in folder.glob(f"{where}-*"):
                if not old.name.startswith(f"{where}-{version}-"):
                    old.unlink()
            if not file.exists():
                _write(source, ["row_id", *columns], part)
                part.replace(file)
    return file


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _private(folder: Path) -> None:
    """Make the folder, which is to hold pictures and texts of patients. Raises CxrayError where it is not this user's alone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.getuid() or there.st_mode & 0o022:
        raise CxrayError(
            f"{folder}: patients' rows are to be copied here, and it is another user's or others may write there: delete it, or name "
            "another place by resources.cache"
        )
    folder.chmod(0o700)  # one of ours that others may look into, but not change, is closed


def _write(source: Dataset, columns: list[str], file: Path) -> None:
    fs, _ = source.place.arrow()
    rows = pyarrow.dataset.dataset(source.paths(), filesystem=fs, format="parquet")
    schema = pa.schema([source.schema().field(c) for c in columns])
    with pa.ipc.new_file(file, schema) as out, told(source.place):
        for batch in rows.to_batches(columns=columns, batch_size=ROWS_A_PIECE):
            for name in columns:
                if not _finite(batch[name]):
                    raise CxrayError(f"{source.place}: column {name!r} holds numbers that are not finite; make the data set again")
            out.write_batch(batch)


def _finite(column: Any) -> bool:
    """False where a column of floats, or of lists and structs with floats somewhere in them, holds NaN or infinity."""
    if pa.types.is_struct(column.type):
        return all(_finite(child) for child in column.flatten())
    if _is_list(column.type):
        return _finite(column.flatten())
    if not pa.types.is_floating(column.type) or not len(column):
        return True
    return bool(pc.all(pc.is_finite(column.cast(pa.float64()) if pa.types.is_float16(column.type) else column)).as_py() is not False)


class Mapped:
    """An Arrow file, mapped into memory: row i without reading the others."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open()

    def _open(self) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(self.file)))
        self.pieces = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.starts = np.cumsum([0, *(len(p) for p in self.pieces)])

    def ids(self) -> pa.ChunkedArray:
        return pa.chunked_array([p["row_id"] for p in self.pieces], pa.string())

    def row(self, i: int, columns: Sequence[str]) -> dict[str, Any]:
        piece = int(np.searchsorted(self.starts, i, side="right")) - 1
        return {c: value(self.pieces[piece][c], i - int(self.starts[piece])) for c in columns}

    def __getstate__(self) -> dict[str, Any]:  # a loader's process maps the file itself
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.file = state["file"]
        self._open()


def value(column: Any, i: int) -> Any:
    """Row i of an Arrow array: lists of numbers as numpy views of what is mapped, structs as dicts, the rest as Python values."""
    item = column[i]
    if not item.is_valid:
        return None
    if pa.types.is_struct(column.type):
        return _values(column.slice(i, 1))[0]
    if not _is_list(column.type):
        return item.as_py()
    inner = item.values
    if pa.types.is_integer(inner.type) or pa.types.is_floating(inner.type):
        return inner.to_numpy(zero_copy_only=False)
    return _values(inner)


def _values(column: Any) -> list[Any]:
    """All rows of an Arrow array; what holds no list in one call instead of one a row."""
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        parts = zip(*(_values(column.field(name)) for name in names), strict=True)
        return [dict(zip(names, part)) if there else None for there, part in zip(column.is_valid().to_pylist(), parts)]
    return [value(column, i) for i in range(len(column))] if _is_list(column.type) else column.to_pylist()


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


class Rows(torch.utils.data.Dataset):
    """A split, by (epoch, row number): the row with the task's columns, prepared by the task."""

    def __init__(self, task: Task, data: Data, split: str, seed: int, cache: str | None = None) -> None:
        folder = Path(cache or tempfile.gettempdir()) / f"cxray-rows-{os.getuid()}"
        self.task, self.seed, self.keys = task, seed, data.split(split)
        ids = self.keys["row_id"]
        large, small = data.plan(task.columns)
        self.large = []
        for source, columns in zip(data.large, large):
            mapped = Mapped(cached(source, columns, folder))
            self.large.append((mapped, places(ids, mapped.ids(), str(source.place)), columns))
        self.small = []
        for table, columns in zip(data.small, small):
            found = {c: table[c].combine_chunks() for c in columns}
            self.small.append((found, places(ids, table["row_id"], "a small table")))
        self.key_columns = {c: self.keys[c].combine_chunks() for c in KEY_NAMES}

    def __len__(self) -> int:
        return self.keys.num_rows

    def row(self, number: int) -> dict[str, Any]:
        row = {c: column[number].as_py() for c, column in self.key_columns.items()}
        for mapped, index, columns in self.large:
            row |= mapped.row(int(index[number]), columns)
        for columns, index in self.small:
            row |= {c: value(column, int(index[number])) for c, column in columns.items()}
        return row

    def __getitem__(self, index: Index) -> dict[str, Any]:
        epoch, number = index
        return self.task.prepare(self.row(number), np.random.default_rng([self.seed, epoch, number]))
