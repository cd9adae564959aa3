"""A data set: a folder of Parquet files, and `dataset.json`, written last, that lists the whole ones.

Readers open only what it lists, so a file that a killed run left behind is never read. The text says also what made the
data set (`fingerprint`) and how many rows and rejects it has.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from contracts.errors import CxrayError
from contracts.schema import VERSIONS, Schema
from contracts.storage import Place, told

MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Dataset:
    """An opened data set. `manifest` is what dataset.json says."""

    place: Place
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What made it; for a cohort see `rows_fingerprint` too."""
        return self.manifest["fingerprint"]

    @property
    def rows_fingerprint(self) -> str:
        """What decides its ids, patients and splits, where that is less than all that made it."""
        return self.manifest.get("rows_fingerprint", self.fingerprint)

    @property
    def version(self) -> str:
        """Changes with every change of the files (each has a name of its own)."""
        return hashlib.sha256(json.dumps(self.manifest["files"]).encode()).hexdigest()[:16]

    @property
    def rows(self) -> int:
        return self.manifest["rows"]

    def paths(self, outcome: str = "row") -> list[str]:
        """Paths of the whole files of this outcome ('row' or 'reject'), for the file system of `place.arrow()`."""
        _, root = self.place.arrow()
        return [f"{root}/{f['path']}" for f in self.manifest["files"] if f["outcome"] == outcome]

    def table(self, columns: Sequence[str] | None = None, where: Any = None, outcome: str = "row") -> pa.Table:
        """The rows as an Arrow table, in file order. where: a pyarrow.dataset expression."""
        fs, _ = self.place.arrow()
        paths = self.paths(outcome)
        if not paths:
            columns_there = self.schema()
            return columns_there.empty_table().select(list(columns) if columns else columns_there.names)
        with told(self.place):
            return pyarrow.dataset.dataset(paths, filesystem=fs, format="parquet").to_table(
                columns=list(columns) if columns else None, filter=where
            )

    def leaves(self, columns: Sequence[str]) -> pa.Table:
        """Parts of nested columns, by Parquet's names ('segments.list.element.text'), without what stands beside them."""
        fs, _ = self.place.arrow()
        with told(self.place):
            tables = [pq.ParquetFile(fs.open_input_file(path)).read(columns=list(columns)) for path in self.paths()]
        return pa.concat_tables(tables) if tables else self.table([columns[0].partition(".")[0]])

    def schema(self) -> pa.Schema:
        """The columns in the files; rows and rejects have the same."""
        fs, root = self.place.arrow()
        return pq.read_schema(f"{root}/{self.manifest['files'][0]['path']}", filesystem=fs)


def open_dataset(place: Place, *names: str) -> Dataset:
    """Open a whole data set.

    names: the kinds it may be ('cohort', 'images', ...); none means any. Raises CxrayError where there is no data set, where it is
    of another kind, or was written by another version of the columns.
    """
    manifest = read_manifest(place)
    if manifest is None:
        kind = " or ".join(names) or "data set"
        raise CxrayError(f"{place.uri}: no finished {kind} here (no {MANIFEST}); run the verb that makes it, or finish it")
    if names and manifest["schema"] not in names:
        raise CxrayError(f"{place.uri}: holds {manifest['schema']}, where {' or '.join(names)} is wanted")
    if manifest["schema_version"] != VERSIONS.get(manifest["schema"], manifest["schema_version"]):
        raise CxrayError(f"{place.uri}: its columns are those of another version of cxray; make it again in a new folder")
    return Dataset(place, manifest)


def read_manifest(place: Place) -> dict[str, Any] | None:
    """What dataset.json says, or None where there is none."""
    try:
        manifest = json.loads((place / MANIFEST).read())
    except CxrayError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except json.JSONDecodeError:
        raise CxrayError(f"{place / MANIFEST}: not JSON; delete the folder and make it again") from None
    return manifest


def publish(place: Place, schema: Schema, fingerprint: str, files: Sequence[dict[str, Any]], **more: Any) -> Dataset:
    """Write dataset.json over `files` ({path, outcome, rows, bytes}; paths below the folder): from here on they are the data set."""
    count = {o: sum(f["rows"] for f in files if f["outcome"] == o) for o in ("row", "reject")}
    manifest = {
        "schema": schema.name,
        "schema_version": schema.version,
        "fingerprint": fingerprint,
        "rows": count["row"],
        "rejects": count["reject"],
        "files": sorted(files, key=lambda f: f["path"]),
        **more,
    }
    (place / MANIFEST).write(json.dumps(manifest, indent=1).encode())
    return Dataset(place, manifest)
