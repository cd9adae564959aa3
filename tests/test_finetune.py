"""Stage 2: the encoder begins as it was frozen, learns at its own rates, sees pictures moved only in training, and is used as it became."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from test_predict import SPLITS, chart, dataset, jpeg, patient

from contracts.config import load as read
from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.runs import record
from contracts.schema import COHORT, IMAGES, features_schema
from contracts.storage import place
from models.encoders import load_image
from models.mdfnet import MDFNet, MDFNetConfig
from models.unfrozen import Unfrozen
from pipelines.features import EncodeImages, encoded
from pipelines.images.decode import Limits
from pipelines.images.job import ImagesConfig, picture
from trainers import finetune
from trainers.augment import Augment
from trainers.engine import dry_run
from trainers.engine.context import Context, into
from trainers.engine.data import Rows
from trainers.engine.loop import train
from trainers.engine.plain import load_weights
from trainers.fusion import Fusion
from trainers.predict import PredictConfig, run
from trainers.predictor import Model, Part, Predictor, load
from trainers.sources import FusionConfig, Sources

NETWORK = {"dim": 16, "heads": 2, "hidden": [16, 8], "drop_image": 0, "drop_clinical": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _float32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.encoders.device.has_bf16", lambda device: False)
        yield


def vit(folder: Path, seed: int = 0, kind: str = "ViT", **settings) -> Path:
    import transformers as hf

    torch.manual_seed(seed)
    config = getattr(hf, f"{kind}Config")(**SMALL | {"num_hidden_layers": 3} | settings)
    model = getattr(hf, f"{kind}Model")(config)
    for tensor in model.parameters():  # as initialised every picture gives the same vector
        tensor.data *= 3 if tensor.ndim > 1 else 1
    model.save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Eight patients with pictures, the features of a tiny ViT, and a run of stage 1 that has learnt nothing."""
    out = tmp_path_factory.mktemp("finetune")
    encoder = f"hf:{vit(out / 'vit')}"
    cohort = pa.Table.from_pylist([patient(n) | {"label_row": True} for n in range(len(SPLITS))], schema=COHORT.columns)
    dataset(out / "cohort", cohort, COHORT)
    keys = cohort.select(["row_id", "group_id", "split"])
    stored = [picture(jpeg(n), ImagesConfig(), Limits())["image"] for n in range(len(SPLITS))]
    images = pa.Table.from_pylist([k | {"image": i} for k, i in zip(keys.to_pylist(), stored)], schema=IMAGES.columns)
    dataset(out / "images", images, IMAGES)
    schema = features_schema(32, 3, 32)
    step = EncodeImages(encoder, 3, schema)  # a grid of 4 x 4, pooled to 3 x 3
    about = {k: getattr(step.encoder, k) for k in ("name", "fingerprint", "dim", "joint")} | {"grid": 3}
    dataset(out / "features", step(keys.append_column("image", pa.array(stored))), schema, encoder=about)
    exported(out, config(out, unfreeze=None, into="fusion"))
    return out


def config(out: Path, unfreeze: dict | None = {}, training: dict = {}, **settings) -> FusionConfig:  # noqa: B006 - not changed
    given = {"images": "images", "start": "fusion", "lr_scale": 0.1, "layer_decay": 0.5} | unfreeze if unfreeze is not None else None
    plain = {"epochs": 1, "batch": 4, "micro_batch": 4, "lr": 0.01, "weight_decay": 0.0, "metric": "macro_auroc", "mode": "max"}
    return read(
        FusionConfig,
        {"out": str(out), "texts": None, "modalities": ["image", "clinical"], "findings": ["Edema", "Pneumonia"], "network": NETWORK}
        | {"into": "tuned", "unfreeze": given, "training": plain | {"resources": {"cache": str(out / "cache")}} | training} | settings,
    )  # fmt: skip


def made(cfg: FusionConfig) -> tuple[Fusion, Sources]:
    sources = Sources(cfg)
    task = Fusion(cfg, sources)
    task.fit(sources.data(cfg).small_columns("train", task.columns))
    return task, sources


def exported(out: Path, cfg: FusionConfig, module: torch.nn.Module | None = None) -> Path:
    """A finished run without the training."""
    task, _ = made(cfg)
    torch.manual_seed(1)
    folder = out / cfg.into / "model"
    folder.mkdir(parents=True)
    task.export(module or task.build(), folder)
    record(cfg.output(), "train", cfg, cfg.inputs(), {})
    return folder.parent


def batch(task: Fusion, sources: Sources, split: str = "train", epoch: int = 0):
    rows = Rows(task, sources.data(task.cfg), split, 0, task.cfg.training.resources.cache)
    return task.collate([rows[epoch, n] for n in range(len(rows))])


def test_it_begins_where_stage_1_ended(out):
    frozen, theirs = made(config(out, unfreeze=None))
    network = MDFNet(frozen.network())
    network.load_state_dict(finetune.start(place(out / "fusion"), frozen._about()))
    task, ours = made(config(out, unfreeze={"augment": None}))
    module = task.build()
    with torch.no_grad():
        before = frozen.forward(network.eval(), stored := batch(frozen, theirs))
        now = task.forward(module.eval(), batch(task, ours))
        seen = module.see(batch(task, ours)["picture"])
        other = task.forward(module, batch(task, ours) | {"picture": batch(task, ours)["picture"].flip(0)})
    for name in ("image", "embedding"):  # place by place: the logits would not tell if two patches were exchanged
        assert float((seen[name] - stored[name]).abs().max()) < 0.2 * float(stored[name].std(0).mean()), name
    off, spread = float((before - now).abs().max()), float(before.std(0).min())
    assert off < 0.02 * spread, (off, spread)  # tokens are stored in eight bits
    assert float((other - now).abs().max()) > spread  # or all this says little


def test_without_a_start_the_fusion_network_is_that_of_stage_1_untrained(out):
    task, _ = made(config(out, unfreeze={"start": None}))
    frozen, _ = made(config(out, unfreeze=None))
    torch.manual_seed(0)
    fresh = frozen.build().state_dict()
    torch.manual_seed(0)
    fusion = task.build().fusion.state_dict()
    assert all(torch.equal(fusion[name], tensor) for name, tensor in fresh.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_the_encoders_first_layer(out, checkpointing):
    task, sources = made(config(out))
    module = task.build().train()
    if checkpointing:
        module.gradient_checkpointing_enable()
    given = batch(task, sources)
    task.loss(module, given).backward()
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name
    first = module.encoder.embeddings.patch_embeddings.projection.weight
    assert first.grad is not None and float(first.grad.abs().max()) > 0


def test_what_no_output_rests_on_does_not_train(tmp_path):
    encoder = load_image(f"hf:{vit(tmp_path, kind='Dinov2')}", "cpu")
    module = Unfrozen(encoder, MDFNet(MDFNetConfig(vision_dim=32, embedding_dim=32)), 2)
    module.freeze_unused()
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["encoder.embeddings.mask_token"]


def test_rates_fall_from_the_top_down(out):
    task, _ = made(config(out))
    module = task.build()
    groups = task.groups(module)
    rate = {id(p): g.get("lr", 0.01) for g in groups for p in g["params"]}
    decays = {id(p): g.get("weight_decay", "the run's") for g in groups for p in g["params"]}
    assert len(rate) == sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in module.parameters())
    top = 0.01 * 0.1
    layers = {"layernorm.weight": 0, "layers.2.mlp.fc1.weight": 1, "layers.1.mlp.fc1.bias": 2, "layers.0.attention.q_proj.weight": 3}
    layers |= {"embeddings.cls_token": 4, "embeddings.position_embeddings": 4, "embeddings.patch_embeddings.projection.bias": 4}
    named = dict(module.encoder.named_parameters())
    for name, depth in layers.items():
        assert rate[id(named[name])] == pytest.approx(top * 0.5**depth), name
    assert {rate[id(p)] for p in module.fusion.parameters()} == {0.01}
    assert all(decays[id(p)] == (0.0 if p.ndim < 2 else "the run's") for p in module.parameters())


def test_the_blocks_of_open_clips_towers_are_known():
    import open_clip

    text = {"width": 16, "heads": 2, "layers": 1}
    timm = open_clip.CustomTextCLIP(8, {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}, text)
    clip = open_clip.CLIP(8, {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}, text)
    for tower, below, top in (
        (timm.visual, {"trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed.proj.weight"}, {"trunk.norm.weight", "head.proj.weight"}),
        (clip.visual, {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight"}, {"ln_post.weight", "proj"}),
    ):
        rate = {id(p): g["lr"] for g in finetune.groups(tower, 1.0, 0.5) for p in g["params"]}
        named = {name: rate[id(p)] for name, p in tower.named_parameters()}
        blocks = max(int(found[1]) for name in named if (found := finetune.BLOCK.search(name))) + 1
        assert {n for n, r in named.items() if r == 0.5 ** (blocks + 1)} >= below
        assert {n for n, r in named.items() if r == 1} >= top
        assert not (below | top) & {n for n in named if finetune.BLOCK.search(n)}


def test_only_training_sees_moved_pictures(out):
    cfg = config(out)
    task, sources = made(cfg)
    stored = {row["row_id"]: row["image"] for row in sources.images.table(["row_id", "image"]).to_pylist()}

    def seen(task: Fusion, split: str, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """What the network is given, and what is stored."""
        given = batch(task, sources, split, epoch)
        return given["picture"].numpy(), np.stack([cv2.imdecode(np.frombuffer(stored[i], np.uint8), 0) for i in given["row_id"]])

    for split in ("validate", "test"):
        assert np.array_equal(*seen(task, split))
    first, as_stored = seen(task, "train")
    assert all((one != other).any() for one, other in zip(first, as_stored))
    assert np.array_equal(first, seen(task, "train")[0]) and not np.array_equal(first, seen(task, "train", epoch=1)[0])
    assert np.array_equal(*seen(made(config(out, unfreeze={"augment": None}))[0], "train"))
    in_use = Model(place(exported(out, config(out, into="in use")))).task  # such as when the train split is predicted
    assert np.array_equal(*seen(in_use, "train"))


def test_augmentation_moves_and_never_mirrors():
    left = np.zeros((518, 518), np.uint8)
    cv2.circle(left, (140, 250), 40, 200, -1)
    centres, greys = [], []
    for seed in range(50):
        moved = Augment()(left, np.random.default_rng(seed))
        assert moved.dtype == np.uint8 and moved.shape == left.shape
        centres.append(np.argwhere(moved > moved.max() * 0.7).mean(0)[::-1])
        greys.append(int(moved.max()))
    far = np.abs(np.array(centres) - (140, 250)).max(0)
    assert (far < 518 * (0.05 + 0.05) + 20).all() and (far > 10).all() and np.ptp(greys) > 20
    still = Augment(rotate=0, shift=0, scale=0, brightness=0, contrast=0)
    assert np.array_equal(still(left, np.random.default_rng(0)), left)


LONGER = {"epochs": 4, "lr": 0.05, "warmup": 0, "activation_checkpointing": True}


@pytest.fixture(scope="module")
def tuned(out) -> tuple[Fusion, Unfrozen, Path]:
    return trained(out, config(out, training=LONGER))


def trained(out: Path, cfg: FusionConfig) -> tuple[Fusion, Unfrozen, Path]:
    """Some epochs by the engine, and what it left to use."""
    task, sources = made(cfg)
    train(Context(0, 1, CPU, into(out / "checkpoint")), task, cfg.training, sources.data(cfg))
    module = task.build()
    load_weights(module, out / "checkpoint/weights.safetensors")
    return task, module.eval(), exported(out, cfg, module)


def test_the_encoder_learns(out, tuned):
    task, module, _ = tuned
    base = finetune.encoder("image", task.made.encoders["image"]).module.state_dict()
    change = {name: float((tensor - base[name]).abs().max()) for name, tensor in module.encoder.state_dict().items()}
    assert min(change.values()) > 0
    assert change["layers.2.mlp.fc1.weight"] > 2 * change["layers.0.mlp.fc1.weight"]  # Adam's steps are as long as the rate


def test_what_was_exported_predicts_as_the_trained_network(out, tuned):
    _, module, folder = tuned
    moved = shutil.copytree(folder / "model", out / "elsewhere/model").parent  # model/ alone, and the encoder that it names
    predictor = load(moved, device="cpu")
    parts = predictor.parts([predictor.opened(jpeg(n), chart(n)) for n in range(4)])
    given, _ = predictor.tensors(parts)
    pictures = np.stack([predictor.opened(jpeg(n), None)[0] for n in range(4)])
    with torch.no_grad():
        expected = predictor.task.forward(module, {**given, "picture": torch.from_numpy(pictures)}).sigmoid().numpy()
    said = probabilities(predictor, parts)
    np.testing.assert_allclose(said, expected, atol=1e-3)  # tokens pass in eight bits
    base = load_image(predictor.made.encoders["image"]["name"], "cpu")
    unlearnt = [replace(part, image=row) for part, row in zip(parts, encoded(base, predictor.grid, pictures))]
    assert np.abs(said - probabilities(predictor, unlearnt)).max() > 0.01
    assert predictor.image_encoder.fingerprint != base.fingerprint and predictor.encoder("image") is predictor.image_encoder


def probabilities(predictor: Predictor, parts: list[Part]) -> np.ndarray:
    return np.array([[p.probabilities[f] for f in predictor.findings] for p in predictor.say(parts)])


def predicted(out: Path, task: Fusion, module: torch.nn.Module) -> PredictConfig:
    """Its config, after `cxray predict` of the run `tuned` said of test what the network itself says."""
    cfg = read(PredictConfig, {"out": str(out), "run": "tuned", "into": "predictions", "resources": {"actors": 1}})
    run(cfg)
    told = open_dataset(place(out / "predictions"), "predictions").table()
    rows = Rows(task, Sources(task.cfg).data(task.cfg, unlabelled=True), "test", 0, str(out / "cache"))
    with torch.no_grad():
        expected = task.predict(module, task.collate([rows[0, n] for n in range(len(rows))]))
    found = dict(zip(told["row_id"].to_pylist(), told["scores"].to_pylist()))
    np.testing.assert_allclose([found[i] for i in expected["row_id"]], expected["score"].numpy(), atol=1e-5)
    assert not np.isnan(expected["score"].numpy()).any()
    return cfg


def test_a_cohort_is_predicted_from_its_pictures(local_ray, out, tuned):
    task, module, _ = tuned
    predicted(out, task, module)


def test_a_dry_run_goes_through_it_all(out):
    cfg = config(out, into="dry")
    task, sources = Fusion(cfg, Sources(cfg)), Sources(cfg)
    seen = dry_run(task, cfg.training, sources.data(cfg))
    assert seen.exported == ["config.json", "encoder.safetensors", "model.safetensors"] and seen.parameters["image encoder"][1] > 0


def test_what_does_not_go_together_is_said_before_training(out, tmp_path):
    def refused(words: str, **settings) -> None:
        with pytest.raises(CxrayError, match=words):
            made(config(out, **settings))

    refused("modalities leave the image out", modalities=["clinical"])
    refused("zero_stage 3 cuts them up", training={"zero_stage": 3})
    refused("unknown key `unfreeze.layer_decoy`: did you mean `layer_decay`", unfreeze={"layer_decoy": 1})
    refused("name the folder of a finished", unfreeze={"start": "nowhere"})
    refused("trained with another findings than this config", findings=["Pneumonia", "Edema"])
    refused("trained with another network than", network=NETWORK | {"dim": 8})
    refused("has trained its encoders already", unfreeze={"start": str(exported(out, config(out, into="twice")))})
    config_json = json.loads((out / "fusion/model/config.json").read_text())
    config_json["encoders"]["image"]["fingerprint"] = "of another"
    folder = shutil.copytree(out / "fusion", tmp_path / "other")
    (folder / "model/config.json").write_text(json.dumps(config_json))
    refused("trained with another image encoder than", unfreeze={"start": str(folder)})


def test_encoders_without_weights_are_refused(out, tmp_path):
    keys = open_dataset(place(out / "cohort"), "cohort").table(["row_id", "group_id", "split"])
    pictures = open_dataset(place(out / "images"), "images").table(["image"])["image"].combine_chunks()
    schema = features_schema(1764, 7, 36)
    step = EncodeImages("hog:", 7, schema)
    about = {k: getattr(step.encoder, k) for k in ("name", "fingerprint", "dim", "joint")} | {"grid": 7}
    dataset(tmp_path / "hog", step(keys.append_column("image", pictures)), schema, encoder=about)
    with pytest.raises(CxrayError, match="hog:: has no weights here that could be trained"):
        made(config(out, unfreeze={"start": None}, features=str(tmp_path / "hog")))


def test_weights_that_are_not_the_encoders_are_refused(out, tuned, tmp_path):
    copy = Path(shutil.copytree(tuned[2] / "model", tmp_path / "run/model"))
    (copy / "encoder.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    with pytest.raises(CxrayError, match="does not hold weights of `hf:"):
        load(copy.parent)
    (copy / "encoder.safetensors").unlink()
    with pytest.raises(CxrayError, match="weights of the image encoder are missing"):
        load(copy.parent)


def test_a_base_encoder_that_changed_is_refused(out, tmp_path):
    """The named encoder has other weights than when the features were made."""
    there = out / "vit"
    kept = shutil.copytree(there, tmp_path / "kept")
    shutil.rmtree(there)
    try:
        vit(there, seed=5)
        with pytest.raises(CxrayError, match="has other weights now than the features were made with"):
            made(config(out))
    finally:
        shutil.rmtree(there)
        shutil.copytree(kept, there)
