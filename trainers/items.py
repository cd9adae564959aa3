"""What a person names on the command line -> a table of items to predict: row_id, study_id, path, chart.

Images: a glob of JPEG, PNG or DICOM files (a file's row_id is its name without the ending), or a table (.parquet, .csv, .jsonl) with a
column `path` and, if wanted, `row_id` and `study_id`.
Charts: a table with `row_id` or `path`, and either a column `chart` (a JSON object, a `contracts.chart.Chart`) or the cohort's own
`chart_*` columns. Both are joined; where images are named, an image without a chart goes alone, and a chart without an image is left out.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from contracts.chart import Chart
from contracts.errors import CxrayError
from contracts.storage import Place, place, told

TABLES = (".parquet", ".csv", ".jsonl")
COLUMNS = ("row_id", "study_id", "path", "chart")
# Column -> field of a Chart. The indication stands in the cohort under report_*, for it is read only by a model whose setting says so.
CHART = {f"chart_{f}": f for f in Chart.model_fields if f != "indication"} | {"report_indication": "indication"}
TEXTS = dict.fromkeys(COLUMNS, pa.string())
CSV = pyarrow.csv.ConvertOptions(column_types=TEXTS, strings_can_be_null=True, quoted_strings_can_be_null=True)
ITEMS = pa.schema([("row_id", pa.string()), ("study_id", pa.string()), ("path", pa.string()), ("chart", pa.string())])


def items(images: str | None, charts: str | None) -> pa.Table:
    """The table of ITEMS, by row_id. Raises CxrayError where a table or glob is not there, is empty, or names a row twice."""
    if images is None and charts is None:
        raise CxrayError("nothing to predict: name --images, --charts, or both")
    rows = _images(images) if images is not None else {}
    told_of = _charts(charts) if charts is not None else {}
    if images is None:
        rows = {key: {"row_id": key, "study_id": study, "path": None} for key, (study, _) in told_of.items()}
    found = [row | {"chart": _chart_of(row, told_of)} for row in rows.values()]
    if told_of and not any(row["chart"] for row in found):
        raise CxrayError(f"--charts {charts}: no chart has the row_id or path of an image; are the ids those of --images?")
    return pa.Table.from_pylist(found, schema=ITEMS).sort_by("row_id")


def _chart_of(row: Mapping[str, Any], charts: Mapping[str, tuple[str | None, str]]) -> str | None:
    one = charts.get(row["row_id"]) or (charts.get(row["path"]) if row["path"] else None)
    return one[1] if one else None


def _images(name: str) -> dict[str, dict[str, Any]]:
    if not name.endswith(TABLES):
        where = place(name)
        if where.local is not None and where.local.is_dir():
            raise CxrayError(f"--images {name}: is a folder; write which files, such as '{name.rstrip('/')}/*.jpg'")
        with told(where):
            paths = sorted(str(p) for p in where.fs.glob(where.path))
        if not paths:
            example = "a glob names files, such as 'scans/*.jpg', and a table ends with .parquet, .csv or .jsonl"
            raise CxrayError(f"--images {name}: no such file; {example}")
        prefix = "" if where.scheme == "file" else f"{where.scheme}://"
        rows = [{"row_id": PurePosixPath(p).stem, "study_id": None, "path": prefix + p} for p in paths]
        return _by_id(rows, f"--images {name}", "give a table with path and row_id")
    table, columns = _table(name, "--images")
    if "path" not in columns:
        raise CxrayError(f"--images {name}: has no column `path`; there are {', '.join(columns)}")
    rows = []
    for row in table:
        if row.get("path") is None:
            raise CxrayError(f"--images {name}: a row has no path; leave it out, or give its chart alone")
        path = _absolute(row["path"])
        key = row["row_id"] if row.get("row_id") is not None else PurePosixPath(path).stem
        rows.append({"row_id": str(key), "study_id": _text(row.get("study_id")), "path": path})
    return _by_id(rows, f"--images {name}", "give each its own row_id")


def _charts(name: str) -> dict[str, tuple[str | None, str]]:
    """row_id (or path) -> (study_id, chart as JSON)."""
    table, columns = _table(name, "--charts")
    key = next((c for c in ("row_id", "path") if c in columns), None)
    if key is None:
        raise CxrayError(f"--charts {name}: has no column `row_id` or `path`; there are {', '.join(columns)}")
    if strange := [c for c in columns if c.startswith("chart_") and c not in CHART]:
        near = difflib.get_close_matches(strange[0], CHART, n=1)
        raise CxrayError(f"--charts {name}: unknown column `{strange[0]}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    given = [c for c in columns if c in CHART]
    if not given and "chart" not in columns:
        raise CxrayError(f"--charts {name}: has no column `chart`, and none of the cohort's, such as `chart_age`")
    rows = []
    for row in table:
        if row.get(key) is None:
            raise CxrayError(f"--charts {name}: a row has no {key}")
        chart = row.get("chart") if "chart" in columns else {CHART[c]: row.get(c) for c in given}
        said = chart if chart is None or isinstance(chart, str) else json.dumps(_bare(chart))
        at = _absolute(row[key]) if key == "path" else str(row[key])
        rows.append({"row_id": at, "study_id": _text(row.get("study_id")), "chart": said})
    kept = _by_id(rows, f"--charts {name}", "keep one chart of each")
    return {at: (row["study_id"], row["chart"]) for at, row in kept.items() if row["chart"] is not None}


def _bare(value: Any) -> Any:
    """Without nulls, with which a table fills the fields that another row has."""
    if isinstance(value, Mapping):
        return {k: _bare(v) for k, v in value.items() if v is not None}
    return [_bare(v) for v in value] if isinstance(value, list) else value


def _by_id(rows: Sequence[dict[str, Any]], name: str, advice: str) -> dict[str, dict[str, Any]]:
    found = {row["row_id"]: row for row in rows}
    if len(found) < len(rows):
        raise CxrayError(f"{name}: {len(rows) - len(found):,} of {len(rows):,} rows have the id of another one; {advice}")
    if not rows:
        raise CxrayError(f"{name}: has no rows")
    return found


def _table(name: str, option: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a Parquet, CSV or JSONL file, and the names of all its columns. Ids and paths are texts: 007 stays 007."""
    where = place(name)
    if not name.endswith(TABLES):
        raise CxrayError(f"{option} {name}: a table ends with {', '.join(TABLES)}")
    data = where.read()
    try:
        if name.endswith(".jsonl"):
            rows = [dict(json.loads(line)) for line in data.decode().splitlines() if line.strip()]
            return rows, list(dict.fromkeys(column for row in rows for column in row))
        source = pa.BufferReader(data)
        table = pq.read_table(source) if name.endswith(".parquet") else pyarrow.csv.read_csv(source, convert_options=CSV)
    except (ValueError, TypeError):  # pyarrow's ArrowInvalid is a ValueError
        raise CxrayError(f"{option} {name}: cannot be read as {name.rpartition('.')[2]}; is it whole?") from None
    read = [c for c in table.column_names if c in COLUMNS or c in CHART]
    return table.select(read).to_pylist(), table.column_names


def _absolute(path: str) -> str:
    """Workers have a working directory of their own."""
    where: Place = place(path)
    return str(where.local) if where.local is not None else path


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
