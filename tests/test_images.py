"""The images job: files of all kinds in, stored pictures or rejects out."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from trees import cohort, write_tree

from contracts.config import load
from contracts.dataset import open_dataset
from contracts.storage import place
from pipelines.images.decode import Limits
from pipelines.images.job import ImagesConfig, picture, run
from pipelines.images.stored import from_stored
from pipelines.verify import verify

ROOT = Path(__file__).resolve().parents[1]


def grey(side=300, seed=0) -> np.ndarray:
    return cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 255, (side, side), np.uint8), (0, 0), 5)


def jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


FILES = {
    "plain": jpeg(grey()),
    "tinted": jpeg(cv2.merge([grey(), grey(), (grey() * 0.8).astype(np.uint8)])),
    "png_named_jpg": png(Image.fromarray(grey())),
    "alpha": png(Image.fromarray(np.dstack([grey()] * 3 + [np.full((300, 300), 255, np.uint8)]))),
    "deep": png(Image.fromarray(grey().astype(np.uint16) * 256)),
    "empty": b"",
    "truncated": jpeg(grey())[:2000],
    "words": b"not an image at all",
    "twin": jpeg(grey()),  # the same bytes as `plain` under another patient; `alpha` shows the same as `png_named_jpg`
}
REASONS = {"empty": "empty_file", "truncated": "truncated", "words": "not_an_image", "gone": "missing_file"}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A cohort of one patient a file, and the folder its outputs go to."""
    folder = tmp_path_factory.mktemp("images")
    names = [*FILES, "gone"]
    images = [{"dicom_id": n, "subject_id": 10000000 + i, "study_id": 50000000 + i} for i, n in enumerate(names)]
    tree = write_tree(folder / "tree", metadata=images)
    for row in cohort(tree, folder)[0]:
        if row["row_id"] in FILES:
            Path(row["image_uri"]).parent.mkdir(parents=True, exist_ok=True)
            Path(row["image_uri"]).write_bytes(FILES[row["row_id"]])
    return folder


def test_each_file_becomes_a_picture_or_a_reject_with_its_reason(local_ray, out):
    summary = run(load(ImagesConfig, {"out": str(out), "regions": "edges", "profile": True}))
    images = open_dataset(place(out / "images"), "images")
    assert set(images.table(["row_id"])["row_id"].to_pylist()) == set(FILES) - set(REASONS)
    rejects = images.table(["row_id", "reason", "group_id", "split"], outcome="reject").to_pylist()
    assert {r["row_id"]: r["reason"] for r in rejects} == REASONS
    assert all(r["group_id"] and r["split"] == "train" for r in rejects)
    assert summary.notes[0] == "equal pictures under two patients: 2, of which across splits: 0"
    assert verify(place(out / "images")).clean
    done = [event["cat"] for event in json.loads((out / "images" / "timeline.json").read_text())]
    assert "task::MapBatches(step)->Write" in done and (out / "images" / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_a_stored_picture_is_what_serving_makes_of_the_same_bytes(local_ray, out):
    cfg = load(ImagesConfig, {"out": str(out), "regions": "edges"})
    run(cfg)
    for row in open_dataset(place(out / "images")).table().to_pylist():
        again = picture(FILES[row["row_id"]], cfg, Limits())
        assert row["image"] == again["image"] and row["content_hash"] == again["content_hash"]
        assert from_stored(row["image"]).shape == (518, 518)
        assert (row["width"], row["height"]) == (300, 300) and len(row["edges"]) == 256


def cxray(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "cxray", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def real_tree(shared_data, tmp_path_factory) -> Path:
    """Real X-rays, visits and tables of open data, laid out as PhysioNet does; who belongs to whom is made up."""
    tool = shared_data.parent / "tools" / "build_mimic_layout.py"
    out = tmp_path_factory.mktemp("real") / "tree"
    parts = [
        "--images",
        "cxr-ccby/images",
        "--metadata",
        "cxr-ccby/metadata.csv",
        "--ed",
        "mimic-iv-ed-demo-2.2",
        "--iv",
        "mimic-iv-demo-2.2",
    ]
    arguments = [p if p.startswith("--") else str(shared_data / p) for p in parts]
    subprocess.run([sys.executable, str(tool), *arguments, "--out", str(out)], check=True, capture_output=True, timeout=120)
    return out


@pytest.mark.ray
def test_the_same_verbs_on_a_tree_of_real_files(real_tree, tmp_path):
    done = cxray("run", "configs/demo/real.yaml", "--set", f"root={real_tree}", "--set", f"out={tmp_path}")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(cxray("verify", str(tmp_path / "images"), "--json").stdout)
    assert verdict["clean"] and verdict["rows_in"] == 76 == verdict["rows_out"] + verdict["rejects"]
    for name in ("cohort", "features/hog", "texts/minilm"):
        assert cxray("verify", str(tmp_path / name)).returncode == 0
    images = open_dataset(place(tmp_path / "images")).table(["source_bytes", "image"]).to_pylist()
    assert np.mean([len(row["image"]) for row in images]) < 50_000
    found = cxray("search", str(tmp_path / "index"), "--image", str(next(real_tree.rglob("*.jpg"))), "-k", "3", "--json")
    answers = json.loads(found.stdout)
    assert len(answers) == 3 and answers[0]["score"] > 0.99 and len({a["study_id"] for a in answers}) == 3
    again = cxray("run", "configs/demo/real.yaml", "--set", f"root={real_tree}", "--set", f"out={tmp_path}")
    assert again.stdout.count("finished before, and unchanged") == 5


def test_images_within_a_day_of_a_stay_are_linked_to_it(real_tree, tmp_path):
    rows, _ = cohort(real_tree, tmp_path, images="all")
    stays = pd.read_csv(real_tree / "mimic-iv-ed/2.2/ed/edstays.csv.gz", parse_dates=["intime", "outtime"])
    assert len(rows) == 76
    for row in rows:
        own = stays[stays.subject_id == int(row["group_id"])]
        t = pd.Timestamp(row["study_time"])
        distance = pd.concat([own.intime - t, t - own.outtime], axis=1).max(axis=1).clip(lower=pd.Timedelta(0))
        ranked = own.assign(distance=distance, near=(t - own.intime).abs()).sort_values(["distance", "near", "stay_id"])
        nearest = ranked.iloc[0]
        wanted = str(nearest.stay_id) if nearest.distance <= pd.Timedelta(hours=24) else None
        assert row["stay_id"] == wanted
    assert sum(row["stay_id"] is not None for row in rows) >= 50


def test_the_dirt_of_the_real_emergency_tables_is_repaired(shared_data, tmp_path):
    """One study at the end of each of the 222 stays, so that all of triage and vitals is known by then."""
    ed = shared_data / "mimic-iv-ed-demo-2.2" / "ed"
    stays = pd.read_csv(ed / "edstays.csv.gz", parse_dates=["outtime"])
    images = [
        {"dicom_id": str(s.stay_id), "subject_id": s.subject_id, "study_id": s.stay_id, "StudyDate": f"{s.outtime:%Y%m%d}",
         "StudyTime": float(f"{s.outtime:%H%M%S}")}
        for s in stays.itertuples()
    ]  # fmt: skip
    tree = write_tree(tmp_path / "tree", metadata=images)
    shutil.copytree(ed, tree / "mimic-iv-ed/2.2/ed")
    rows, card = cohort(tree, tmp_path / "out")
    triage = pd.read_csv(ed / "triage.csv.gz").set_index("stay_id").loc[[int(row["stay_id"]) for row in rows]]
    for row, raw in zip(rows, triage.itertuples(), strict=True):
        if raw.temperature == 36.5:
            assert row["chart_triage"]["temperature"] == 97.7
        if raw.dbp == 879:
            assert row["chart_triage"]["dbp"] is None and "triage.dbp" in row["chart_implausible"]
    repairs = card["repairs"]
    assert repairs["repaired"]["triage.temperature"] == (triage.temperature == 36.5).sum() == 1
    assert repairs["implausible"]["triage.dbp"] == (triage.dbp == 879).sum() == 1
    assert repairs["implausible"]["triage.pain"] == (triage.pain == "13").sum() > 0
    assert repairs["unreadable"]["triage.pain"] == triage.pain.str.contains("[a-zA-Z]", na=False).sum() > 0
    assert repairs["repaired"]["vitals.temperature"] > 0 and repairs["implausible"]["vitals.o2sat"] == 1
