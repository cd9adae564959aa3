"""Stage 2 with the text encoder too: it begins as it was frozen, learns at its own rates, and is used as it became, while which passages a
note fetches rests on the one before."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from test_finetune import LONGER, NETWORK, batch, exported, made, predicted, probabilities, trained, vit
from test_predict import PASSAGES, SPLITS, _about, chart, dataset, jpeg, patient
from test_serve_deployments import shown

from contracts.config import load as read
from contracts.dataset import open_dataset
from contracts.errors import CxrayError
from contracts.schema import COHORT, IMAGES, features_schema, texts_schema
from contracts.storage import place
from models.encoders import load_text
from models.mdfnet import KINDS
from pipelines.features import EncodeImages
from pipelines.images.decode import Limits
from pipelines.images.job import ImagesConfig, picture
from pipelines.knowledge import base
from pipelines.knowledge.retrieve import Knowledge
from pipelines.texts import EncodeTexts, TextsConfig
from serve.deployments.fusion import Fusion as Served
from serve.deployments.fusion import Settings
from serve.deployments.image import ImageEncoder, ImageSource
from serve.deployments.text import TextDeployment, TextSource
from serve.settings import Batched
from trainers import finetune
from trainers.engine import dry_run
from trainers.engine.data import Rows
from trainers.fusion import Fusion
from trainers.predict import run
from trainers.predictor import Model, Part, load
from trainers.sources import FusionConfig, Sources

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;-/()%"


@pytest.fixture(scope="module", autouse=True)
def _float32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.encoders.device.has_bf16", lambda device: False)
        yield


def bert(folder: Path, seed: int = 0) -> Path:
    """A tiny BERT that reads letter by letter, without dropout."""
    import transformers as hf
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    rules = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    rules.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{word}_token": f"[{word.upper()}]" for word in ("pad", "unk", "cls", "sep")}
    hf.PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=512, **special).save_pretrained(folder)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    model = hf.BertModel(hf.BertConfig(vocab_size=len(words), **small, **quiet))
    for tensor in model.parameters():  # as initialised every text gives the same vector
        tensor.data *= 3 if tensor.ndim > 1 else 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Eight patients with pictures and texts, by tiny encoders, and runs of stage 1 that have learnt nothing."""
    out = tmp_path_factory.mktemp("words")
    sees, reads = f"hf:{vit(out / 'vit')}", f"hf:{bert(out / 'bert')}"
    cohort = pa.Table.from_pylist([patient(n) | {"label_row": True} for n in range(len(SPLITS))], schema=COHORT.columns)
    dataset(out / "cohort", cohort, COHORT)
    keys = cohort.select(["row_id", "group_id", "split"])
    stored = [picture(jpeg(n), ImagesConfig(), Limits())["image"] for n in range(len(SPLITS))]
    images = pa.Table.from_pylist([k | {"image": i} for k, i in zip(keys.to_pylist(), stored)], schema=IMAGES.columns)
    dataset(out / "images", images, IMAGES)
    step = EncodeImages(sees, 3, features_schema(32, 3, 32))
    made = step(keys.append_column("image", pa.array(stored)))
    dataset(out / "features", made, features_schema(32, 3, 32), encoder=_about(step.encoder) | {"grid": 3})
    (out / "passages.jsonl").write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in PASSAGES.items()))
    base.run(read(base.KnowledgeConfig, {"out": str(out), "own": False, "corpora": [str(out / "passages.jsonl")], "encoder": reads}))
    cfg = read(TextsConfig, {"out": str(out), "knowledge": "knowledge", "retrieval": {"per_note": 2}, "encoder": reads})
    step = EncodeTexts(cfg, texts_schema(32))
    known = {"uri": str(out / "knowledge"), "fingerprint": Knowledge(place(out / "knowledge")).fingerprint}
    reading = cfg.reading().model_dump(mode="json")
    dataset(out / "texts", step(cohort), texts_schema(32), encoder=_about(step.encoder), knowledge=known, reading=reading)
    exported(out, config(out, unfreeze=None, into="fusion"))
    return out


def config(out: Path, unfreeze: dict | None = {}, training: dict = {}, **settings) -> FusionConfig:  # noqa: B006 - not changed
    given = {"start": "fusion", "augment": None, "lr_scale": 0.1, "layer_decay": 0.5} | unfreeze if unfreeze is not None else None
    plain = {"epochs": 1, "batch": 4, "micro_batch": 4, "lr": 0.01, "weight_decay": 0.0, "metric": "macro_auroc", "mode": "max"}
    return read(
        FusionConfig,
        {"out": str(out), "findings": ["Edema", "Pneumonia"], "kinds": ["raw", "note", "passage"], "into": "tuned"}
        | {"network": NETWORK | {"drop_text": 0}, "unfreeze": given}
        | {"training": plain | {"resources": {"cache": str(out / "cache")}} | training} | settings,
    )  # fmt: skip


def without_text(given: dict) -> dict:
    """What a rank gets whose rows have no segment."""
    return given | {"text_mask": torch.zeros_like(given["text_mask"])}


def test_it_begins_where_stage_1_ended(out):
    frozen, theirs = made(config(out, unfreeze=None))
    task, ours = made(config(out))
    module, given = task.build().eval(), batch(task, ours)
    network = frozen.build()
    network.load_state_dict(finetune.start(place(out / "fusion"), frozen._about()))
    stored = batch(frozen, theirs)
    with torch.no_grad():
        before, now = frozen.forward(network.eval(), stored), task.forward(module, given)
        read = module.read(given["tokens"])[given["which"]]
        same_image = {n: v for n, v in given.items() if n != "picture"} | {n: stored[n] for n in ("image", "embedding")}
        words_alone = task.forward(module, same_image)
        other = task.forward(module, same_image | {"which": (given["which"] + 1) % len(given["tokens"]["input_ids"])})
    assert {n for n in given if given[n] is not None} >= {"tokens", "which", "picture"} and "text" not in given
    mask = stored["text_mask"]
    assert torch.equal(mask, given["text_mask"]) and set(stored["kinds"][mask].tolist()) == set(range(len(KINDS)))
    np.testing.assert_allclose(read[mask], stored["text"][mask], atol=1e-5)  # texts are padded in another company
    off, spread = float((before - now).abs().max()), float(before.std(0).min())
    assert off < 0.05 * spread, (off, spread)  # image tokens are stored in eight bits
    np.testing.assert_allclose(words_alone, before, atol=1e-5)
    assert float((other - before).abs().max()) > 1e-3  # or all this says little


def test_each_text_is_read_once_a_batch(out):
    task, sources = made(config(out))
    given = batch(task, sources)
    texts = {s["text"] for r in sources.texts.table(["segments"]).to_pylist()[:4] for s in r["segments"] if s["text"]}
    fetched = {s["id"] for r in sources.texts.table(["segments"]).to_pylist()[:4] for s in r["segments"] if s["id"]}
    assert len(given["tokens"]["input_ids"]) == len(texts) + len(fetched) < int(given["text_mask"].sum())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("words", [True, False])
def test_every_parameter_has_a_gradient_on_every_rank(out, checkpointing, words):
    task, sources = made(config(out))
    module = task.build().train()
    if checkpointing:
        module.gradient_checkpointing_enable()
    given = batch(task, sources)
    task.loss(module, given if words else without_text(given)).backward()
    for name, parameter in module.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.isfinite().all()), name
    first = module.text_encoder.embeddings.word_embeddings.weight
    assert (float(first.grad.abs().max()) > 0) == words
    assert not [n for n, p in module.named_parameters() if not p.requires_grad]


def test_rows_without_any_segment_still_have_a_text_to_read(out):
    task, sources = made(
        config(out, kinds=["passage"]),
    )
    rows = Rows(task, sources.data(task.cfg), "train", 0, task.cfg.training.resources.cache)
    row = rows.row(0)
    bare = task.collate([task.prepare(row | {"segments": []}, np.random.default_rng(0))] * 2)
    assert bare["which"].shape == (2, 1) and len(bare["tokens"]["input_ids"]) == 1 and not bare["text_mask"].any()
    module = task.build().train()
    task.loss(module, bare).backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_rates_fall_from_the_top_down(out):
    task, _ = made(config(out))
    module = task.build()
    groups = task.groups(module)
    rate = {id(p): g.get("lr", 0.01) for g in groups for p in g["params"]}
    decays = {id(p): g.get("weight_decay", "the run's") for g in groups for p in g["params"]}
    assert len(rate) == sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in module.parameters())
    layers = {f"encoder.layer.{n}.attention.output.dense.weight": 3 - n for n in range(3)}
    layers |= {"embeddings.word_embeddings.weight": 4, "embeddings.LayerNorm.bias": 4}
    named = dict(module.text_encoder.named_parameters())
    for name, depth in layers.items():
        assert rate[id(named[name])] == pytest.approx(0.001 * 0.5**depth), name
    assert all(decays[id(p)] == (0.0 if p.ndim < 2 else "the run's") for p in module.parameters())


def test_the_task_goes_to_the_workers_without_the_encoders(out):
    task, _ = made(config(out, unfreeze={"start": None}))
    sent = pickle.dumps(task)
    weights = sum(p.numel() for p in load_text(f"hf:{out / 'bert'}", "cpu").module.parameters())
    assert len(sent) < 4 * weights
    assert torch.equal(pickle.loads(sent).tokenise(["a rib"])["input_ids"], task.tokenise(["a rib"])["input_ids"])


@pytest.fixture(scope="module")
def tuned(out):
    return trained(out, config(out, training=LONGER))


def test_both_encoders_learn(out, tuned):
    task, module, _ = tuned
    for side, tower, upper, lower in (
        ("image", module.encoder, "layers.2.mlp.fc1.weight", "layers.0.mlp.fc1.weight"),
        ("text", module.text_encoder, "encoder.layer.2.output.dense.weight", "encoder.layer.0.output.dense.weight"),
    ):
        before = finetune.encoder(side, task.made.encoders[side]).module.state_dict()
        change = {name: float((tensor - before[name]).abs().max()) for name, tensor in tower.state_dict().items()}
        assert change[upper] > 2 * change[lower] > 0  # Adam's steps are as long as the rate


def test_what_was_exported_reads_as_the_trained_network(out, tuned):
    _, module, folder = tuned
    moved = shutil.copytree(folder / "model", out / "elsewhere/model").parent  # model/ alone, and the encoders that it names
    assert sorted(f.name for f in (moved / "model").iterdir()) == [
        "config.json", "encoder.safetensors", "knowledge", "model.safetensors", "text_encoder.safetensors"
    ]  # fmt: skip
    predictor = load(moved, device="cpu")
    parts = predictor.parts([predictor.opened(jpeg(n), chart(n)) for n in range(4)])
    given, rows = predictor.tensors(parts)
    pictures = np.stack([predictor.opened(jpeg(n), None)[0] for n in range(4)])
    with torch.no_grad():
        expected = predictor.task.forward(module, {**given, "picture": torch.from_numpy(pictures)}).sigmoid().numpy()
        untaught = predictor.network.told.tokenise(["Pneumonia comes with fever."])
        learnt = predictor.network.read(untaught)[0].numpy()
    said = probabilities(predictor, parts)
    np.testing.assert_allclose(said, expected, atol=1e-3)  # image tokens pass in eight bits
    alone = [probabilities(predictor, [part])[0] for part in parts]
    np.testing.assert_allclose(said, alone, atol=1e-5)
    # Charts are read, and passages found, by the encoder as it was.
    frozen = predictor.encoder("text")
    assert frozen.fingerprint == predictor.made.encoders["text"]["fingerprint"] != predictor.network.told.fingerprint
    assert np.abs(frozen(["Pneumonia comes with fever."]).embedding[0] - learnt).max() > 1e-3
    stored = {r["row_id"]: r["segments"] for r in open_dataset(place(out / "texts"), "texts").table(["row_id", "segments"]).to_pylist()}
    assert [r["names"] for r in rows] == [[s["id"] or s["name"] for s in stored[f"d{n}"]] for n in range(4)]
    assert {p.id for p in predictor.predict(jpeg(0), chart(0)).evidence} <= set(PASSAGES)
    assert predictor.predict(jpeg(0)).note == () and predictor.predict(None, chart(0)).note


def test_the_text_encoders_own_weights_count(out, tuned, tmp_path):
    """With those of before in their place the network says something else."""
    copy = Path(shutil.copytree(tuned[2] / "model", tmp_path / "run/model"))
    module = tuned[0].build()
    tower = finetune.encoder("text", tuned[0].made.encoders["text"]).module
    module.text_encoder.load_state_dict(tower.state_dict())
    (tmp_path / "before").mkdir()
    finetune.save(module, tmp_path / "before")
    shutil.copy(tmp_path / "before/text_encoder.safetensors", copy)
    now, before = Model(place(tuned[2]), "cpu"), Model(place(copy.parent), "cpu")
    assert now.network.told.fingerprint != before.network.told.fingerprint
    predictor = load(tuned[2], device="cpu")
    parts = [
        Part(None, *rest) for rest in ((p.chart, p.reading) for p in predictor.parts([predictor.opened(None, chart(n)) for n in (0, 1)]))
    ]
    scores = [[list(s.probabilities.values()) for s in model.say(parts)] for model in (now, before)]
    assert np.abs(np.subtract(*scores)).max() > 1e-3


def test_it_is_served_as_it_predicts(out, tuned):
    """Three deployments share it: one sees with the tuned image encoder, one reads charts with the text encoder as it was, and the
    network's own reads its words anew."""
    folder = tuned[2]
    said = json.loads((folder / "model/config.json").read_text())
    text = said["encoders"]["text"]
    parts_of_it = SimpleNamespace(
        image=ImageEncoder(Batched(), ImageSource(said["encoders"]["image"], place(folder), said["dicom"])),
        text=TextDeployment(Batched(), TextSource(text["name"], text["fingerprint"])),
        fusion=Served(Settings(), place(folder), None, None, None),
    )
    parts, _ = shown(parts_of_it, range(3))
    predicted = load(folder, device="cpu").predict_batch([(jpeg(n), chart(n)) for n in range(3)])
    for (answer,), expected in zip(parts_of_it.fusion.say([([one], False) for one in parts]), predicted, strict=True):
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
        assert answer.evidence and answer.note == expected.note


def test_a_cohort_is_predicted_from_pictures_and_words(local_ray, out, tuned):
    task, module, folder = tuned
    cfg = predicted(out, task, module)
    file = folder / "model/text_encoder.safetensors"
    weights = safetensors.torch.load_file(file)
    kept = file.read_bytes()
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
    with pytest.raises(CxrayError, match="made with other settings"):  # the network is the same, what it reads by is not
        run(cfg)
    file.write_bytes(kept)


def test_a_dry_run_goes_through_it_all(out):
    cfg = config(out, into="dry")
    seen = dry_run(Fusion(cfg, sources := Sources(cfg)), cfg.training, sources.data(cfg))
    own = [name for name in seen.exported if not name.startswith("knowledge/")]
    assert own == ["config.json", "encoder.safetensors", "model.safetensors", "text_encoder.safetensors"]
    assert all(seen.parameters[name][1] > 0 for name in ("image encoder", "text encoder", "text projection", "head"))


def test_the_image_encoder_alone(out):
    task, sources = made(cfg := config(out, unfreeze={"encoders": ["image"]}, into="image alone"))
    module, given = task.build().eval(), batch(task, sources)
    assert module.text_encoder is None and "text" in given and "tokens" not in given
    folder = exported(out, cfg, module)
    assert not (folder / "model/text_encoder.safetensors").exists()
    predictor = load(folder, device="cpu")
    parts = predictor.parts([predictor.opened(jpeg(n), chart(n)) for n in range(4)])
    with torch.no_grad():
        expected = task.forward(module, given).sigmoid().numpy()
    np.testing.assert_allclose(probabilities(predictor, parts), expected, atol=1e-3)


def test_where_no_text_is_shown_there_is_none_to_train(out):
    shown = {"modalities": ["image", "clinical"], "unfreeze": {"start": None, "encoders": ["image", "text"]}}
    task, sources = made(cfg := config(out, into="no words", **shown))
    assert task.unfrozen == ["image"] and task.build().text_encoder is None and "tokens" not in batch(task, sources)
    assert Model(place(exported(out, cfg)), "cpu").network.told is None


def test_what_does_not_go_together_is_said_before_training(out, tmp_path):
    with pytest.raises(CxrayError, match="name image too"):
        config(out, unfreeze={"encoders": ["text"]})
    there, kept = out / "bert", shutil.copytree(out / "bert", tmp_path / "kept")
    shutil.rmtree(there)
    try:
        bert(there, seed=5)
        with pytest.raises(CxrayError, match="has other weights now than the texts were made with"):
            made(config(out))
    finally:
        shutil.rmtree(there)
        shutil.copytree(kept, there)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda file: file.unlink(), "weights of the text encoder are missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "does not hold weights of `hf:"),
        (lambda file: shutil.copy(file.parent / "encoder.safetensors", file), "does not hold weights of `hf:"),
    ],
)
def test_weights_that_are_not_the_text_encoders_are_refused(tuned, tmp_path, spoil, sentence):
    copy = Path(shutil.copytree(tuned[2] / "model", tmp_path / "run/model"))
    spoil(copy / "text_encoder.safetensors")
    with pytest.raises(CxrayError, match=sentence) as error:
        load(copy.parent, device="cpu")
    assert "text_encoder.safetensors" in str(error.value)
