"""Fetching: in order, ahead, no more at once than the store bears, and through every fault that passes."""

import asyncio
import pickle
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from emulator import upload
from faulty import KINDS, at_random, never
from trees import write_tree

from contracts.config import load
from contracts.dataset import open_dataset
from contracts.errors import CxrayError, RowError
from contracts.storage import Place, StorageOptions, place
from pipelines.cohort.job import CohortConfig
from pipelines.cohort.job import run as make_cohort
from pipelines.images import fetch, job
from pipelines.images.fetch import Fetcher, Pace
from pipelines.verify import verify

MANY = 24
LARGE = 1 << 20  # no file of these tests is larger, unless it is to be
PASSES = sorted(KINDS.keys() - {"short", "drip"})  # what the library tries again by itself


@pytest.fixture
def hasty(monkeypatch) -> None:
    """gcsfs' waits between its tries, a hundred times shorter."""
    from gcsfs import retry

    monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=soon))


async def soon(seconds: float) -> None:
    await asyncio.sleep(seconds / 100)


@pytest.fixture
def files(bucket, store) -> dict[str, bytes]:
    """URI -> bytes of some files in the store."""
    rng = np.random.default_rng(0)
    there = {f"{bucket}/f{i:02d}.jpg": rng.bytes(1000 + i).hex().encode() for i in range(MANY)}
    for uri, data in there.items():
        place(uri, store).write(data)
    return there


# -- what comes out ------------------------------------------------------------------------------------------------------------


def test_files_of_a_bucket_and_of_a_disk_come_in_the_order_asked_for(files, faulty, tmp_path):
    (tmp_path / "here.jpg").write_bytes(b"here")
    uris = [*list(files)[::-1], str(tmp_path / "here.jpg"), next(iter(files))]
    got = list(Fetcher(faulty.options(), 4, LARGE).each(uris))
    assert got == [files.get(uri, b"here") for uri in uris]


def test_what_is_not_there_or_too_large_is_a_lasting_reject_and_the_rest_comes(bucket, store, faulty, tmp_path):
    for folder in (bucket, place(tmp_path)):
        (folder / "large.jpg").write(b"x" * 1001)
        (folder / "fits.jpg").write(b"x" * 1000)
        names = ["none.jpg", "large.jpg", "fits.jpg"]
        missing, large, fits = Fetcher(faulty.options(), 2, 1000).each([f"{folder}/{name}" for name in names])
        assert isinstance(missing, RowError) and (missing.reason, missing.lasting) == ("missing_file", True)
        assert isinstance(large, RowError) and (large.reason, large.lasting) == ("too_many_bytes", True)
        assert fits == b"x" * 1000


def test_a_refusal_is_no_row_s_fault(answering):
    answering.says(403, "someone@example.org does not have storage.objects.get access to the object.", "forbidden")
    with pytest.raises(CxrayError, match=r"^gs://mimic: no access .*\(403\)"):
        list(Fetcher(answering.options(), 4, LARGE).each(f"gs://mimic/{i}" for i in range(20)))


# -- faults --------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("kind", PASSES)
def test_a_fault_that_passes_is_not_seen(hasty, files, faulty, kind):
    faulty.plan = lambda path, before, number: kind if before == 0 and number % 3 == 0 else None
    assert list(Fetcher(faulty.options(timeout_s=2), 8, LARGE).each(files)) == list(files.values())
    assert faulty.did[kind] > 3


@pytest.mark.fault
def test_a_body_that_was_cut_on_the_way_is_fetched_again(files, faulty):
    uri, whole = next(iter(files.items()))
    fetcher = Fetcher(faulty.options(), 2, LARGE)
    assert fetcher.mended(uri, whole) is None and fetcher.mended(uri, b"") == whole
    faulty.plan = lambda path, before, number: "short" if "alt=media" in path else None
    (short,) = fetcher.each([uri])
    assert isinstance(short, bytes) and short == whole[: len(whole) // 2]
    with pytest.raises(RowError) as error:
        fetcher.mended(uri, short)
    assert (error.value.reason, error.value.lasting) == ("short_body", False)
    assert error.value.detail == f"{len(short)} of {len(whole)} bytes, 4 times"


@pytest.mark.fault
@pytest.mark.parametrize(("kind", "reason"), [("stall", "store_unreachable"), ("drip", "store_timeout"), ("busy", "store_503")])
def test_a_store_that_never_gives_a_file_is_given_up_and_the_others_come(hasty, files, faulty, monkeypatch, kind, reason):
    monkeypatch.setattr(fetch, "BACKOFF_S", 1.5)
    faulty.plan = lambda path, before, number: kind if "f03" in path or "f11" in path else None
    got = list(Fetcher(faulty.options(timeout_s=0.25), 4, LARGE).each(files))
    for i, (one, data) in enumerate(zip(got, files.values(), strict=True)):
        if i not in (3, 11):
            assert one == data
            continue
        assert isinstance(one, RowError) and (one.reason, one.lasting) == (reason, False)
        if kind == "drip":
            assert "a file of gs:// did not come within 3 s" in str(one)


def test_a_disk_that_hangs_is_given_up(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)
    (tmp_path / "x.jpg").write_bytes(b"x")
    answer = threading.Event()
    fetcher = Fetcher(StorageOptions(timeout_s=0.02), 1, LARGE)
    monkeypatch.setattr(fetcher, "_read", lambda *_: answer.wait())
    (got,) = fetcher.each([str(tmp_path / "x.jpg")])
    answer.set()
    assert isinstance(got, RowError) and (got.reason, got.lasting) == ("store_timeout", False)


# -- how much at once ----------------------------------------------------------------------------------------------------------


def test_no_more_is_read_than_the_consumer_will_soon_want(files, faulty):
    pulled = []
    ahead = Fetcher(faulty.options(), 3, LARGE).each(pulled.append(uri) or uri for uri in files)
    for taken in range(1, MANY + 1):
        assert next(ahead) == files[pulled[taken - 1]]
        assert len(pulled) == min(MANY, taken + 5)
    assert max(faulty.at_once) <= 3


def test_memory_holds_twice_as_many_files_as_are_under_way(tmp_path):
    size = 4 << 20
    for i in range(20):
        (tmp_path / f"{i}.dcm").write_bytes(bytes(size))
    tracemalloc.start()
    assert sum(len(data) for data in Fetcher(StorageOptions(), 2, size).each(str(p) for p in tmp_path.iterdir())) == 20 * size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5.5 * size


def test_of_large_files_fewer_are_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "AHEAD_BYTES", 3500)
    sizes = [1000] * 10 + [3000] * 10 + [10] * 10
    uris = [str(tmp_path / f"{i:02d}.dcm") for i in range(len(sizes))]
    for uri, size in zip(uris, sizes, strict=True):
        Path(uri).write_bytes(bytes(size))
    pulled: list[str] = []
    files = Fetcher(StorageOptions(), 2, 10_000).each(pulled.append(uri) or uri for uri in uris)
    ahead = [len(pulled) - taken for taken, _ in enumerate(files, 1)]
    # The consumer's own is not counted. A file is as large as the largest of four: at first as large as it may be.
    assert ahead[:4] == [0] * 4 and ahead[5:10] == [2] * 5 and ahead[12:20] == [0] * 8 and ahead[24:27] == [3] * 3


def test_a_consumer_that_stops_frees_the_store_for_the_next(files, faulty):
    fetcher = Fetcher(faulty.options(timeout_s=20), 4, LARGE)
    faulty.plan = lambda path, before, number: None if "f00" in path else "stall"
    first = fetcher.each(files)
    assert next(first) == files[min(files)]
    first.close()
    faulty.plan = never
    assert list(fetcher.each(files)) == list(files.values())


def test_pace_halves_once_a_round_and_climbs_by_one_a_round():
    pace = Pace(8)
    before = 1e-9
    for _ in range(3):  # all sent before the first of them was turned away
        pace.slower(before)
    assert pace.limit == 4
    for _ in range(5):
        pace.faster()
    assert 5 <= pace.limit < 5.5
    for _ in range(200):
        pace.faster()
    assert pace.limit == 8
    for later in range(6):
        pace.slower(float("inf") if later else before)
    assert pace.limit == 1


@pytest.mark.fault
def test_fewer_are_asked_for_at_once_after_a_burst_of_429_and_more_again_later(hasty, files, faulty):
    fetcher = Fetcher(faulty.options(), 8, LARGE)
    faulty.delay_s = 0.05
    limits = []  # as each request came

    def plan(path: str, before: int, number: int) -> str | None:
        limits.append(fetcher.pace.limit)
        return "crowded" if 8 <= number < 24 else None

    faulty.plan = plan
    assert len(list(fetcher.each([*files, *files, *files, *files]))) == 4 * MANY
    assert faulty.did["crowded"] == 16 and max(faulty.at_once[:8]) == 8
    assert min(limits) <= 4 and limits[-1] == 8
    # What the store sees: first those again that it turned away, then fewer at once than before, later more again (how many of those
    # that may be under way are seen there at one moment is up to the machine).
    assert max(faulty.at_once[34:42]) < 8 and max(faulty.at_once[34:42]) < max(faulty.at_once[42:])


def test_the_client_that_watches_answers_does_not_travel(files, faulty):
    uri = next(iter(files))
    where = place(uri, faulty.options())
    list(Fetcher(faulty.options(), 2, LARGE).each([uri]))
    handler = pickle.loads(pickle.dumps(where.arrow()[0]))
    with handler.open_input_file(where.path) as file:
        assert file.read() == files[uri]


# -- the job -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A MIMIC of 100 small X-rays, of which one ends early and one is not there."""
    folder = tmp_path_factory.mktemp("pictures")
    people = [{"dicom_id": f"d{i:03d}", "subject_id": 10000000 + i, "study_id": 50000000 + i} for i in range(100)]
    write_tree(folder, metadata=people)
    for i, p in enumerate(people[:-1]):
        jpg = folder / f"mimic-cxr-jpg/2.1.0/files/p10/p{p['subject_id']}/s{p['study_id']}/{p['dicom_id']}.jpg"
        jpg.parent.mkdir(parents=True, exist_ok=True)
        data = cv2.imencode(".jpg", np.random.default_rng(i).integers(0, 255, (64, 56), np.uint8))[1].tobytes()
        jpg.write_bytes(data[:1000] if i == 7 else data)
    return folder


PLANTED = {"missing_file": 1, "truncated": 1}


def hasty_prepare(cfg):
    """The job's step, in a worker whose gcsfs waits a hundred times shorter."""
    step = job_prepare(cfg)

    def quick(rows: pa.Table) -> Iterator[pa.Table]:
        from gcsfs import retry

        waits, retry.asyncio = retry.asyncio, types.SimpleNamespace(sleep=soon)
        try:
            yield from step(rows)
        finally:
            retry.asyncio = waits

    return quick


job_prepare = job.prepare


def contents(where: Place) -> list[tuple[str, str]]:
    table = open_dataset(where, "images").table(["row_id", "content_hash"])
    return sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))


@pytest.mark.fault
def test_the_rows_of_a_bad_day_are_those_of_a_good_one_and_an_outage_only_delays_them(
    local_ray, bucket, store, faulty, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "prepare", hasty_prepare)
    upload(pictures, bucket)
    make_cohort(load(CohortConfig, {"root": str(bucket), "out": str(tmp_path), "storage": store.model_dump()}))

    def images(into: str, timeout_s: float = 2):
        settings = {"out": str(tmp_path), "into": into, "storage": faulty.options(timeout_s=timeout_s).model_dump()}
        return job.run(load(job.ImagesConfig, settings))

    good = images("good", timeout_s=20)
    assert (good.rows, good.rejects) == (98, PLANTED)

    shares = {"busy": 0.05, "stall": 0.02, "broken": 0.01, "short": 0.01, "reset": 0.01}
    day = at_random(4517, shares, every=60, burst=6)  # on which each kind happens some times, and none three times to one file
    faulty.plan = lambda path, before, number: day(path.replace(bucket.path, "bucket"), before, number)  # the same day in every bucket
    faulty.did, faulty.asked = type(faulty.did)(), type(faulty.asked)()
    bad = images("bad")
    assert all(faulty.did[kind] for kind in [*shares, "crowded"]), f"a kind of fault did not happen: {faulty.did}"
    assert (bad.rows, bad.rejects) == (98, PLANTED)
    assert contents(place(tmp_path / "bad")) == contents(place(tmp_path / "good"))
    assert verify(place(tmp_path / "bad")).clean

    faulty.plan = lambda path, before, number: "busy"
    out = images("late")
    assert (out.rows, out.rejects) == (0, {"store_503": 100})
    faulty.plan = never
    late = images("late")
    assert (late.rows, late.rejects, late.new) == (98, PLANTED, 100)
    assert contents(place(tmp_path / "late")) == contents(place(tmp_path / "good"))
    assert verify(place(tmp_path / "late")).clean
