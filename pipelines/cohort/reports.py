"""Report texts -> sections. Texts come as PhysioNet's files (one a study) or from its zip."""

import io
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from contracts.schema import SECTIONS
from contracts.storage import Place, told

QUIET_S = 3  # reports that are read by then show no progress
SHORT = 30  # characters: below this a report says nothing ('___', 'See above')
STATUS = ("present", "short", "absent")

# A heading is a word in capitals at the start of a line (or of the text) with a colon behind it.
_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /()\-]{2,40}?)[ \t]*:", re.MULTILINE)
# Headings that mean the same, as the words of MIMIC-CXR's reports have it; a heading not named here belongs to no section.
_MEANS = {
    "EXAMINATION": "examination", "EXAM": "examination", "STUDY": "examination", "TYPE OF EXAMINATION": "examination",
    "INDICATION": "indication", "HISTORY": "indication", "CLINICAL HISTORY": "indication", "CLINICAL INFORMATION": "indication",
    "REASON FOR EXAM": "indication", "REASON FOR EXAMINATION": "indication", "REASON FOR THE EXAM": "indication",
    "CLINICAL INDICATION": "indication", "INDICATIONS": "indication",
    "TECHNIQUE": "technique", "PROCEDURE": "technique", "VIEWS": "technique",
    "COMPARISON": "comparison", "COMPARISONS": "comparison",
    "FINDINGS": "findings", "FINDING": "findings", "REPORT": "findings", "CHEST": "findings",
    "PA AND LATERAL VIEWS OF THE CHEST": "findings", "CHEST RADIOGRAPH": "findings", "CHEST PA AND LATERAL": "findings",
    "IMPRESSION": "impression", "IMPRESSIONS": "impression", "CONCLUSION": "impression", "CONCLUSIONS": "impression",
    "WET READ": "findings", "SUMMARY": "impression",
}  # fmt: skip


def sections(text: str) -> dict[str, str | None]:
    """A report's text -> its sections by name (see SECTIONS); None for one it does not have.

    A section that stands twice is joined. Words before any heading that are not the title belong to findings, where no heading
    of findings exists: many short reports have no headings at all. White space is folded.
    """
    found: dict[str, list[str]] = {}
    headings = list(_HEADING.finditer(text))
    for i, match in enumerate(headings):
        name = _MEANS.get(match[1].strip())
        end = headings[i + 1].start() if i + 1 < len(headings) else len(text)
        body = " ".join(text[match.end() : end].split())
        if name and body:
            found.setdefault(name, []).append(body)
    if "findings" not in found and "impression" not in found:
        start = headings[-1].end() if headings and _MEANS.get(headings[-1][1].strip()) is None else 0
        rest = text[start : headings[0].start()] if headings and not start else text[start:]
        body = " ".join(rest.replace("FINAL REPORT", " ").replace("WET READ", " ").split())
        if body:
            found["findings"] = [body]
    return {name: " ".join(found[name]) if name in found else None for name in SECTIONS}


def read_reports(where: Place | None, studies: list[tuple[int, int]]) -> pa.Table:
    """The reports of `studies` (subject_id, study_id): study_id, status, report_text and a column a section.

    status: 'present', 'short' (under 30 characters, whose text is left out) or 'absent'.
    """
    columns: dict[str, list] = {"study_id": [], "status": [], "report_text": [], **{f"report_{s}": [] for s in SECTIONS}}
    quiet = 0.5 if os.isatty(2) else 15.0  # as a job's own progress
    texts = tqdm(_texts(where, studies), "reports", len(studies), unit=" reports", delay=QUIET_S, mininterval=quiet) if where else ()
    for study_id, text in texts:
        stripped = "" if text is None else text.strip()
        status = "absent" if text is None else "short" if len(stripped) < SHORT else "present"
        split = sections(stripped) if status == "present" else dict.fromkeys(SECTIONS)
        columns["study_id"].append(study_id)
        columns["status"].append(status)
        columns["report_text"].append(stripped if status == "present" else None)
        for name, body in split.items():
            columns[f"report_{name}"].append(body)
    types = [pa.int64()] + [pa.string()] * (len(columns) - 1)
    return pa.table({n: pa.array(v, t) for (n, v), t in zip(columns.items(), types, strict=True)})


def _texts(where: Place, studies: list[tuple[int, int]]) -> Iterator[tuple[int, str | None]]:
    if where.name.endswith(".zip"):
        with told(where), zipfile.ZipFile(io.BytesIO(where.read())) as archive:
            names = {name.rpartition("/")[2]: name for name in archive.namelist()}
            for _, study in studies:
                name = names.get(f"s{study}.txt")
                yield study, archive.read(name).decode("utf-8", "replace") if name else None
        return
    fs, root = where.fs, (where / "files").path

    def one(key: tuple[int, int]) -> tuple[int, str | None]:
        subject, study = key
        try:
            data: Any = fs.cat_file(f"{root}/p{str(subject)[:2]}/p{subject}/s{study}.txt")
        except FileNotFoundError:
            return study, None
        return study, data.decode("utf-8", "replace")

    with told(where), ThreadPoolExecutor(32 if where.local is None else 4) as pool:
        yield from pool.map(one, studies)
