"""What a job keeps beside its rows: the list of whole files, and the progress.

Ray's checkpoint is the record of ids that are safely written: a file in `_checkpoint` stands for one write, which is a file of rows, one
of rejects, or both. It becomes `NAME.parquet` when those are whole, and is `NAME.pending.parquet` until then.
"""

import contextlib
import hashlib
import io
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from contracts.dataset import MANIFEST, read_manifest
from contracts.errors import CxrayError
from contracts.runs import RUN
from contracts.storage import Place, meaning, told
from pipelines.speed import memory


class Ledger:
    """The writes of a job's folder that count: committed, whole, and no id in two. `writes`: Ray's name of each -> its ids.

    Of any other write (files deleted, cut short or damaged, left by a killed task, or a checkpoint that is gone) the checkpoint goes first
    and the files second, so that its rows are computed again; killed between the two, the next run does the same. Before anything
    goes, the folder ceases to be a finished data set: what dataset.json lists is always there.
    """

    def __init__(self, out: Place) -> None:
        self.out = out
        self.writes: dict[str, frozenset[str]] = {}
        self._settle(lambda name: True)

    @property
    def ids(self) -> set[str]:
        return set().union(*self.writes.values())

    def settle(self, run: str) -> None:
        """After a run: of the writes that are new only its own count, whose names begin with `run`. What a killed run's last tasks wrote
        after this one had begun is whole and committed too, and stands for ids that this run wrote itself."""
        known = self.writes.keys()
        self._settle(lambda name: name in known or name.startswith(run))

    def _settle(self, counts: Callable[[str], bool]) -> None:
        ledgers = {f.name.removesuffix(".parquet"): f for f in (self.out / "_checkpoint").files(".parquet")}
        files: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for file in list_files(self.out / "data"):
            files[_name(file["path"])].append(file)
        with ThreadPoolExecutor(16) as pool:
            promised = dict(zip(ledgers, pool.map(_ids, ledgers.values()), strict=True))
        published = {_name(f["path"]) for f in (read_manifest(self.out) or {"files": []})["files"]}
        self.writes, seen, rest = {}, set[str](), []
        for name in sorted(promised.keys() | files.keys(), key=lambda name: (name not in published, name)):
            ids, rows = promised.get(name), [f["rows"] for f in files[name]]
            if ids and counts(name) and None not in rows and sum(rows) == len(ids) and seen.isdisjoint(ids):
                self.writes[name] = frozenset(ids)
                seen |= self.writes[name]
            else:
                rest.append(name)
        if rest:
            self._unpublish()
        for name in rest:
            if name in ledgers:
                ledgers[name].remove()
            for file in files[name]:
                (self.out / "data" / file["path"]).remove()

    def passing(self) -> set[str]:
        """Ids that were rejected for a cause that may have passed."""
        rejects = [f for f in (self.out / "data").files(".parquet") if "/outcome=reject/" in f.uri]
        tables = [decoded(f, ["row_id", "lasting"]) for f in rejects]
        return {i for t in tables if t is not None for i in t.filter(pc.invert(t["lasting"]))["row_id"].to_pylist()}

    def forget(self, ids: Set[str]) -> None:
        """Take these out of the rows and rejects, so that they are computed again where they are wanted.

        They leave the checkpoint first and the files second: killed between the two, the next run finds that these do not agree, and has
        the whole write done again.
        """
        touched = [name for name, own in self.writes.items() if not ids.isdisjoint(own)]
        if not touched:
            return
        self._unpublish()
        files: dict[str, list[Place]] = defaultdict(list)
        for file in (self.out / "data").files(".parquet"):
            files[_name(file.path)].append(file)
        for name in touched:
            for file in [self.out / "_checkpoint" / f"{name}.parquet", *files[name]]:
                _rewrite_without(file, ids)
            self.writes[name] -= ids

    def _unpublish(self) -> None:
        for name in (RUN, MANIFEST):  # a chain takes what has a run.json for finished
            (self.out / name).remove()


class Progress:
    """Rows written so far, their rate and the time left, on standard error; counts what the checkpoint holds."""

    def __init__(self, verb: str, checkpoint: Place, before: int, total: int) -> None:
        self._checkpoint, self._stop = checkpoint, threading.Event()
        self._counted: dict[str, int] = {}
        self.peak_bytes = memory()
        quiet = 0.5 if os.isatty(2) else 15.0  # a log file wants a line now and then, a terminal a moving one
        self._bar = tqdm(total=total, initial=min(before, total), desc=verb, unit=" rows", mininterval=quiet, maxinterval=quiet)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()

    def _count(self) -> None:
        with contextlib.suppress(CxrayError, OSError):  # what cannot be read or said now may be, later
            for file in self._checkpoint.files(".parquet"):
                if file.uri not in self._counted and not file.uri.endswith(".pending.parquet"):
                    self._counted[file.uri] = _rows(file) or 0
            self._bar.n = min(sum(self._counted.values()), self._bar.total)
            self._bar.update(0)

    def _watch(self) -> None:
        ticks = 0
        while not self._stop.wait(1.0):
            ticks += 1
            if ticks % 3 == 0:
                self.peak_bytes = max(self.peak_bytes, memory())
            if self._checkpoint.local is not None or ticks % 10 == 0:  # listing a bucket costs money
                self._count()
        self._count()


def list_files(data: Place) -> list[dict[str, Any]]:
    """All Parquet files below a job's data folder: path below it, outcome, rows (None where it cannot be read), bytes."""

    def one(file: Place) -> dict[str, Any]:
        path = file.relative(data)
        return {"path": path, "outcome": path.partition("/")[0].removeprefix("outcome="), "rows": _rows(file), "bytes": file.size()}

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, data.files(".parquet")))


def decoded(file: Place, columns: Iterable[str] | None = None) -> pa.Table | None:
    """A Parquet file's table; None where it is gone, cut short or damaged."""
    return _whole(file, lambda parquet: parquet.read(list(columns) if columns is not None else None))


def _rows(file: Place) -> int | None:
    return _whole(file, lambda parquet: parquet.metadata.num_rows)


def _ids(file: Place) -> list[str] | None:
    table = decoded(file, ["row_id"])
    return None if table is None else table["row_id"].to_pylist()


def _whole(file: Place, look: Callable[[pq.ParquetFile], Any]) -> Any:
    fs, path = file.arrow()
    with told(file):
        try:
            with pq.ParquetFile(fs.open_input_file(path)) as parquet:
                return look(parquet)
        except (pa.ArrowInvalid, FileNotFoundError):
            return None
        except OSError as error:
            if error.errno is not None or meaning(error) is not None:
                raise
            return None  # neither the disk's word nor a store's: Parquet's, of bytes that it cannot make out


def _name(path: str) -> str:
    """Ray's name of the write that a file of rows belongs to: it puts a number behind it."""
    return path.rpartition("/")[2].removesuffix(".parquet").rpartition("-")[0]


def ids_hash(ids: pa.ChunkedArray) -> str:
    """sha256 of the sorted ids."""
    ordered = pc.take(ids, pc.sort_indices(ids))
    return hashlib.sha256("\n".join(ordered.to_pylist()).encode()).hexdigest()


def _rewrite_without(file: Place, ids: Set[str]) -> None:
    mine = _ids(file) or []
    if ids.isdisjoint(mine):
        return
    table = pq.ParquetFile(io.BytesIO(file.read())).read()
    rest = table.filter(pa.array([i not in ids for i in mine]))
    if not rest.num_rows:
        file.remove()
        return
    sink = io.BytesIO()
    pq.write_table(rest, sink, compression="zstd")
    file.write(sink.getvalue())
