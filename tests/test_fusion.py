"""`cxray train`: what does not go together is said before any training, and what is finished stays as it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_ablate import Base, thirty

from contracts.config import load
from contracts.errors import CxrayError
from contracts.findings import FINDINGS
from trainers import fusion, sources
from trainers.engine import Fitted
from trainers.fusion import Fusion, opened, run
from trainers.sources import FusionConfig, Sources, lists


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data sets of thirty patients."""
    thirty(tmp_path)
    monkeypatch.setattr(sources, "Knowledge", Base)
    return tmp_path


def config(out: Path, **settings: Any) -> FusionConfig:
    training = {"batch": 15, "micro_batch": 15, "metric": "macro_auroc", "mode": "max", **settings.pop("training", {})}
    return load(FusionConfig, {"out": str(out), "findings": ["Edema", "Pneumonia"], "training": training, **settings})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"encoder": "hog:"}, r"features: was made by the encoder e, and `encoder` is hog:; name other features"),
        ({"text_encoder": "st:other"}, r"texts: was made by the encoder e, and `text_encoder` is st:other; name other texts"),
    ],
)
def test_what_another_encoder_made_is_refused(out: Path, settings: dict[str, str], told: str):
    with pytest.raises(CxrayError, match=told):
        opened(config(out, **settings))
    opened(config(out, encoder="hf:missing | e", text_encoder="e"))
    assert config(out, encoder="e").fingerprint() == config(out).fingerprint(), "what the data sets say themselves decides no weights"


def test_a_passage_that_is_no_number_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch):
    class Spoilt(Base):
        where = "knowledge"

        def vectors(self, ids: Any) -> np.ndarray:
            vectors = super().vectors(ids)
            vectors[-1, 3] = np.nan
            return vectors

    monkeypatch.setattr(sources, "Knowledge", Spoilt)
    with pytest.raises(CxrayError, match=r"^knowledge: its vectors of passages are not finite; make the knowledge base again"):
        opened(config(out))
    opened(config(out, kinds=["note"]))


def test_a_best_epoch_that_could_not_be_told_is_said_before_training(out: Path, caplog: pytest.LogCaptureFixture):
    file = out / "cohort/data/rows.parquet"
    rows = pq.read_table(file)
    opened(config(out))
    assert not caplog.messages
    held_out = np.array(rows["split"].to_pylist()) == "validate"
    for column, value in (("label_edema", 1), ("label_pneumonia", -1)):  # an uncertain one counts for neither class
        place = rows.schema.get_field_index(column)
        states = np.where(held_out, value, rows[column].to_numpy())
        rows = rows.set_column(place, rows.schema.field(place), pa.array(states, rows.schema.field(place).type))
        pq.write_table(rows, file)
        if column == "label_edema":
            opened(config(out))
            assert caplog.messages == ["validate has not both positives and negatives of Edema: the best epoch is chosen by the others"]
    with pytest.raises(CxrayError, match=r"^validate has positives and negatives of none of the findings"):
        opened(config(out))


def test_balanced_sampling_is_not_weighted_once_more(out: Path):
    """What the network is shown under both: of each finding the positives weigh as much as the negatives, no more."""
    rng, n = np.random.default_rng(0), 20_000
    target = (rng.random((n, 3)) < [0.02, 0.2, 0.3]).astype(np.float32)
    train = pa.table({"clinical": lists(np.zeros((n, 2)), np.float32), "target": lists(target, np.float32)})

    def weights(sampling: str) -> tuple[np.ndarray, np.ndarray]:
        cfg = config(out, findings=FINDINGS[:3], training={"sampling": sampling})
        task = Fusion(cfg, Sources(cfg))
        return np.array(list(task.fit(train)["pos_weight"].values())), task.balance(train)

    natural, drawn = weights("natural")
    np.testing.assert_allclose(natural, np.minimum((1 - target.mean(0)) / target.mean(0), 20), rtol=1e-4)
    balanced, _ = weights("balanced")
    shown = target[rng.choice(n, 200_000, p=drawn / drawn.sum())].mean(0)
    assert shown[0] > 0.25, "or sampling evens nothing out"
    np.testing.assert_allclose(balanced * shown, 1 - shown, rtol=0.02)


def test_a_finished_run_stays_as_it_is(out: Path, monkeypatch: pytest.MonkeyPatch):
    """With the card and the date that it had: what was predicted and judged since would else be done again."""
    fits: list[Path] = []

    def fit(task: Fusion, training: Any, data: Any, where: Any, made_by: Any) -> Fitted:
        fits.append(where.local)
        for name in ("model.safetensors", "README.md"):
            (where / "model" / name).write(b"anew")
        return Fitted(str(where), 2, {"macro_auroc": 0.75}, 3, 6, 1.0, {})

    monkeypatch.setattr(fusion, "fit", fit)
    first = run(config(out))
    (out / "fusion/model/README.md").write_text("with intervals")
    said = (out / "fusion/run.json").read_text()
    again = run(config(out, training={"resources": {"cpus": 2}}))
    assert (len(fits), (out / "fusion/run.json").read_text()) == (1, said)
    assert (out / "fusion/model/README.md").read_text() == "with intervals"
    assert again.__dict__ == first.__dict__
    assert str(again).startswith("finished before, and unchanged") and str(first) in str(again)
    run(config(out, training={"epochs": 3}))
    (out / "fusion/model/model.safetensors").unlink()
    run(config(out, training={"epochs": 3}))
    assert len(fits) == 3, "another setting, and a model that is gone, are no finished run"
    assert json.loads((out / "fusion/run.json").read_text())["config"]["training"]["epochs"] == 3
