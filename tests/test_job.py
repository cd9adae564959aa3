"""A job that makes rows: each id once, in rows or rejects; stopped, grown, changed or contended, it ends whole or with a clear line."""

import json
import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import ray.exceptions
from ray.data import Dataset

from contracts.dataset import open_dataset, publish
from contracts.errors import CxrayError, RowError
from contracts.schema import KEYS, Schema
from contracts.storage import place
from pipelines.job import Job, RowsConfig, block, choose, each
from pipelines.lease import Lease
from pipelines.verify import verify

NUMBERS = Schema("numbers", 1, pa.schema([*KEYS, ("number", pa.int64())]))
SQUARES = Schema("squares", 1, pa.schema([*KEYS, ("square", pa.int64())]))


class SquareConfig(RowsConfig):
    into: str = "squares"
    power: int = 2


def numbers(folder: Path, count: int, first: int | None = None):
    """A data set of `count` numbered rows; the `first` of them in a file of their own."""
    table = pa.table(
        {
            "row_id": [f"id{i:04d}" for i in range(count)],
            "group_id": [f"p{i // 3}" for i in range(count)],
            "split": [("train", "validate", "test")[i // 3 % 3] for i in range(count)],
            "number": list(range(count)),
        },
        schema=NUMBERS.columns,
    )
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"all": table} if first is None else {"first": table.slice(0, first), "more": table.slice(first)}
    for name, part in parts.items():
        pq.write_table(part, folder / f"{name}.parquet")
    files = [{"path": f"{name}.parquet", "outcome": "row", "rows": part.num_rows, "bytes": 1} for name, part in parts.items()]
    return publish(place(folder), NUMBERS, "made-by-the-test", files)


def square(cfg: SquareConfig, source, marks: Path):
    """The job: squares; id0005 can never be read, id0007 not while the store is 'busy', and `broken` breaks the program at the last row."""
    marks.mkdir(exist_ok=True)
    last = source.rows - 1

    def work(row):
        (marks / f"{row['row_id']}.{os.getpid()}.{os.urandom(4).hex()}").touch()
        if row["number"] == 5:
            raise RowError("no_pixels")
        if row["number"] == 7 and (marks / "busy").exists():
            raise RowError("store_503", lasting=False)
        if row["number"] == last and (marks / "broken").exists():
            raise RuntimeError("a fault of the program")
        return {"square": row["number"] ** cfg.power}

    with Job("squares", cfg, SQUARES, made_by=[source.fingerprint]) as job:
        rows = job.read(source, ["number"])
        rows = rows.map_batches(lambda batch: block(each(batch, work), SQUARES), batch_format="pyarrow", batch_size=8)
        return job.write(rows)


def computed(marks: Path) -> list[str]:
    return sorted(p.name.partition(".")[0] for p in marks.glob("id*"))


def content(out: Path) -> dict[str, int]:
    table = open_dataset(place(out / "squares")).table(["row_id", "square"])
    return dict(zip(table["row_id"].to_pylist(), table["square"].to_pylist(), strict=True))


def test_every_id_stands_once_in_rows_or_rejects(local_ray, tmp_path):
    source = numbers(tmp_path / "in", 100)
    summary = square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks")
    assert (summary.rows_in, summary.rows, summary.rejects) == (100, 99, {"no_pixels": 1})
    assert content(tmp_path) == {f"id{i:04d}": i * i for i in range(100) if i != 5}
    verdict = verify(place(tmp_path / "squares"))
    assert verdict.clean and (verdict.rows_in, verdict.rows_out, verdict.rejects) == (100, 99, 1)
    assert not (tmp_path / "squares" / "_lease").exists()
    assert "100 in = 99 rows + 1 rejects" in str(summary)


def test_the_same_command_again_computes_nothing(local_ray, tmp_path):
    source, marks = numbers(tmp_path / "in", 60), tmp_path / "marks"
    square(SquareConfig(out=str(tmp_path)), source, marks)
    first = computed(marks)
    assert square(SquareConfig(out=str(tmp_path)), source, marks).new == 0
    assert computed(marks) == first and len(content(tmp_path)) == 59


def test_a_job_cut_short_publishes_nothing_and_goes_on_where_it_was(local_ray, tmp_path):
    source, marks = numbers(tmp_path / "in", 320), tmp_path / "marks"
    marks.mkdir()
    (marks / "broken").touch()
    with pytest.raises(Exception, match="a fault of the program"):
        square(SquareConfig(out=str(tmp_path)), source, marks)
    with pytest.raises(CxrayError, match="no finished"):
        open_dataset(place(tmp_path / "squares"))
    (marks / "broken").unlink()
    kept = {i for f in (tmp_path / "squares" / "_checkpoint").glob("*.parquet") for i in pq.read_table(f)["row_id"].to_pylist()}
    assert kept, "nothing was saved before the break"
    for mark in marks.glob("id*"):
        mark.unlink()
    summary = square(SquareConfig(out=str(tmp_path)), source, marks)
    assert not kept & set(computed(marks)), "what was safely written was computed again"
    assert (summary.rows, summary.new) == (319, 320 - len(kept))
    assert content(tmp_path) == {f"id{i:04d}": i * i for i in range(320) if i != 5}
    assert verify(place(tmp_path / "squares")).clean


def test_a_grown_input_adds_only_what_is_new_and_reads_no_file_of_the_rest(local_ray, tmp_path, monkeypatch):
    marks, read, asked = tmp_path / "marks", ray.data.read_parquet, []
    square(SquareConfig(out=str(tmp_path)), numbers(tmp_path / "in", 40), marks)
    for mark in marks.glob("id*"):
        mark.unlink()
    monkeypatch.setattr(ray.data, "read_parquet", lambda paths, **given: asked.append(paths) or read(paths, **given))
    summary = square(SquareConfig(out=str(tmp_path)), numbers(tmp_path / "in2", 50, first=40), marks)
    assert asked[0] == [str(tmp_path / "in2/more.parquet")]
    assert computed(marks) == [f"id{i:04d}" for i in range(40, 50)]
    assert (summary.rows, summary.new) == (49, 10) and verify(place(tmp_path / "squares")).clean


def test_a_passing_reject_is_tried_again_and_a_lasting_one_is_not(local_ray, tmp_path):
    source, marks = numbers(tmp_path / "in", 40), tmp_path / "marks"
    marks.mkdir()
    (marks / "busy").touch()
    assert square(SquareConfig(out=str(tmp_path)), source, marks).rejects == {"no_pixels": 1, "store_503": 1}
    (marks / "busy").unlink()
    for mark in marks.glob("id*"):
        mark.unlink()
    assert square(SquareConfig(out=str(tmp_path)), source, marks).rejects == {"no_pixels": 1}
    assert computed(marks) == ["id0007"]
    assert content(tmp_path)["id0007"] == 49 and verify(place(tmp_path / "squares")).clean


def test_other_settings_on_the_same_folder_are_refused(local_ray, tmp_path):
    source = numbers(tmp_path / "in", 20)
    square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks")
    with pytest.raises(CxrayError, match="made with other settings"):
        square(SquareConfig(out=str(tmp_path), power=3), source, tmp_path / "marks")
    assert content(tmp_path)["id0003"] == 9


def test_a_second_job_on_the_same_folder_is_refused_and_changes_nothing(local_ray, tmp_path):
    source, out = numbers(tmp_path / "in", 20), tmp_path / "squares"
    with Lease(place(out / "_lease")) as first:
        with pytest.raises(CxrayError, match="another job"):
            square(SquareConfig(out=str(tmp_path), power=3), source, tmp_path / "marks")
        first.renew()
    assert not (out / "_begun").exists(), "the other's settings are known before it begins"
    assert square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks").rows == 19


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def copy(file: Path) -> None:
    file.with_name("left-by-nobody-0.parquet").write_bytes(file.read_bytes())


@pytest.mark.parametrize(("harm", "where"), [(lose, "data/outcome=reject"), (cut, "data/outcome=row"), (copy, "_checkpoint")])
def test_files_that_were_harmed_are_noticed_and_made_again(local_ray, tmp_path, harm, where):
    source, out = numbers(tmp_path / "in", 40), tmp_path / "squares"
    square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks")
    harm(sorted((out / where).glob("*.parquet"))[0])
    if where != "_checkpoint" and harm is not copy:  # the ledger is no part of the data set, nor is a file that it does not list
        assert "missing or not readable" in str(verify(place(out)))
    square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks")
    assert verify(place(out)).clean and content(tmp_path) == {f"id{i:04d}": i * i for i in range(40) if i != 5}


def test_what_others_leave_while_it_runs_costs_no_second_command(local_ray, tmp_path, monkeypatch):
    """Written meanwhile by a killed run's last task, whole and committed, and left by a first attempt at what was then done."""
    source, cfg, out, write = numbers(tmp_path / "in", 100), SquareConfig(out=str(tmp_path)), tmp_path / "squares", Dataset.write_parquet
    hours = []

    def and_then_the_others(self: Dataset, path: str, **given: object) -> None:
        write(self, path, **given)
        hours.append(path)
        if len(hours) > 1:
            return
        first, second = sorted((out / "data/outcome=row").glob("*.parquet"))[1:3]
        both = pa.concat_tables([pq.ParquetFile(f).read().slice(3) for f in (first, second)])
        pq.write_table(both, out / "data/outcome=row/orphan-0.parquet")
        pq.write_table(both.select(["row_id"]), out / "_checkpoint/orphan.parquet")
        stale = out / "data/outcome=reject" / first.name
        assert not stale.exists()
        pq.write_table(pq.ParquetFile(first).read().slice(0, 1), stale)
        cut(second)

    monkeypatch.setattr(Dataset, "write_parquet", and_then_the_others)
    summary = square(cfg, source, tmp_path / "marks")
    assert (summary.rows_in, summary.rows, summary.rejects, len(hours)) == (100, 99, {"no_pixels": 1}, 2)
    assert content(tmp_path) == {f"id{i:04d}": i * i for i in range(100) if i != 5} and verify(place(out)).clean


def test_a_job_that_was_taken_for_dead_publishes_nothing(local_ray, tmp_path, monkeypatch):
    source, out, write = numbers(tmp_path / "in", 20), tmp_path / "squares", Dataset.write_parquet

    def and_then_another_took_over(self: Dataset, path: str, **given: object) -> None:
        write(self, path, **given)
        (out / "_lease").write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": 0.0, "token": "theirs", "time": time.time()}))

    monkeypatch.setattr(Dataset, "write_parquet", and_then_another_took_over)
    with pytest.raises(CxrayError, match="no longer this job's"):
        square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks")
    assert not (out / "dataset.json").exists() and "theirs" in (out / "_lease").read_text()


def test_a_full_disk_is_one_sentence_and_room_mends_it(local_ray, tmp_path):
    import subprocess

    source, disk = numbers(tmp_path / "in", 640), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        with pytest.raises(CxrayError, match="no space left"):
            square(SquareConfig(out=str(disk)), source, tmp_path / "marks")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        square(SquareConfig(out=str(disk)), source, tmp_path / "marks")
        assert verify(place(disk / "squares")).clean
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_verify_sees_a_row_written_twice_and_a_vector_that_is_no_number(tmp_path):
    schema = Schema("features", 1, pa.schema([*KEYS, ("embedding", pa.list_(pa.float32(), 2))]))
    rows = {"row_id": ["a", "a"], "group_id": ["p", "p"], "split": ["test", "test"], "embedding": [[1.0, 2.0], [float("nan"), 0.0]]}
    pq.write_table(pa.table(rows, schema=schema.columns), tmp_path / "x.parquet")
    columns = [f"{f.name}: {f.type}" for f in schema.columns]
    file = {"path": "x.parquet", "outcome": "row", "rows": 2, "bytes": 1}
    publish(place(tmp_path), schema, "f", [file], rows_in=2, ids_hash="", columns=columns)
    problems = str(verify(place(tmp_path)))
    assert "stand more than once" in problems and "not finite" in problems


def test_a_small_run_takes_the_same_rows_every_time_and_a_share_of_each_split(tmp_path):
    keys = numbers(tmp_path, 90).table(["row_id", "group_id", "split"])
    few = choose(keys, None, 4)
    assert {s: few["split"].to_pylist().count(s) for s in ("train", "validate", "test")} == {"train": 4, "validate": 4, "test": 4}
    assert choose(keys, 5, None).equals(choose(keys, 5, None)) and choose(keys, 5, None).num_rows == 5
    assert set(choose(keys, 5, None)["row_id"].to_pylist()) < set(choose(keys, 9, None)["row_id"].to_pylist())


def test_limit_grows_into_the_whole_and_takes_nothing_back_but_what_the_source_no_longer_has(local_ray, tmp_path):
    source, marks, out = numbers(tmp_path / "in", 50), tmp_path / "marks", place(tmp_path / "squares")
    assert square(SquareConfig(out=str(tmp_path), limit=10), source, marks).rows_in == 10
    assert square(SquareConfig(out=str(tmp_path)), source, marks).rows_in == 50
    assert square(SquareConfig(out=str(tmp_path), limit=10), source, marks).rows_in == 50
    fewer = square(SquareConfig(out=str(tmp_path), limit=10), numbers(tmp_path / "fewer", 45), marks)
    assert (fewer.rows_in, fewer.rows, fewer.new) == (45, 44, 0) and "the source no longer has them: 5" in str(fewer)
    assert content(tmp_path).keys() == {f"id{i:04d}" for i in range(45) if i != 5} and verify(out).clean
    assert len(computed(marks)) == 50


def test_a_source_with_an_id_twice_is_said_before_anything_is_done(local_ray, tmp_path):
    source = numbers(tmp_path / "in", 20, first=10)
    shutil.copy(tmp_path / "in/first.parquet", tmp_path / "in/more.parquet")
    with pytest.raises(CxrayError, match="10 ids stand there more than once"):
        square(SquareConfig(out=str(tmp_path)), source, tmp_path / "marks")
