"""The engine's rows: which make which step, how they are read, and what is said where data do not fit."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from toy_task import Toy, losses, run, stored, toy_config, toy_data

from contracts.errors import CxrayError
from contracts.schema import texts_schema
from trainers.engine import Data
from trainers.engine.data import Rows, cached, value
from trainers.engine.order import Order
from trainers.engine.settings import micros


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return toy_data(tmp_path / "data")


def test_every_row_once_an_epoch_in_the_same_global_batches():
    order = Order(rows=103, batch=10, micro_batch=3, seed=1)
    assert order.steps == 10
    first = order.epoch(0)
    assert len(set(first.ravel().tolist())) == 100
    assert set(first.ravel().tolist()) != set(order.epoch(1).ravel().tolist())  # other rows sit out
    for world in (1, 2, 3, 4):
        parts = [list(order.stream(rank, world, (0, 0), 1)) for rank in range(world)]
        a_step = micros(10, 3, world)
        assert {len(p) for p in parts} == {order.steps * a_step}
        assert all(1 <= len(micro) <= 3 for p in parts for micro in p)
        for step in range(order.steps):
            rows = [n for p in parts for micro in p[step * a_step : (step + 1) * a_step] for _, n in micro]
            assert sorted(rows) == sorted(first[step].tolist())
    everything = list(order.stream(0, 2, (0, 0), 3))
    assert list(order.stream(0, 2, (1, 4), 3)) == everything[(10 + 4) * micros(10, 3, 2) :]


def test_balanced_sampling_draws_by_weight(tmp_path: Path, data: Data):
    weights = np.array([9.0] * 10 + [1.0] * 90)
    drawn = np.concatenate([Order(100, 10, 5, 0, weights).epoch(e).ravel() for e in range(20)])
    assert np.mean(drawn < 10) == pytest.approx(0.5, abs=0.05)
    with pytest.raises(CxrayError, match="no classes to balance"):
        Toy().balance(data.keys)


class Whole(Toy):
    """Gives rows as they come."""

    def prepare(self, row: Any, rng: np.random.Generator) -> dict[str, Any]:
        return dict(row)


def test_rows_by_number_are_the_tables_joined(tmp_path: Path, data: Data):
    rows = Rows(Whole(), data, "validate", 0, str(tmp_path / "cache"))
    assert len(rows) == 13
    tables = [d.table() for d in data.large] + list(data.small)
    by_id = [dict(zip(t["row_id"].to_pylist(), t.to_pylist())) for t in tables]
    ids = [rows[0, n]["row_id"] for n in range(13)]
    assert ids == sorted(ids)
    for n, row_id in enumerate(ids):
        got, want = rows[0, n], by_id[0][row_id] | by_id[1][row_id] | by_id[2][row_id]
        assert got["split"] == "validate"
        assert got.keys() == want.keys()
        assert got["tokens"] == want["tokens"]
        np.testing.assert_array_equal(got["vector"], np.float32(want["vector"]))
        np.testing.assert_array_equal(got["labels"], want["labels"])


def test_the_order_of_files_does_not_matter(tmp_path: Path, data: Data):
    turned = toy_data(tmp_path / "turned", files=1)
    turned = Data(turned.keys.take(np.arange(67)[::-1]), turned.large[::-1], turned.small)
    cfg = toy_config(tmp_path, epochs=1)
    assert losses(run(tmp_path / "a", Toy(), cfg, turned)) == losses(run(tmp_path / "b", Toy(), cfg, data))


def test_rows_are_copied_to_the_node_once(tmp_path: Path, data: Data):
    def copies() -> set[tuple[str, int]]:
        return {(p.name, p.stat().st_ino) for p in (tmp_path / "cache").rglob("*.arrow")}

    Rows(Toy(), data, "train", 0, str(tmp_path / "cache"))
    first = copies()
    assert len(first) == 2
    Rows(Toy(), data, "validate", 0, str(tmp_path / "cache"))
    assert copies() == first
    other = toy_data(tmp_path / "other", train=49)  # of another place there is another copy
    Rows(Toy(), other, "train", 0, str(tmp_path / "cache"))
    assert len(copies()) == 4
    shutil.rmtree(tmp_path / "data")
    Rows(Toy(), toy_data(tmp_path / "data", train=48), "train", 0, str(tmp_path / "cache"))  # of another version in the place of the first
    assert len(copies()) == 4
    assert not copies() & first
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_nobody_else_can_look_at_the_rows(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch):
    """Not even where somebody else made the folder first, whose name is easily guessed."""
    Rows(Toy(), data, "train", 0, str(tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    Rows(Toy(), data, "train", 0, str(tmp_path / "cache"))
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(CxrayError, match="is another user's or others may write there: delete it"):
        Rows(Toy(), data, "train", 0, str(tmp_path / "cache"))
    another = os.getuid() + 1
    (tmp_path / "cache" / f"cxray-rows-{another}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(CxrayError, match="is another user's"):
        Rows(Toy(), data, "train", 0, str(tmp_path / "cache"))


def test_numbers_deep_in_a_column_are_looked_at(tmp_path: Path):
    """As in `segments` of texts, where a passage has no vector of its own, and all else no score."""
    kind = texts_schema(2).columns.field("segments").type
    good = [{"kind": "note", "embedding": [1.0, 2.0]}, {"kind": "passage", "score": 0.5}]
    for name, segment in (("vector", {"kind": "note", "embedding": [1.0, np.nan]}), ("score", {"kind": "passage", "score": np.inf})):
        for rows in ([good, None, []], [good, [*good, segment]]):
            table = pa.table({"row_id": [str(i) for i in range(len(rows))], "segments": pa.array(rows, kind)})
            texts = stored(tmp_path / f"{name} {len(rows)}", table, 1)
            if len(rows) == 3:
                assert cached(texts, ["segments"], tmp_path / "cache").exists()
            else:
                with pytest.raises(CxrayError, match="column 'segments' holds numbers that are not finite"):
                    cached(texts, ["segments"], tmp_path / "cache")


def test_lists_of_structs_come_as_views(tmp_path: Path):
    kind = pa.list_(pa.struct([("kind", pa.string()), ("embedding", pa.list_(pa.float32(), 2))]))
    given = [
        [{"kind": "note", "embedding": [1.0, 2.0]}, {"kind": "raw", "embedding": None}],
        [],
        None,
        [{"kind": "x", "embedding": [3.0, 4.0]}],
    ]
    column = pa.array([None, *given], kind).slice(1)
    got = [value(column, i) for i in range(4)]
    assert [len(g) if g is not None else None for g in got] == [2, 0, None, 1]
    np.testing.assert_array_equal(got[0][0]["embedding"], [1, 2])
    assert (got[0][0]["kind"], got[0][1]["embedding"]) == ("note", None)
    np.testing.assert_array_equal(got[3][0]["embedding"], [3, 4])


def test_loaders_prepare_the_same_rows(tmp_path: Path, data: Data):
    here = run(tmp_path / "here", Toy(noise=0.2), toy_config(tmp_path, epochs=1), data)
    ahead = run(tmp_path / "ahead", Toy(noise=0.2), toy_config(tmp_path, epochs=1, resources={"loaders": 1}), data)
    assert losses(ahead) == losses(here)


def test_data_that_do_not_fit(tmp_path: Path, data: Data):
    cfg = toy_config(tmp_path)
    with pytest.raises(CxrayError, match="column 'vector' holds numbers that are not finite"):
        run(tmp_path, Toy(), cfg, toy_data(tmp_path / "spoilt", spoil=True))
    short = Data(data.keys, data.large, (data.small[0].slice(3),))
    with pytest.raises(CxrayError, match=r"a small table: \d+ of \d+ rows to train on are not there"):
        run(tmp_path, Toy(), cfg, short)
    with pytest.raises(CxrayError, match="column 'tokens' stands in none of the data sets"):
        run(tmp_path, Toy(), cfg, Data(data.keys, data.large[:1], data.small))
    with pytest.raises(CxrayError, match="column 'vector' stands in 2 of the data sets"):
        run(tmp_path, Toy(), cfg, Data(data.keys, (*data.large, data.large[0]), data.small))
    nobody = Data(data.keys.filter(pc.not_equal(data.keys["split"], "validate")), data.large, data.small)
    with pytest.raises(CxrayError, match="the validate split has no rows"):
        run(tmp_path, Toy(), cfg, nobody)
