"""Which of the files in a job's folder count: each id once, and what dataset.json lists is always there."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contracts.dataset import publish
from contracts.errors import CxrayError
from contracts.schema import KEYS, Schema
from contracts.storage import Place, place
from pipelines.ledger import Ledger, decoded, list_files

SCHEMA = Schema("squares", 1, pa.schema(KEYS))


def put(out: Path, name: str, rows: Iterable[int] = (), rejects: Iterable[int] = (), passing: bool = False) -> None:
    """A write of Ray's, committed."""
    for outcome, ids in {"row": rows, "reject": rejects}.items():
        table = pa.table({"row_id": [f"id{i}" for i in ids]})
        if table.num_rows:
            file = out / f"data/outcome={outcome}/{name}-0.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.append_column("lasting", pa.array([not passing] * table.num_rows)), file)
    (out / "_checkpoint").mkdir(exist_ok=True)
    pq.write_table(pa.table({"row_id": [f"id{i}" for i in (*rows, *rejects)]}), out / f"_checkpoint/{name}.parquet")


def published(out: Path) -> None:
    files = [{**f, "path": f"data/{f['path']}"} for f in list_files(place(out / "data"))]
    publish(place(out), SCHEMA, "made-by-the-test", files)
    (out / "run.json").write_text("{}")


def what_stands(out: Path) -> list[str]:
    return sorted(i for f in (out / "data").rglob("*.parquet") for i in pq.ParquetFile(f).read(["row_id"])["row_id"].to_pylist())


def ids(*numbers: int) -> list[str]:
    return [f"id{i}" for i in numbers]


def whole(out: Path) -> None:
    """What dataset.json lists, where there is one, is there."""
    if (out / "dataset.json").exists():
        for file in json.loads((out / "dataset.json").read_text())["files"]:
            assert pq.read_metadata(out / file["path"]).num_rows == file["rows"]


@pytest.fixture
def out(tmp_path) -> Path:
    """Six ids in three writes."""
    for name, numbers in {"r1": (1, 2), "r2": (3, 4), "r3": (5, 6)}.items():
        put(tmp_path, name, numbers)
    return tmp_path


def test_a_late_write_that_overlaps_others_goes_and_they_stay(out):
    """A killed run's last task, from before this run began: whole, committed, and of none of the others' ids all."""
    published(out)
    put(out, "orphan", (2, 3, 4, 5))
    assert Ledger(place(out)).writes.keys() == {"r1", "r2", "r3"} and what_stands(out) == ids(1, 2, 3, 4, 5, 6)


def test_without_a_finished_data_set_too_each_id_stands_once(out):
    put(out, "orphan", (2, 3, 4, 5))
    ledger = Ledger(place(out))
    assert ledger.ids == set(what_stands(out)) and len(what_stands(out)) == len(ledger.ids)


def test_after_a_run_only_its_own_writes_are_new(out):
    ledger = Ledger(place(out))
    put(out, "orphan", (2, 7))
    put(out, "run_1", (7,), (8,))
    ledger.settle("run")
    assert ledger.writes.keys() == {"r1", "r2", "r3", "run_1"} and what_stands(out) == ids(1, 2, 3, 4, 5, 6, 7, 8)


def test_a_reject_that_a_first_attempt_left_is_not_counted_with_the_seconds_rows(out):
    ledger = Ledger(place(out))
    put(out, "run_1", (), (8,))
    put(out, "run_1", (7, 8))
    ledger.settle("run")
    assert "id8" not in what_stands(out) and "run_1" not in ledger.writes, "computed again, whole"


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_footer(file: Path) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    file.write_bytes(data[: -8 - length] + os.urandom(length) + data[-8:])


@pytest.mark.parametrize("harm", [half, no_footer, Path.unlink])
@pytest.mark.parametrize("where", ["data/outcome=row/r2-0.parquet", "_checkpoint/r2.parquet"])
def test_a_damaged_write_goes_whole(out, harm, where):
    harm(out / where)
    assert Ledger(place(out)).ids == set(ids(1, 2, 5, 6)) and what_stands(out) == ids(1, 2, 5, 6)
    assert not (out / "_checkpoint/r2.parquet").exists()


def test_what_is_forgotten_leaves_rows_rejects_and_checkpoint(out):
    put(out, "r4", (7,), (8, 9), passing=True)
    ledger = Ledger(place(out))
    assert ledger.passing() == set(ids(8, 9))
    ledger.forget(set(ids(2, 8, 9)))
    assert what_stands(out) == ids(1, 3, 4, 5, 6, 7) and Ledger(place(out)).writes == ledger.writes


class Killed(BaseException): ...


@pytest.mark.parametrize("after", range(12))
def test_killed_anywhere_what_is_listed_is_there_and_the_next_run_mends_the_rest(out, monkeypatch, after):
    put(out, "r4", (7,), (8, 9), passing=True)
    published(out)
    put(out, "orphan", (2, 3))
    left = [after]

    def counted(change):
        def changing(self: Place, *given):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return change(self, *given)

        return changing

    with monkeypatch.context() as patch:
        patch.setattr(Place, "remove", counted(Place.remove))
        patch.setattr(Place, "write", counted(Place.write))
        try:
            Ledger(place(out)).forget(set(ids(2, 8, 9)))
        except Killed:
            whole(out)
    assert not (out / "run.json").exists() or (out / "dataset.json").exists()
    ledger = Ledger(place(out))
    ledger.forget(set(ids(2, 8, 9)))
    whole(out)
    assert ledger.ids == set(what_stands(out)) and len(what_stands(out)) == len(ledger.ids)
    assert ledger.ids >= set(ids(5, 6)) and not ledger.ids & set(ids(2, 8, 9))


def test_a_store_that_refuses_is_not_a_damaged_file(answering):
    answering.says(403, "no access", "forbidden")
    with pytest.raises(CxrayError, match=r"gs://mimic/out/x.parquet: no access .*\(403\)"):
        decoded(place("gs://mimic/out/x.parquet", answering.options()), ["row_id"])
