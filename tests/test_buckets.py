"""The main job, from a bucket and to a bucket: the rows are those of a run on the disk."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emulator import upload
from trees import write_tree

from contracts.config import load
from contracts.dataset import open_dataset, publish
from contracts.errors import CxrayError
from contracts.schema import IMAGES
from contracts.storage import Place, StorageOptions, place
from pipelines.cohort.job import CohortConfig
from pipelines.cohort.job import run as make_cohort
from pipelines.features import FeaturesConfig
from pipelines.features import run as make_features
from pipelines.images.job import ImagesConfig
from pipelines.images.job import run as make_images
from pipelines.verify import verify

REPORT = "FINDINGS: The lungs are clear.\n\nIMPRESSION: No acute process in the chest."


def tree(folder: Path, count: int, **tables: Any) -> Path:
    """A MIMIC of `count` patients with one picture each; the last one's file is not there."""
    people = [{"dicom_id": f"d{i}", "subject_id": 10000000 + i, "study_id": 50000000 + i} for i in range(count)]
    reports = {p["study_id"]: REPORT for p in people[:-1]}
    write_tree(folder, reports, metadata=people, edstays=[{}], triage=[{"temperature": 37.0}], vitalsign=[{}], **tables)
    for i, p in enumerate(people[:-1]):
        jpg = folder / f"mimic-cxr-jpg/2.1.0/files/p10/p{p['subject_id']}/s{p['study_id']}/{p['dicom_id']}.jpg"
        jpg.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(jpg), np.random.default_rng(i).integers(0, 255, (60, 50), np.uint8))
    return folder


def rows(where: Place, kind: str, *but: str) -> list[dict[str, Any]]:
    """A data set's rows, in the order of their ids, without the columns that say where things lie."""
    table = open_dataset(where, kind).table().drop_columns(list(but))
    return sorted(table.to_pylist(), key=lambda r: r["row_id"])


def made(root: Any, out: Any, storage: StorageOptions | None = None) -> tuple[Any, Any]:
    """cohort -> images -> features, as the command line would run them: what was said of the last two."""
    shared = {"out": str(out), "storage": storage.model_dump() if storage else {}}
    make_cohort(load(CohortConfig, {"root": str(root), **shared}))
    return make_images(load(ImagesConfig, shared)), make_features(load(FeaturesConfig, {"encoder": "hog:", **shared}))


def test_what_is_written_into_a_bucket_is_listed_read_and_removed(bucket):
    (bucket / "a/one.txt").write(b"first")
    (bucket / "a/one.txt").write(b"second")
    (bucket / "a/deep/two.csv").write("zwei è".encode())
    (bucket / "ab/three.csv").write(b"")
    assert (bucket / "a/one.txt").read() == b"second" and (bucket / "a/deep/two.csv").read_text() == "zwei è"
    assert [f.relative(bucket) for f in bucket.files()] == ["a/deep/two.csv", "a/one.txt", "ab/three.csv"]
    assert [f.relative(bucket / "a") for f in (bucket / "a").files(".csv")] == ["deep/two.csv"]
    assert (bucket / "a").exists() and (bucket / "a/one.txt").size() == 6 and not (bucket / "b").exists()
    (bucket / "a").remove()
    (bucket / "a").remove()
    assert [f.uri for f in bucket.files()] == [f"{bucket}/ab/three.csv"]
    assert (bucket / "b").files() == []
    with pytest.raises(CxrayError, match=rf"^{bucket}/a/one.txt: is not there"):
        (bucket / "a/one.txt").read()


def test_a_row_says_which_of_a_data_sets_files_it_stands_in(bucket, tmp_path):
    for where in (bucket / "out", place(tmp_path)):
        for name in ("b", "a"):
            (where / f"data/{name}.parquet").write(b"")
            pq.write_table(pa.table({"row_id": [name]}), f"{where.arrow()[1]}/data/{name}.parquet", filesystem=where.arrow()[0])
        files = [{"path": f"data/{name}.parquet", "outcome": "row", "rows": 1, "bytes": 1} for name in ("b", "a")]
        data = publish(where, IMAGES, "made-by-the-test", files)
        assert data.table(["row_id", "__filename"])["__filename"].to_pylist() == data.paths()


def test_a_cohort_from_a_bucket_equals_the_one_from_the_disk(bucket, store, tmp_path):
    upload(tree(tmp_path / "tree", 4), bucket / "tree")
    shared = {"storage": store.model_dump()}
    make_cohort(load(CohortConfig, {"root": str(tmp_path / "tree"), "out": str(tmp_path / "disk")}))
    make_cohort(load(CohortConfig, {"root": f"{bucket}/tree", "out": str(tmp_path / "from"), **shared}))
    make_cohort(load(CohortConfig, {"root": f"{bucket}/tree", "out": f"{bucket}/out", **shared}))
    here = rows(place(tmp_path / "disk/cohort"), "cohort", "image_uri")
    assert len(here) == 4 and here[0]["report_impression"] == "No acute process in the chest."
    assert rows(place(tmp_path / "from/cohort"), "cohort", "image_uri") == here
    assert rows(bucket / "out/cohort", "cohort", "image_uri") == here
    assert all(r["image_uri"].startswith(f"{bucket}/tree/") for r in rows(bucket / "out/cohort", "cohort"))
    assert "<html" in (bucket / "out/cohort/cohort.html").read_text()


def test_reports_in_a_zip_in_a_bucket_are_those_of_the_files(bucket, store, tmp_path):
    folder = tree(tmp_path / "tree", 3)
    with zipfile.ZipFile(folder / "reports.zip", "w") as archive:
        for file in (folder / "mimic-cxr/2.1.0").rglob("*.txt"):
            archive.write(file, file.relative_to(folder / "mimic-cxr/2.1.0").as_posix())
    upload(folder, bucket)
    found = {}
    for kind, reports in (("files", f"{bucket}/mimic-cxr/2.1.0"), ("zip", f"{bucket}/reports.zip")):
        sources = {"reports": reports}
        make_cohort(
            load(CohortConfig, {"root": str(bucket), "sources": sources, "out": str(tmp_path / kind), "storage": store.model_dump()})
        )
        found[kind] = rows(place(tmp_path / kind / "cohort"), "cohort")
    assert found["zip"] == found["files"]
    assert [r["report_status"] for r in found["zip"]] == ["present", "present", "absent"]


def test_the_main_job_in_a_bucket_makes_the_rows_of_the_disk_once_and_grows(local_ray, bucket, store, tmp_path):
    folder = tree(tmp_path / "tree", 4)
    upload(folder, bucket / "tree")
    made(folder, tmp_path / "out")
    images, features = made(f"{bucket}/tree", f"{bucket}/out", store)
    assert (images.rows, images.rejects, features.rows) == (3, {"missing_file": 1}, 3)
    for kind in ("images", "features"):
        assert rows(bucket / "out" / kind, kind) == rows(place(tmp_path / "out" / kind), kind)
        assert verify(bucket / "out" / kind).clean

    before = {f.uri for f in (bucket / "out/images/data").files()}
    upload(tree(tmp_path / "more", 7), bucket / "tree")
    shared = {"out": f"{bucket}/out", "storage": store.model_dump()}
    make_cohort(load(CohortConfig, {"root": f"{bucket}/tree", **shared}))
    images = make_images(load(ImagesConfig, shared))
    assert (images.new, images.rows) == (3, 5), "those that are there were not made again"
    assert before < {f.uri for f in (bucket / "out/images/data").files()}
    assert verify(bucket / "out/images").clean
    assert not (bucket / "out/images/_lease").exists()


def test_a_bucket_that_refuses_ends_a_verb_in_one_line(answering):
    answering.says(403, "someone@example.org does not have storage.objects.get access to the object.", "forbidden")
    sets = {"root": "gs://mimic", "storage.anonymous": "true", "storage.endpoint_url": answering.options().endpoint_url, "out": "/nowhere"}
    command = [sys.executable, "-m", "cxray", "cohort", os.devnull]
    command += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "gs://mimic" in ended.stderr and "no access with these credentials (403)" in ended.stderr
    assert "someone@example.org" not in ended.stderr


def test_a_bucket_that_refuses_in_the_middle_ends_the_job_in_one_line_and_rejects_no_row(
    local_ray, bucket, store, answering, tmp_path, capfd
):
    upload(tree(tmp_path / "tree", 3), bucket)
    shared = {"out": str(tmp_path / "out")}
    make_cohort(load(CohortConfig, {"root": str(bucket), "storage": store.model_dump(), **shared}))
    answering.says(403, "someone@example.org does not have storage.objects.get access to the object.", "forbidden")
    with pytest.raises(CxrayError) as refused:
        make_images(load(ImagesConfig, {"storage": answering.options().model_dump(), **shared}))
    assert str(refused.value).startswith(f"{bucket}: ") and "(403)" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and "Traceback" not in capfd.readouterr().err
    assert make_images(load(ImagesConfig, {"storage": store.model_dump(), **shared})).rejects == {"missing_file": 1}
