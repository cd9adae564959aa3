"""What a job keeps beside its rows: the lease, the progress, and the list of whole files.

Ray's checkpoint is the record of ids that are safely written: a file in `_checkpoint` stands for one file of rows, becomes
`NAME.parquet` when that is whole, and is `NAME.pending.parquet` until then.
"""

import contextlib
import hashlib
import io
import json
import os
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from contracts.errors import CxrayError
from contracts.storage import Place
from pipelines.speed import memory

LEASE_SECONDS = 60.0  # a lease that has not been renewed for so long is nobody's


class Lease:
    """A file that says who works on a folder, renewed while they do."""

    def __init__(self, file: Place) -> None:
        self.file = file
        self.who = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}

    def take(self) -> None:
        """Raises CxrayError where somebody else holds it."""
        try:
            self.file.create(self._text())  # of two that try at once, one makes it
        except FileExistsError:
            holder = self._holder()
            if holder and not self._gone(holder):
                raise self._taken(holder) from None
            self.renew()
            if (holder := self._holder()) and holder["token"] != self.who["token"]:  # somebody else took the dead one's place too
                raise self._taken(holder) from None

    def renew(self) -> None:
        self.file.write(self._text())

    def release(self) -> None:
        self.file.remove()

    def _text(self) -> bytes:
        return json.dumps({**self.who, "time": time.time()}).encode()

    def _taken(self, holder: dict[str, Any]) -> CxrayError:
        return CxrayError(
            f"{self.file}: another job (process {holder['pid']} on {holder['host']}) works on this folder; "
            f"wait for it, or for {LEASE_SECONDS:.0f} s after it died"
        )

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.file.read())
        except CxrayError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        except json.JSONDecodeError:
            return None

    def _gone(self, holder: dict[str, Any]) -> bool:
        if time.time() - holder["time"] > LEASE_SECONDS:
            return True
        if holder["host"] != self.who["host"]:
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return holder["pid"] == self.who["pid"]


class Progress:
    """Rows written so far, their rate and the time left, on standard error; counts what the checkpoint holds."""

    def __init__(self, verb: str, checkpoint: Place, total: int, beat: Callable[[], None]) -> None:
        self._checkpoint, self._beat, self._stop = checkpoint, beat, threading.Event()
        self._counted: dict[str, int] = {}
        self.peak_bytes = memory()
        self._before = self._count()
        quiet = 0.5 if os.isatty(2) else 15.0  # a log file wants a line now and then, a terminal a moving one
        self._bar = tqdm(total=total, initial=min(self._before, total), desc=verb, unit=" rows", mininterval=quiet, maxinterval=quiet)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()

    def new(self) -> int:
        """Rows and rejects written since the start."""
        return self._count() - self._before

    def _count(self) -> int:
        for file in self._checkpoint.files(".parquet"):
            if file.uri not in self._counted and not file.uri.endswith(".pending.parquet"):
                fs, path = file.arrow()
                with contextlib.suppress(FileNotFoundError):
                    self._counted[file.uri] = pq.read_metadata(path, filesystem=fs).num_rows
        return sum(self._counted.values())

    def _watch(self) -> None:
        ticks = 0
        while not self._stop.wait(1.0):
            ticks += 1
            if ticks % 3 == 0:
                self.peak_bytes = max(self.peak_bytes, memory())
            if ticks % 10 == 0:
                self._beat()
            if self._checkpoint.local is not None or ticks % 10 == 0:  # listing a bucket costs money
                self._bar.n = min(self._count(), self._bar.total)
                self._bar.update(0)
        self._bar.n = min(self._count(), self._bar.total)


def list_files(data: Place) -> list[dict[str, Any]]:
    """All Parquet files below a job's data folder: path below it, outcome, rows (None where it cannot be read), bytes."""
    fs, _ = data.arrow()

    def one(file: Place) -> dict[str, Any]:
        path = file.relative(data)
        return {"path": path, "outcome": path.partition("/")[0].removeprefix("outcome="), "rows": _rows(file, fs), "bytes": file.size()}

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, data.files(".parquet")))


def _rows(file: Place, fs: Any) -> int | None:
    try:
        return pq.read_metadata(file.path, filesystem=fs).num_rows
    except (pa.ArrowInvalid, FileNotFoundError):  # cut short, or gone
        return None


def _ids(file: Place, fs: Any) -> list[str]:
    return pq.ParquetFile(file.path, filesystem=fs).read(["row_id"])["row_id"].to_pylist()


def _stem(path: str) -> str:
    """The checkpoint's name that a file of rows belongs to: Ray puts a number behind it."""
    return path.rpartition("/")[2].removesuffix(".parquet").rpartition("-")[0]


def heal(out: Place) -> int:
    """Make the checkpoint and the files of rows say the same; returns how many of Ray's writes are to be done again.

    A write counts where its checkpoint is committed and its files hold just the rows that it names. Of any other (files deleted,
    cut short, left by a killed task, or a checkpoint that is gone) the checkpoint goes first and the files second, so that its rows are
    computed again; killed between the two, the next run does the same.
    """
    fs, _ = out.arrow()
    ledgers = {f.name.removesuffix(".parquet"): f for f in (out / "_checkpoint").files(".parquet")}
    with ThreadPoolExecutor(16) as pool:
        promised = dict(zip(ledgers, pool.map(lambda f: _rows(f, fs), ledgers.values()), strict=True))
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in list_files(out / "data"):
        files[_stem(file["path"])].append(file)
    again = 0
    for stem in promised.keys() | files.keys():
        rows = [f["rows"] for f in files[stem]]
        if stem in promised and None not in rows and sum(rows) == promised[stem]:
            continue
        again += 1
        if stem in ledgers:
            ledgers[stem].remove()
        for file in files[stem]:
            (out / "data" / file["path"]).remove()
    return again


def drop_repeated(out: Place) -> None:
    """Take out those of Ray's writes whose rows all stand in others too: what a killed run's last tasks wrote after this one had begun.

    The checkpoint goes first and the files second, as in `heal`.
    """
    fs, _ = out.arrow()
    files: dict[str, list[Place]] = defaultdict(list)
    for file in (out / "data").files(".parquet"):
        files[_stem(file.path)].append(file)
    ids = {stem: [i for file in own for i in _ids(file, fs)] for stem, own in files.items()}
    times = Counter(i for own in ids.values() for i in own)
    for stem, own in ids.items():
        if all(times[i] > 1 for i in own):
            times.subtract(own)
            ledger = out / "_checkpoint" / f"{stem}.parquet"
            for file in ([ledger] if ledger.exists() else []) + files[stem]:
                file.remove()


def ids_hash(ids: pa.ChunkedArray) -> str:
    """sha256 of the sorted ids."""
    ordered = pc.take(ids, pc.sort_indices(ids))
    return hashlib.sha256("\n".join(ordered.to_pylist()).encode()).hexdigest()


def forget_passing_rejects(out: Place) -> None:
    """Let the rows be tried again that were rejected for a cause that may have passed.

    Their ids leave the checkpoint first and the reject files second: killed between the two, the next run does both again.
    """
    rejects = [f for f in (out / "data").files(".parquet") if "/outcome=reject/" in f.uri]
    for file in rejects:
        table = pq.ParquetFile(io.BytesIO(file.read())).read()
        passing = pc.invert(table["lasting"])
        if not pc.any(passing).as_py():
            continue
        ids = table.filter(passing)["row_id"]
        _rewrite_without(out / "_checkpoint" / f"{_stem(file.path)}.parquet", ids)
        _rewrite_without(file, ids)


def _rewrite_without(file: Place, ids: pa.ChunkedArray) -> None:
    table = pq.ParquetFile(io.BytesIO(file.read())).read()
    rest = table.filter(pc.invert(pc.is_in(table["row_id"], value_set=ids)))
    if not rest.num_rows:
        file.remove()
        return
    sink = io.BytesIO()
    pq.write_table(rest, sink)
    file.write(sink.getvalue())
