"""The fusion network: what is absent cannot be seen, padding is nothing, attention adds up, and it learns from all three together."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.mdfnet import KINDS, MODALITIES, BatchNorm, MDFNet, MDFNetConfig, components, drop, masked_softmax

TINY = MDFNetConfig(vision_dim=10, embedding_dim=6, text_dim=7, clinical_dim=5, dim=16, heads=4, hidden=(24, 12), findings=3)
STILL: dict[str, Any] = {name: 0.0 for name in MDFNetConfig.model_fields if name.startswith("drop")}  # no dropout of any kind
BATCH, PATCHES, SEGMENTS = 6, 9, 4
NAN = float("nan")
CONTENT = {"image": ("image", "embedding"), "text": ("text",), "clinical": ("clinical",)}
WITH = {"image": ("image", "embedding"), "text": ("text", "text_mask", "kinds"), "clinical": ("clinical", "known")}
SUBSETS = [[m for i, m in enumerate(MODALITIES) if n >> i & 1] for n in range(1, 8)]


@pytest.fixture(autouse=True)
def _one_seed_and_one_thread():
    """These sums are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(train: bool = False, **settings: Any) -> MDFNet:
    """With weights large enough that every input shows in the output."""
    model = MDFNet(TINY.model_copy(update=settings))
    for name, weight in model.named_parameters():
        if name.endswith("absent") or "score" in name:
            nn.init.normal_(weight)
        elif weight.ndim == 2:
            weight.data *= 2
    return model.train(train)


def inputs(batch: int = BATCH, **also: Tensor) -> dict[str, Tensor]:
    """Row i has i % SEGMENTS + 1 segments; the others are padding."""
    count = torch.arange(batch) % SEGMENTS + 1
    return {
        "image": torch.randn(batch, PATCHES, 10),
        "embedding": torch.randn(batch, 6),
        "text": torch.randn(batch, SEGMENTS, 7),
        "text_mask": torch.arange(SEGMENTS) < count[:, None],
        "kinds": torch.randint(0, 3, (batch, SEGMENTS)),
        "clinical": torch.randn(batch, 5),
        "known": (torch.rand(batch, 5) < 0.7) | (torch.arange(5) == 0),
        **also,
    }


def presence(*modalities: str, batch: int = BATCH) -> Tensor:
    return torch.tensor([m in modalities for m in MODALITIES]).expand(batch, 3)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("given", SUBSETS, ids="+".join)
def test_any_subset_given_is_the_same_as_the_others_marked_absent(given, train):
    model, x = network(train, **STILL), inputs()
    only = model(**{name: x[name] for m in given for name in WITH[m]})
    assert only.shape == (BATCH, 3) and only.dtype == torch.float32 and only.isfinite().all()
    torch.testing.assert_close(only, model(**x, presence=presence(*given)))
    if len(given) < 3:
        assert not torch.allclose(only, model(**x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("absent", MODALITIES)
def test_what_is_absent_cannot_be_seen(absent, train):
    model, x = network(train, **STILL), inputs()
    there = torch.ones(BATCH, 3, dtype=torch.bool)
    rows = torch.tensor([0, 1])
    there[rows, MODALITIES.index(absent)] = False
    for name in CONTENT[absent]:
        x[name].requires_grad_()
    before = model(**x, presence=there, attention=True)
    before["logits"].sum().backward()
    for name in CONTENT[absent]:
        grad = x[name].grad
        assert grad is not None and (grad[rows] == 0).all() and (grad[2] != 0).any()
    spoilt = {k: v.detach().clone() for k, v in x.items()}
    for name in CONTENT[absent]:
        spoilt[name][rows] = NAN
    if absent == "text":
        spoilt["kinds"][rows], spoilt["text_mask"][rows] = 99, ~spoilt["text_mask"][rows]
    after = model(**spoilt, presence=there, attention=True)
    assert all(torch.equal(before[key], after[key]) for key in before)
    spoilt["kinds"] = x["kinds"]
    seen = model(**spoilt)  # the guard: were it seen, it would show
    assert seen[rows].isnan().all() if not train else seen.isnan().any()


def test_padding_is_nothing():
    model, x = network(), inputs()
    before = model(**x, attention=True)
    spoilt = {**x, "text": torch.where(x["text_mask"][..., None], x["text"], NAN), "kinds": torch.where(x["text_mask"], x["kinds"], -7)}
    after = model(**spoilt, attention=True)
    assert all(torch.equal(before[key], after[key]) for key in before)
    more = {k: F.pad(x[k], (0, 0, 0, 3) if k == "text" else (0, 3)) for k in WITH["text"]}
    torch.testing.assert_close(model(**{**x, **more}), before["logits"])


def test_the_order_of_segments_and_where_the_padding_stands_change_nothing():
    model, x, order = network(), inputs(), torch.tensor([2, 0, 3, 1])
    before = model(**x, attention=True)
    after = model(**{**x, **{k: x[k][:, order] for k in WITH["text"]}}, attention=True)
    torch.testing.assert_close(after["logits"], before["logits"])
    torch.testing.assert_close(after["segments"], before["segments"][:, order])


def test_a_missing_value_is_neither_its_content_nor_a_zero():
    model, x = network(), inputs()
    missing = {**x, "known": x["known"].clone(), "clinical": x["clinical"].clone()}
    missing["known"][:, 2], missing["clinical"][:, 2] = False, NAN
    first = model(**missing)
    missing["clinical"][:, 2] = 1e9
    assert torch.equal(model(**missing), first)
    zero = {**missing, "known": x["known"].clone(), "clinical": x["clinical"].clone()}
    zero["known"][:, 2], zero["clinical"][:, 2] = True, 0
    assert not torch.allclose(model(**zero), first)


def test_a_sample_does_not_hang_on_its_neighbours():
    model, x = network(), inputs()
    together = model(**x)
    for i in range(BATCH):
        torch.testing.assert_close(model(**{k: v[i : i + 1] for k, v in x.items()}), together[i : i + 1])


@pytest.mark.parametrize("train", [False, True])
def test_attention_adds_up_over_what_is_present_and_changes_no_logit(train):
    model, x = network(train, **STILL), inputs()
    there = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
    out = model(**x, presence=there, attention=True)
    torch.testing.assert_close(model(**x, presence=there), out["logits"])
    assert out["segments"].shape == (BATCH, SEGMENTS) and out["patches"].shape == (BATCH, PATCHES)
    torch.testing.assert_close(out["segments"].sum(1), there[:, 1].float())
    torch.testing.assert_close(out["patches"].sum(1), there[:, 0].float())
    assert (out["segments"][~x["text_mask"]] == 0).all() and (out["segments"] >= 0).all()
    assert out["patches"][0].std() > 1e-3 and out["segments"][4:5, :1].item() == pytest.approx(1), "row 4 has one segment only"


def test_attention_finds_the_segment_that_answers():
    """With projections that pass content on, an image of one kind looks at the segment of that kind."""
    model = network(vision_dim=16, text_dim=16, embedding_dim=0, heads=1)
    for layer in (model.vision.project, model.text.project, model.attention.vision_over_text.query, model.attention.vision_over_text.key):
        layer.weight.data = 2 * torch.eye(16)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(model.text.kinds.weight)
    codes = torch.eye(16)[[1, 5, 9]] * 3
    image = codes[[5 % 3]].expand(1, PATCHES, 16)
    weights = model(image=image, text=codes[None], text_mask=torch.ones(1, 3), kinds=torch.zeros(1, 3), attention=True)["segments"]
    assert weights[0].argmax() == 2 and weights[0, 2] > 0.8


def test_how_much_of_the_chart_is_read_is_for_the_query_to_say_and_of_an_absent_one_nothing():
    model, x, read = network(), inputs(), []
    for layer in (model.attention.vision_over_clinical, model.attention.text_over_clinical):
        layer.register_forward_hook(lambda module, given, out: read.append(out[1]))
    there = presence(*MODALITIES).clone()
    there[0, 2] = False
    model(**x, presence=there)
    for weights in read:
        assert (weights[0] == 0).all() and (weights[1:] > 0).all() and (weights[1:] < 1).all()
        assert weights[1:].std() > 1e-3


def test_the_embedding_of_the_whole_image_counts_but_is_nowhere_on_it():
    model, x = network(), inputs()
    one, two = (model(**{**x, "embedding": e}, attention=True) for e in (x["embedding"], -x["embedding"]))
    assert torch.equal(one["patches"], two["patches"]) and not torch.allclose(one["logits"], two["logits"])


def test_the_kind_of_a_segment_counts():
    model, x = network(), inputs()
    logits = [model(**{**x, "kinds": torch.full_like(x["kinds"], kind)}) for kind in range(len(KINDS))]
    assert not any(torch.allclose(logits[a], logits[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_no_modality_at_all_is_a_fixed_answer_and_not_nan():
    model = network()
    first, second = (model(**inputs(), presence=presence()) for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all()
    with pytest.raises(ValueError, match="needs an image"):
        model()
    with pytest.raises(ValueError, match="without its text_mask and kinds"):
        model(text=torch.randn(2, 1, 7))


def test_a_text_without_segments_and_a_chart_without_values_are_absent():
    model, x = network(), inputs()
    nothing = {**x, "text_mask": torch.zeros_like(x["text_mask"]), "known": torch.zeros_like(x["known"])}
    expected = model(**x, presence=presence("image"))
    torch.testing.assert_close(model(**nothing), expected)
    none = {**x, **{k: x[k][:, :0] for k in WITH["text"]}, "known": nothing["known"]}
    torch.testing.assert_close(model(**none), expected)
    assert model(**none, attention=True)["segments"].shape == (BATCH, 0)
    assert model(**{**x, "image": x["image"][:, :0]}, attention=True)["patches"].shape == (BATCH, 0)


@pytest.mark.parametrize("given", [["image"], list(MODALITIES)], ids="+".join)
def test_every_parameter_has_a_gradient_whatever_is_absent(given):
    """Ranks whose batches lack different things must still reduce the same parameters."""
    model, x = network(train=True), inputs()
    model(**{name: x[name] for m in given for name in WITH[m]}).square().sum().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None]
    assert not lacking
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values())
    if given == ["image"]:
        assert all((grads[name] == 0).all() for name in grads if name.startswith(("text.project", "text.kinds")))
        assert (grads["text.absent"] != 0).any() and (grads["clinical.absent"] != 0).any()


def test_modality_dropout_keeps_its_rates_and_never_takes_the_last():
    there = torch.tensor([[True, True, True]] * 20_000 + [[False, True, False]] * 100)
    left = drop(there, (0.1, 0.5, 0.9))
    assert (left <= there).all() and left.any(1).all() and torch.equal(left[20_000:], there[20_000:])
    lost_all = 0.1 * 0.5 * 0.9  # ... keep all
    expected = torch.tensor([0.9, 0.5, 0.1]) + lost_all
    torch.testing.assert_close(left[:20_000].float().mean(0), expected, atol=0.015, rtol=0)
    assert torch.equal(drop(there[:1] & False, (0.5,) * 3), torch.zeros(1, 3, dtype=torch.bool))


def test_modality_dropout_hides_in_training_only():
    model, x = network(train=True, **{**STILL, "drop_text": 0.999}), inputs()
    hidden = model(**x)
    torch.testing.assert_close(hidden, model(**x, presence=presence("image", "clinical")))
    model.eval()
    assert not torch.allclose(model(**x), model(**x, presence=presence("image", "clinical")))


def test_batch_norm_needs_two_in_training():
    model, x = network(train=True), inputs(1)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(**x)
    assert network()(**x).shape == (1, 3)


@pytest.mark.parametrize("cast", ["nothing", "weights", "all"])
def test_bfloat16(cast):
    """By autocast, as DeepSpeed does it (weights, but no statistics), and as `.bfloat16()` does."""
    model, x = network(train=True, **STILL), inputs()
    exact = model(**x, presence=presence("image", "text"))
    if cast == "all":
        model.bfloat16()
    if cast == "weights":
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "nothing"):
        logits = model(**x, presence=presence("image", "text"))
    logits.sum().backward()
    assert logits.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert F.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) > 0.97


def test_batch_norm_is_torchs():
    ours, theirs = BatchNorm(5), nn.BatchNorm1d(5)
    for _ in range(3):
        x = 3 * torch.randn(7, 5) + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.running_mean is not None and torch.equal(ours.running_mean, theirs.running_mean)  # type: ignore[arg-type]


def test_a_softmax_over_nothing_is_nothing_and_has_no_gradient():
    scores = torch.tensor([[0.0, 1.0], [5.0, 6.0]], requires_grad=True)
    keep = torch.tensor([[True, True], [False, False]])
    for may_pass, total in ((False, 1.0), (True, (1 + torch.e) / (2 + torch.e))):
        weights = masked_softmax(scores, keep, may_pass)
        torch.testing.assert_close(weights.sum(1), torch.tensor([total, 0.0]))
        (grad,) = torch.autograd.grad(weights.square().sum(), scores)
        assert grad.isfinite().all() and (grad[1] == 0).all()


def test_seeds_and_a_round_trip_through_safetensors(tmp_path):
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return MDFNet(TINY)(**inputs())  # in training: every dropout is drawn

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model, x = network(train=True), inputs()
    model(**x)  # batch norm has seen something
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(model.config.model_dump_json())
    again = MDFNet(MDFNetConfig.model_validate_json((tmp_path / "config.json").read_text()))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again.eval()(**x), model.eval()(**x))


def test_a_config_that_does_not_fit_is_refused():
    for wrong in ({"dim": 30, "heads": 8}, {"dropout_first": 1.0}, {"drop_text": 1.0}, {"hidden": (0, 5)}, {"head": 3}):
        with pytest.raises(ValidationError):
            MDFNetConfig.model_validate(wrong)


def test_the_head_and_the_chart_have_the_layers_that_are_promised():
    model = MDFNet(MDFNetConfig())
    layers = [(type(m).__name__, getattr(m, "out_features", getattr(m, "p", None))) for m in model.head]
    block = ("BatchNorm", None), ("ReLU", None)
    assert layers == [("Linear", 512), *block, ("Dropout", 0.3), ("Linear", 256), *block, ("Dropout", 0.2), ("Linear", 14)]
    assert (model.clinical.dense.in_features, model.clinical.dense.out_features) == (90, 256)  # 45 values and whether each is known


def test_every_parameter_is_in_one_component():
    """(The table that a person reads: test_engine.py; with encoders: test_finetune.py.)"""
    with torch.device("meta"):
        model = MDFNet(MDFNetConfig(embedding_dim=512, text_dim=768))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in components(model).items()}
    assert sum(count.values()) == sum(p.numel() for p in model.parameters())
    assert count["head"] == 1280 * 512 + 512 + 2 * 512 + 512 * 256 + 256 + 2 * 256 + 256 * 14 + 14


def test_it_begins_with_quiet_kinds_and_even_means():
    """(That it does so under ZeRO-3 too: test_engine_ranks.py.)"""
    model = MDFNet(MDFNetConfig())
    assert model.text.kinds.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(m.weight.any() for name, m in model.named_modules() if name.endswith("score"))


def test_it_learns_what_only_the_three_together_say():
    """The label is (chart high) and (the image's one bright patch) and (a passage, among others, that names both)."""
    sizes: dict[str, Any] = {"vision_dim": 4, "embedding_dim": 0, "text_dim": 4, "clinical_dim": 1, "findings": 1}
    model = MDFNet(MDFNetConfig(dim=32, heads=4, hidden=(32, 16), **sizes, **STILL)).train()
    draw = torch.Generator().manual_seed(0)
    facts = torch.rand(600, 3, generator=draw) < 0.7
    where = torch.randint(0, 9, (600,), generator=draw)
    image, text = 0.2 * torch.randn(600, 9, 4, generator=draw), torch.randn(600, 4, 4, generator=draw)
    image[torch.arange(600), where, 0] += 3 * facts[:, 0]
    text[torch.arange(600), where % 4, 1] += 4 * facts[:, 1]
    x = {
        **{"image": image, "text": text, "text_mask": torch.ones(600, 4), "kinds": torch.full((600, 4), 2)},
        **{"clinical": 2.0 * facts[:, 2:] - 1, "known": torch.ones(600, 1)},
    }
    label = facts.all(1, keepdim=True).float()
    train, test = slice(0, 400), slice(400, 600)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(model(**{k: v[train] for k, v in x.items()}), label[train]).backward()
        optimiser.step()
    with torch.no_grad():
        right = (model.eval()(**{k: v[test] for k, v in x.items()}) > 0) == label[test].bool()
        blind = (model(**{k: x[k][test] for k in WITH["clinical"]}) > 0) == label[test].bool()
    assert right.float().mean() > 0.9 > blind.float().mean()
