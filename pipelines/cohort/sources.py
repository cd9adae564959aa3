"""Where MIMIC lies, and its tables in DuckDB.

Each source has a place of its own, so that PhysioNet's buckets and one's own folders mix; `root` fills in those not named. A
source that is named must be there; one that is not named and not there is absent, and its tables are empty.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import duckdb

from contracts.config import Config
from contracts.errors import CxrayError
from contracts.storage import Place, StorageOptions, place, told

# Below `root`, as PhysioNet names its projects and as its buckets are named; the first that is there is taken.
USUAL: dict[str, tuple[str, ...]] = {
    "cxr": ("mimic-cxr-jpg/2.1.0", "mimic-cxr-jpg/2.0.0", "mimic-cxr-jpg", "mimic-cxr-jpg-2.1.0.physionet.org"),
    "reports": (
        "mimic-cxr/2.1.0/mimic-cxr-reports.zip", "mimic-cxr/2.0.0/mimic-cxr-reports.zip", "mimic-cxr/2.1.0", "mimic-cxr/2.0.0", "mimic-cxr",
        "mimic-cxr-2.1.0.physionet.org", "mimic-cxr-2.0.0.physionet.org",
    ),
    "dicom": ("mimic-cxr/2.1.0", "mimic-cxr/2.0.0", "mimic-cxr", "mimic-cxr-2.1.0.physionet.org", "mimic-cxr-2.0.0.physionet.org"),
    "mimic_iv": ("mimiciv/3.1", "mimiciv/2.2", "mimiciv", "mimiciv-3.1.physionet.org"),
    "mimic_iv_ed": ("mimic-iv-ed/2.2", "mimic-iv-ed", "mimic-iv-ed-2.2.physionet.org"),
}  # fmt: skip
PROOF = {
    "cxr": "mimic-cxr-2.0.0-metadata",
    "mimic_iv": "hosp/patients",
    "mimic_iv_ed": "ed/edstays",
}  # a table without which a source is not itself


class Sources(Config):
    """URIs of the sources. What is left out is looked for below `root`."""

    cxr: str | None = None  # MIMIC-CXR-JPG: the tables, and files/ with the JPGs
    images: str | None = None  # files/ with the images, where they are not those of `cxr`
    image_format: Literal["jpg", "dcm"] = "jpg"
    reports: str | None = None  # a folder with files/, or mimic-cxr-reports.zip
    mimic_iv: str | None = None
    mimic_iv_ed: str | None = None


@dataclass
class Found:
    """The sources that are there. `absent` names those that are not."""

    cxr: Place
    images: Place
    reports: Place | None
    mimic_iv: Place | None
    mimic_iv_ed: Place | None
    absent: list[str] = field(default_factory=list)

    def named(self) -> dict[str, str]:
        """Each source's URI, or 'absent'."""
        places = {n: getattr(self, n) for n in ("cxr", "images", "reports", "mimic_iv", "mimic_iv_ed")}
        return {name: p.uri if p else "absent" for name, p in places.items()}


def find(sources: Sources, root: str | None, storage: StorageOptions) -> Found:
    """Look where the sources are. Raises CxrayError for one that is named and not there, and where there are no X-rays at all."""
    found = {name: _find_one(name, getattr(sources, name), root, storage) for name in ("cxr", "reports", "mimic_iv", "mimic_iv_ed")}
    cxr = found["cxr"]
    if cxr is None:
        where = f"below root {root}" if root else "because neither sources.cxr nor root says where to look"
        raise CxrayError(f"no MIMIC-CXR-JPG tables ({PROOF['cxr']}.csv.gz) found {where}: set sources.cxr or root")
    images = cxr
    if sources.images:
        images = place(sources.images, storage)
    elif sources.image_format == "dcm":
        images = _find_one("dicom", None, root, storage) or found["reports"] or cxr
    if not (images / "files").exists():
        raise CxrayError(f"{images}: has no files/ folder with images; set sources.images (and sources.image_format: jpg or dcm)")
    return Found(cxr, images, found["reports"], found["mimic_iv"], found["mimic_iv_ed"], [name for name, p in found.items() if p is None])


def _find_one(name: str, uri: str | None, root: str | None, storage: StorageOptions) -> Place | None:
    if uri is not None:
        where = place(uri, storage)
        if not _is(name, where):
            raise CxrayError(f"sources.{name}: {where} has no {PROOF.get(name, 'files/ folder')}; check the path and its version")
        return where
    if root is None:
        return None
    return next((w for usual in USUAL[name] if _is(name, w := place(root, storage) / usual)), None)


def _is(name: str, where: Place) -> bool:
    if name in PROOF:
        return _csv(where, PROOF[name]) is not None
    return where.exists() if where.name.endswith(".zip") else (where / "files").exists()


def _csv(where: Place, table: str) -> Place | None:
    return next((p for ending in (".csv.gz", ".csv") if (p := where / (table + ending)).exists()), None)


def sizes(found: Found) -> dict[str, int]:
    """Bytes of every table of the sources: tells a changed table from the same one."""
    folders = {"": found.cxr, "hosp/": found.mimic_iv, "icu/": found.mimic_iv, "ed/": found.mimic_iv_ed}
    there = [(below, where / below if below else where) for below, where in folders.items() if where]
    return {below + f.name: f.size() for below, where in there for f in where.files(depth=1) if f.name.endswith((".csv", ".csv.gz"))}


READERS = 8  # tables that are read at once
# Bytes that DuckDB unpacks at a time, and once more to look at the header. By default 32 MB: more than some whole tables are.
BUFFER = 4 * 2**20


@dataclass(frozen=True)
class Table:
    """A table to be read.

    into: its name in DuckDB; path: its place in its source, without .csv or .csv.gz; columns: name -> SQL type, where a cell that
    does not fit becomes NULL; keep: SQL that follows the typed table in FROM and says which rows to keep.
    """

    into: str
    where: Place | None
    path: str
    columns: dict[str, str]
    keep: str = ""


class Tables:
    """A DuckDB connection that MIMIC's tables are read into, typed and with just the columns asked for."""

    def __init__(self, memory_limit: str | None = None, spill_to: str | None = None) -> None:
        self.con = duckdb.connect()
        self.con.execute("SET preserve_insertion_order = false; SET TimeZone = 'UTC'")
        if memory_limit:
            self.con.execute("SET memory_limit = ?", [memory_limit])
        if spill_to:
            self.con.execute("SET temp_directory = ?", [spill_to])

    def read(self, *tables: Table) -> None:
        """Make these tables in DuckDB: side by side, the longest best named first, since a .gz is unpacked by one thread alone.

        An absent source, or a table that its source does not have, makes an empty table. Raises CxrayError for a table without a
        needed column.
        """
        files = [_csv(t.where, t.path) if t.where else None for t in tables]
        for file in files:
            if file and file.local is None and not self.con.filesystem_is_registered(file.scheme):
                self.con.register_filesystem(file.fs)
        cursors = [self.con.cursor() for _ in tables]
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            try:
                list(pool.map(_read, cursors, tables, files))
            except BaseException:  # Ctrl-C too: the others need not come to their end
                pool.shutdown(wait=False, cancel_futures=True)
                for cursor in cursors:
                    cursor.interrupt()
                raise


def _read(con: duckdb.DuckDBPyConnection, table: Table, file: Place | None) -> None:
    columns = table.columns
    if file is None:
        con.execute(f"CREATE TABLE {table.into} ({', '.join(f'{quoted(n)} {t}' for n, t in columns.items())})")
        return
    path = str(file.local) if file.local else file.uri
    options = f"all_varchar = true, header = true, delim = ',', quote = '\"', escape = '\"', buffer_size = {BUFFER}"
    csv = f"read_csv({literal(path)}, {options})"
    with told(file):
        try:
            has = {row[0] for row in con.execute(f"DESCRIBE SELECT * FROM {csv}").fetchall()}
            lacking = [n for n in columns if n not in has]
            if lacking:
                raise CxrayError(f"{file}: lacks the column {', '.join(lacking)}; it has {', '.join(sorted(has))}")
            typed = ", ".join(f"TRY_CAST({quoted(n)} AS {t}) AS {quoted(n)}" for n, t in columns.items())
            con.execute(f"CREATE TABLE {table.into} AS SELECT * FROM (SELECT {typed} FROM {csv}) {table.keep}")
        except (duckdb.InvalidInputException, duckdb.IOException) as error:
            raise CxrayError(f"{file}: not a readable CSV table ({str(error).splitlines()[0]})") from None


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
