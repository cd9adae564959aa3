"""Kill a worker, an actor, the driver or a node in the middle: the same command again ends with each id once, and equal content."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import chaos
import cv2
import numpy as np
import pyarrow as pa
import pytest
from trees import cohort, write_tree

from contracts.config import load
from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.schema import KEYS, Schema
from contracts.storage import place
from pipelines import features, job, pool, texts
from pipelines.images import job as images
from pipelines.job import block
from pipelines.pool import encoder_pool
from pipelines.verify import verify

IMAGES = 128  # eight blocks of sixteen: at the first that is safe, two to four are under way, and the others to come
VERBS = {
    "images": {"resources": {"batch": 4}},
    "features": {"encoder": "hog:", "resources": {"batch": 8}},
    "texts": {"encoder": "st:all-MiniLM-L6-v2", "resources": {"batch": 8}},
}
KEYS_ONLY = Schema("keys", 1, pa.schema(KEYS))


def finish(verb: str, config: dict) -> None:
    """The verb in this process, on the session's Ray: what a killed one left behind is its folder, for whoever goes on with it."""
    if verb == "images":
        images.run(load(images.ImagesConfig, config))
    elif verb == "features":
        features.run(load(features.FeaturesConfig, config))
    else:
        texts.run(load(texts.TextsConfig, config | {"resources": {"batch": 8, "actors": 1}}))  # each loads a language model


@pytest.fixture(scope="module")
def whole(local_ray, tmp_path_factory) -> Path:
    """A cohort with images and reports, and the outputs of each verb, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"dicom_id": f"d{i:04d}", "subject_id": 10000000 + i // 2, "study_id": 50000000 + i} for i in range(IMAGES)]
    reports = {50000000 + i: f"FINDINGS: Opacity number {i} in the right lower lobe, unchanged." for i in range(IMAGES)}
    tree = write_tree(folder / "tree", metadata=rows, reports=reports)
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (1400, 1200), np.uint8), (0, 0), 3)
    for number, row in enumerate(cohort(tree, folder)[0]):
        path = Path(row["image_uri"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 50 != 49:  # every fiftieth is not there
            cv2.imwrite(str(path), np.roll(noise, 9 * number))
    for verb, settings in VERBS.items():
        finish(verb, {"out": str(folder), **settings})
    return folder


def same_inputs(whole: Path, folder: Path, verb: str) -> dict:
    """A config of the verb that reads the undisturbed inputs and writes into `folder`."""
    reads = {"images": "cohort", "features": "images", "texts": "cohort"}[verb]
    return {"out": str(folder), reads: str(whole / reads), **VERBS[verb]}


def table(folder: Path) -> pa.Table:
    return open_dataset(place(folder)).table().sort_by("row_id")


def assert_equal(whole: Path, folder: Path, verb: str) -> None:
    verdict = verify(place(folder / verb))
    assert verdict.clean, str(verdict)
    got, wanted = table(folder / verb), table(whole / verb)
    assert got["row_id"].equals(wanted["row_id"])
    for name in wanted.column_names:
        if pa.types.is_fixed_size_list(wanted[name].type):
            a, b = (np.stack([v for v in t[name].to_pylist() if v is not None]) for t in (got, wanted))
            np.testing.assert_allclose(a, b, atol=1e-3)  # a batch's other rows change the last bits of bf16 sums
        else:
            assert got[name].equals(wanted[name]), name


@pytest.mark.fault
@pytest.mark.parametrize("verb", VERBS)
def test_kills_lose_nothing(whole, tmp_path, verb):
    """A worker and an actor die, and Ray makes good what they did; the driver dies; the same command goes on, and loses a node.

    At a resume Ray's filter takes a CPU of its own: the encoders of the node that died must not take its last one.
    """
    config, out = same_inputs(whole, tmp_path, verb), tmp_path / verb
    first = ["worker", "driver"] if verb == "images" else ["worker", "actor", "driver"]
    hit, ended_well = chaos.strike(verb, config, tmp_path, first, lambda kind: chaos.committed(out) > (32 if kind == "driver" else 0))
    assert hit and not ended_well, f"not all of {first} were there to kill"
    before = chaos.committed(out)
    hit, ended_well = chaos.strike(verb, config, tmp_path, ["node"], lambda _: chaos.committed(out) > before)
    assert hit, "it had ended before a node was lost"
    assert ended_well, (tmp_path / f"{verb}.log").read_text()[-2000:]
    assert_equal(whole, tmp_path, verb)


@pytest.mark.fault
@pytest.mark.parametrize("actors", [False, True])
def test_a_row_that_kills_its_process_ends_the_job_with_a_sentence(whole, tmp_path, monkeypatch, actors):
    """Ray by itself would start the process again for ever."""
    monkeypatch.setattr(pool, "RESTARTS", 1)
    monkeypatch.setattr(job, "RETRIES", 1)
    cfg, source, deaths = (
        load(features.FeaturesConfig, {"out": str(tmp_path), "resources": {"actors": 1}}),
        open_dataset(place(whole / "images")),
        tmp_path / "deaths",
    )

    def step(batch: pa.Table) -> pa.Table:
        if "d0007" in batch["row_id"].to_pylist():
            with deaths.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return block(batch.to_pylist(), KEYS_ONLY)

    class Encode:
        def __call__(self, batch: pa.Table) -> pa.Table:
            return step(batch)

    how = encoder_pool(cfg.resources, IMAGES) if actors else {"batch_format": "pyarrow", "max_retries": 1}
    with (
        job.Job("keys", cfg, KEYS_ONLY, made_by=[]) as running,
        pytest.raises(CxrayError, match=r"^(Encode|step, write): the process at work"),
    ):
        running.write(running.read(source, []).map_batches(Encode if actors else step, **how))
    assert deaths.read_text() == "xx"


@pytest.mark.fault
def test_ray_itself_killed_and_ctrl_c_twice_end_quickly_and_lose_nothing(whole, tmp_path):
    """Of Ray's death our sentence tells, or its own, where it is quicker to end this process too. The second Ctrl-C, while Ray shuts down,
    changes nothing."""
    config, out = same_inputs(whole, tmp_path, "images"), tmp_path / "images"
    hit, ended_well = chaos.strike("images", config, tmp_path, ["raylet"], lambda _: chaos.committed(out) > 0)
    assert hit and not ended_well
    assert re.search("cxray: Ray ended on this machine|Raylet is terminated", (tmp_path / "images.log").read_text())
    before = chaos.committed(out)
    process, log = chaos.start("images", config, tmp_path), tmp_path / "images.log"

    def wait_until(seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + chaos.LONGEST
        while not seen():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    wait_until(lambda: chaos.committed(out) > before)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "cxray: stopped; the same command goes on" in log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not (out / "dataset.json").exists()
    assert "Traceback" not in log.read_text()
    finish("images", config)
    assert_equal(whole, tmp_path, "images")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(50))
def test_random_kills_at_random_moments(whole, tmp_path, seed):
    """One to three kills of one run, each of anything at any moment, then the command once more; again where it had ended before."""
    rng, latest = random.Random(seed), 25.0
    verb = rng.choice(list(VERBS))
    for attempt in range(10):
        folder, hits = tmp_path / str(attempt), 0
        folder.mkdir()
        config = same_inputs(whole, folder, verb)
        for _ in range(rng.randint(1, 3)):
            moment = time.monotonic() + rng.uniform(0, latest)
            kind = rng.choice([k for k in chaos.KINDS if (verb, k) != ("images", "actor")])
            hit, ended_well = chaos.strike(
                verb, config, folder, [kind], lambda _, moment=moment: time.monotonic() > moment, rng.randrange(1000)
            )
            hits += hit
            if ended_well:
                break
        finish(verb, config)
        assert_equal(whole, folder, verb)
        if hits:
            return
        latest /= 2
    pytest.fail("each run had ended before it could be killed")
