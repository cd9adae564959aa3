"""Tables of MIMIC's size and shape, without MIMIC: what a cohort reads, as csv.gz, from a seed. Nothing in them is of a person.

For timing, not for learning: columns, types, order of rows, counts, lengths of text and shares of dirt follow the published tables
(MIMIC-CXR-JPG 2.1, MIMIC-IV 3.1, MIMIC-IV-ED 2.2), so that reading and joining them costs about what it costs there; the values mean
nothing. `pipelines/synthetic` is the one whose patients make sense.
"""

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from mimic.emergency import diagnosis, edstays, medrecon, pyxis, triage, vitalsign
from mimic.hospital import admissions, d_icd_diagnoses, d_labitems, diagnoses_icd, icustays, labevents, omr, patients
from mimic.imaging import chexpert, metadata, split, write_reports
from mimic.world import VERSION, Sizes, World, stream, world

CXR, ED, IV = "mimic-cxr-jpg/2.1.0/mimic-cxr-2.0.0-", "mimic-iv-ed/2.2/ed/", "mimiciv/3.1/hosp/"
# The slow ones come first, so that two processes end together.
TABLES: dict[str, Callable[[World, Sizes, np.random.Generator], pa.Table | Iterator[pa.Table]]] = {
    IV + "labevents": labevents, IV + "omr": omr, IV + "diagnoses_icd": diagnoses_icd, ED + "medrecon": medrecon,
    ED + "vitalsign": vitalsign, ED + "pyxis": pyxis, CXR + "metadata": metadata, ED + "edstays": edstays, ED + "triage": triage,
    IV + "admissions": admissions, ED + "diagnosis": diagnosis, CXR + "split": split, CXR + "chexpert": chexpert, IV + "patients": patients,
    IV + "d_icd_diagnoses": d_icd_diagnoses, IV + "d_labitems": d_labitems, "mimiciv/3.1/icu/icustays": icustays,
}  # fmt: skip


def write_table(folder: Path, sizes: Sizes, name: str) -> None:
    made = TABLES[name](world(sizes), sizes, stream(sizes, name.rpartition("/")[2].removeprefix("mimic-cxr-2.0.0-")))
    chunks = iter([made]) if isinstance(made, pa.Table) else made
    path = folder / f"{name}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    con = duckdb.connect()
    con.execute("SET threads = 1")
    with gzip.open(path, "wb", compresslevel=4) as packed:  # one gzip member, as PhysioNet's are
        for i, chunk in enumerate(chunks):
            plain = path.with_suffix(".part")
            con.register("chunk", chunk)
            con.execute(f"COPY chunk TO '{plain}' (FORMAT csv, HEADER {i == 0})")
            with plain.open("rb") as file:
                shutil.copyfileobj(file, packed, 2**20)
            plain.unlink()


def tree(sizes: Sizes, below: Path) -> tuple[Path, float]:
    """(folder of these tables, seconds it took to make them: 0 where they stand already)."""
    folder = below / "mimic-{images}-{stays}-{vitals}-{labs}-{reports}".format(**asdict(sizes))
    sign = {"version": VERSION, **asdict(sizes)}
    if (folder / "made.json").exists() and json.loads((folder / "made.json").read_text()) == sign:
        return folder, 0.0
    started = time.monotonic()
    (folder / "mimic-cxr-jpg/2.1.0/files").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(write_table, folder, sizes, name) for name in TABLES] + [pool.submit(write_reports, folder, sizes)]
        for job in jobs:
            job.result()
    (folder / "made.json").write_text(json.dumps(sign))
    return folder, time.monotonic() - started
