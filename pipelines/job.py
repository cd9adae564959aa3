"""Every job that makes rows: read -> map -> write, each id once, in rows or in rejects.

    with Job("features", cfg, schema, made_by=[images.fingerprint, encoder.fingerprint]) as job:
        rows = job.read(images, ["image"])
        rows = rows.map_batches(Encode, ...)
        return job.write(rows)

Under OUT: `data/outcome=row/` and `data/outcome=reject/` (Parquet), `_checkpoint/` (Ray's record of the ids that are safely written),
`_lease` (who works here now), and at the end `dataset.json` and `run.json`. The same command again goes on where the last one stopped,
does what a grown input added, and tries again what failed for a passing cause.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contracts.config import Config
from contracts.dataset import Dataset, publish, read_manifest
from contracts.errors import CxrayError, RowError
from contracts.runs import record
from contracts.schema import KEYS, REJECTION, Schema
from contracts.storage import PASSING, Place, StorageOptions, place
from pipelines import speed
from pipelines.cluster import connect, plainly
from pipelines.lease import Lease
from pipelines.ledger import Ledger, Progress, ids_hash, list_files
from pipelines.pool import RETRIES

KEY_NAMES = [f.name for f in KEYS]
TIMES = 3  # Ray goes over the rows, should there be some missing still


class VerbConfig(Config):
    """What every verb's config has."""

    out: str = "runs"  # the folder or URI below which outputs lie; names of data sets are relative to it
    storage: StorageOptions = StorageOptions()

    outside_fingerprint: ClassVar[frozenset[str]] = frozenset(
        {"out", "storage", "into", "resources", "limit", "sample_per_split", "profile"}
    )

    def output(self) -> Place:
        """Where this verb writes."""
        return self.at(getattr(self, "into"))  # noqa: B009 - every verb names its own default

    def inputs(self) -> dict[str, Place]:
        """The data sets and run folders this verb reads, by name."""
        return {}

    def at(self, name: str) -> Place:
        """A data set's or run folder's name -> where it is: below `out`, unless it is a path or a URI of its own."""
        if "://" in name or name.startswith(("/", "./", "../", "~")):
            return place(name, self.storage)
        return place(self.out, self.storage) / name


class RowsConfig(VerbConfig):
    """What the config of a job that makes rows has besides."""

    limit: int | None = None  # at most so many rows
    sample_per_split: int | None = None  # at most so many rows of each split
    profile: bool = False  # write Ray's timeline, and a picture of the time by stage


@dataclass
class Summary:
    """What a job did, for a person (`str`) and for run.json."""

    verb: str
    where: str
    rows_in: int
    rows: int
    rejects: dict[str, int]
    new: int
    seconds: float
    bytes_on_disk: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rejected = sum(self.rejects.values())
        lines = [f"{self.verb}: {self.rows_in:,} in = {self.rows:,} rows + {rejected:,} rejects -> {self.where}"]
        if self.new:
            lines.append(f"  {self.new:,} new in {self.seconds:.1f} s, {self.new / max(self.seconds, 1e-9):.1f} a second")
        else:
            lines.append("  nothing new to do")
        if self.rows:
            lines.append(f"  {self.bytes_on_disk / self.rows / 1000:.1f} KB a row on disk, {self.bytes_on_disk / 1e6:.1f} MB in all")
        lines += [f"  rejected, {reason}: {count:,}" for reason, count in sorted(self.rejects.items())]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


class Job:
    """One run of a verb on one output folder. As a context it holds the folder's lease."""

    def __init__(self, verb: str, cfg: RowsConfig, schema: Schema, made_by: Sequence[str]):
        """made_by: fingerprints of what decides a row besides the settings: the inputs, and an encoder's weights."""
        self.verb, self.cfg, self.out, self.schema = verb, cfg, cfg.output(), schema
        self.fingerprint = cfg.fingerprint(schema.name, str(schema.version), *made_by)
        self._lease = Lease(self.out / "_lease")

    def __enter__(self) -> "Job":
        self._started = time.monotonic()
        self._lease.take()
        try:
            with plainly(self.out):
                self._begin()
        except BaseException:
            self._lease.release()
            raise
        return self

    def _begin(self) -> None:
        before = read_manifest(self.out) or read_manifest(self.out / "_begun")
        if before is not None and before["fingerprint"] != self.fingerprint:
            raise CxrayError(
                f"{self.out}: holds {before['schema']} made with other settings or from other inputs; "
                "name another folder (`into`), or delete this one"
            )
        # Known from the first row on, so that a changed setting cannot mix into a job that was cut short.
        publish(self.out / "_begun", self.schema, self.fingerprint, [])
        connect()
        self._set_context()
        self._ledger = Ledger(self.out)

    def __exit__(self, *exc: object) -> None:
        import ray.data

        ray.data.DataContext.get_current().checkpoint_config = None
        self._lease.release()

    def _set_context(self) -> None:
        import ray.data
        from ray.data.checkpoint import CheckpointConfig

        fs, path = (self.out / "_checkpoint").arrow()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0  # errors are rows; anything else stops the job
        # Its newer reader lists files with a whole CPU, and a resume's filter takes another: at two CPUs an encoder beside them would
        # wait for ever.
        context.use_datasource_v2 = False
        context.raise_original_map_exception = True  # Ray's wrapping loses its cause on the way from the worker
        context.retried_io_errors = sorted({*context.retried_io_errors, *PASSING})
        context.checkpoint_config = CheckpointConfig(
            id_column="row_id", checkpoint_path=path, override_filesystem=fs, delete_checkpoint_on_success=False
        )

    def read(self, source: Dataset, columns: Sequence[str], of: pa.Array | pa.ChunkedArray | None = None) -> Any:
        """The wanted rows of `source`: a ray.data.Dataset of the keys and `columns`, in blocks small enough to share out.

        of: ids; null: all, as far as the config wants them. Raises CxrayError where there are none. How many of them are not safely
        written yet is `missing` afterwards.
        """
        import ray.data
        from ray.data.expressions import col

        if not source.rows:
            raise CxrayError(f"{source.place}: has no rows, so there is nothing to do")
        keys = source.table([*KEY_NAMES, "__filename"])
        if twice := keys.num_rows - pc.count_distinct(keys["row_id"]).as_py():
            raise CxrayError(f"{source.place}: {twice:,} ids stand there more than once; run the verb that makes it again")
        asked = keys if of is None else keys.filter(pc.is_in(keys["row_id"], value_set=of))
        wanted = choose(asked, self.cfg.limit, self.cfg.sample_per_split)
        if not wanted.num_rows:
            raise CxrayError(f"{source.place}: has none of the rows that are asked for, so there is nothing to do")
        with plainly(self.out):
            self._expect(set(keys["row_id"].to_pylist()), set(wanted["row_id"].to_pylist()))
        # A file of which nothing is missing is not read: pictures take long to come, and Ray would drop them only then.
        missing = pa.array(self._ids - self._ledger.ids, pa.string())
        self.missing = len(missing)
        files = set(keys.filter(pc.is_in(keys["row_id"], value_set=missing))["__filename"].to_pylist())
        paths = [path for path in source.paths() if path in files] if files else source.paths()[:1]
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        # Many a core: while the last ones are done some cores have nothing to do (benchmarks/images.py).
        rows_per_block = max(16, min(1024, -(-wanted.num_rows // (24 * cpus))))
        fs, _ = source.place.arrow()
        # It waits more than it works, and at two CPUs the rest is needed.
        rows = ray.data.read_parquet(paths, filesystem=fs, partitioning=None, num_cpus=0.25)
        if wanted.num_rows < source.rows:
            rows = rows.filter(expr=col("row_id").is_in(wanted["row_id"].to_pylist()), num_cpus=0.25)
        return rows.select_columns([*KEY_NAMES, *columns]).repartition(target_num_rows_per_block=rows_per_block)

    def _expect(self, source: set[str], wanted: set[str]) -> None:
        """What is to stand here at the end: what is wanted now, and what stands here of an earlier, larger run.

        What the source no longer has (a patient who withdrew) goes from here too. What was rejected for a passing cause is tried again.
        """
        here = self._ledger.ids
        self._ids, self._withdrawn = wanted | (here & source), here - source
        self._ledger.forget(self._withdrawn | (self._ledger.passing() & wanted))

    def write(self, rows: Any, cpus: float = 1, notes: Callable[[Dataset], list[str]] | None = None, **about: Any) -> Summary:
        """Write the rows, see that each id is there once, publish the data set.

        cpus: what writing a block takes; where it is the same as for the step before, Ray makes one task of both. notes: lines
        for the summary, from the finished data set. about: what dataset.json says besides. Raises CxrayError, and publishes
        nothing, where ids are missing or stand twice, or where another job has taken the folder over.
        """
        from ray.data.datasource import FilenameProvider

        from pipelines.watch import Watch

        fs, path = (self.out / "data").arrow()
        columns = [f.with_nullable(True) for f in self.schema.columns]
        file_schema = pa.schema([*columns, *REJECTION, pa.field("outcome", pa.string())])
        run, before = self._lease.token, self._ledger.ids
        with plainly(self.out), Progress(self.verb, self.out / "_checkpoint", before=len(before), total=len(self._ids)) as progress:
            for _ in range(TIMES):
                if self._ids <= self._ledger.ids:
                    break
                rows.write_parquet(
                    path,
                    filesystem=fs,
                    filename_provider=FilenameProvider(dataset_uuid=run, file_format="parquet"),
                    partition_cols=["outcome"],
                    arrow_parquet_args_fn=lambda: {"schema": file_schema, "compression": "zstd"},
                    ray_remote_args={"num_cpus": cpus, "max_retries": RETRIES},
                )
                self._lease.renew()
                self._ledger.settle(run)
            done, summary = self._finish(before, about)
            stats = rows.get_stats_summary()
            taken = [f"taken out, because the source no longer has them: {len(self._withdrawn):,}"] if self._withdrawn else []
            summary.notes = [*taken, *(notes(done) if notes else []), *speed.lines(stats, Watch.slots, progress.peak_bytes)]
        if self.cfg.profile:
            summary.notes += speed.draw(stats, Watch.slots, self.out)
        record(self.out, self.verb, self.cfg, self.cfg.inputs(), summary.__dict__)
        return summary

    def _finish(self, before: set[str], about: dict[str, Any]) -> tuple[Dataset, Summary]:
        """before: ids that stood here when the run began."""
        done, reasons, ids = self._written()
        once = set(ids.to_pylist())
        lost, more = len(self._ids - once), len(ids) - len(once & self._ids)
        if lost or more:
            raise CxrayError(
                f"{self.out}: {lost:,} rows are missing and {more:,} are too many, so the data set is not published; "
                "run the same command again, which computes what is not whole"
            )
        wanted = pa.chunked_array([pa.array(self._ids, pa.string())])
        self._lease.renew()
        done = publish(
            self.out, self.schema, self.fingerprint, done.manifest["files"], rows_in=len(wanted), ids_hash=ids_hash(wanted),
            columns=[f"{f.name}: {f.type}" for f in self.schema.columns], **about,
        )  # fmt: skip
        return done, Summary(
            verb=self.verb,
            where=str(self.out),
            rows_in=len(wanted),
            rows=done.rows,
            rejects=dict(Counter(reasons["reason"].to_pylist())),
            new=len(once - before),
            seconds=time.monotonic() - self._started,
            bytes_on_disk=sum(f["bytes"] for f in done.manifest["files"] if f["outcome"] == "row"),
        )

    def _written(self) -> tuple[Dataset, pa.Table, pa.ChunkedArray]:
        """All that lies in the folder, the rejects with their reasons, and the ids of both."""
        files = list_files(self.out / "data")
        done = Dataset(self.out, {"files": [{**f, "path": f"data/{f['path']}"} for f in files]})
        reasons = done.table(["row_id", "reason"], outcome="reject")
        return done, reasons, pa.chunked_array([*done.table(["row_id"])["row_id"].chunks, *reasons["row_id"].chunks], pa.string())


def choose(keys: pa.Table, limit: int | None, sample_per_split: int | None) -> pa.Table:
    """Of the keys those to work on, the same ones every time: in the order of a hash of their ids."""
    if limit is None and sample_per_split is None:
        return keys
    order = np.argsort([hashlib.sha1(i.encode()).hexdigest() for i in keys["row_id"].to_pylist()], kind="stable")
    keys = keys.take(order)
    if sample_per_split is not None:
        seen: Counter[str] = Counter()
        keep = []
        for split in keys["split"].to_pylist():
            keep.append(seen[split] < sample_per_split)
            seen[split] += 1
        keys = keys.filter(pa.array(keep))
    return keys if limit is None else keys.slice(0, limit)


def each(batch: pa.Table, work: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Run `work` on each row of a batch: its keys and what `work` returned, or its keys and why it could not."""
    for row in batch.to_pylist():
        keys = {k: row[k] for k in KEY_NAMES}
        try:
            yield {**keys, **work(row)}
        except RowError as error:
            yield {**keys, "reason": error.reason, "lasting": error.lasting}


def block(rows: Iterable[dict[str, Any]], schema: Schema) -> pa.Table:
    """Rows and rejects -> the Arrow table that `Job.write` takes: all columns, `outcome`, rejects last (so that a file holds one kind)."""
    rows = sorted(rows, key=lambda r: r.get("reason") is not None)
    fields = [*schema.columns, *REJECTION]
    columns = [pa.array([r.get(f.name) for r in rows], f.type) for f in fields]
    outcome = pa.array(["reject" if r.get("reason") else "row" for r in rows], pa.string())
    return pa.table([*columns, outcome], schema=pa.schema([*[f.with_nullable(True) for f in fields], pa.field("outcome", pa.string())]))
