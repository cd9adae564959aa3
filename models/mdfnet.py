"""MDFNet, the multi-modal deep fusion network: an image, a note with its evidence, and a chart -> one logit a finding.

Tokens of the image, segments of the text and one clinical vector are brought to one width. Image tokens and segments first
read the chart, then each other (multi-head attention, residual, layer norm: Vaswani et al. 2017, arXiv:1706.03762); the
head sees vision, text and chart as they came, and both as they were after reading.

Any modality may be absent, sample by sample. What came in its place is set to zero at the door, a learned vector stands for it,
and nobody reads it: its content cannot reach the output. Everything is computed for every sample all the same, so that
every parameter has a gradient on every rank, whatever a batch lacks.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from contracts.config import Config
from contracts.findings import FINDINGS

MODALITIES = ("image", "text", "clinical")  # the columns of a presence mask
KINDS = ("raw", "note", "passage")  # what a segment is; its id is the place here


class MDFNetConfig(Config):
    vision_dim: int = Field(default=768, ge=1, description="of an image token")
    embedding_dim: int = Field(default=0, ge=0, description="of the whole image's embedding, one more token; 0: none")
    text_dim: int = Field(default=384, ge=1, description="of a segment's embedding")
    clinical_dim: int = Field(default=45, ge=1, description="clinical features")
    dim: int = Field(default=256, ge=1, description="the width that all modalities are brought to")
    heads: int = Field(default=8, ge=1)
    hidden: tuple[int, int] = (512, 256)
    findings: int = Field(default=len(FINDINGS), ge=1)
    dropout_first: float = Field(default=0.3, ge=0, lt=1, description="after the head's first layer")
    dropout_second: float = Field(default=0.2, ge=0, lt=1, description="after its second")
    dropout_clinical: float = Field(default=0.3, ge=0, lt=1)
    dropout_attention: float = Field(default=0.1, ge=0, lt=1, description="of what attention adds")
    # How often training hides a modality from a sample that has another one: so that one network also serves the image alone.
    drop_image: float = Field(default=0.1, ge=0, lt=1)
    drop_text: float = Field(default=0.3, ge=0, lt=1)
    drop_clinical: float = Field(default=0.3, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> "MDFNetConfig":
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} cannot be shared out among {self.heads} heads")
        if min(self.hidden) < 1:
            raise ValueError(f"hidden {list(self.hidden)}: a layer has at least one unit")
        return self


class MDFNet(nn.Module):
    def __init__(self, config: MDFNetConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.hidden
        self.vision = Vision(config)
        self.text = Text(config)
        self.clinical = Clinical(config)
        self.attention = Reading(config)
        self.head = nn.Sequential(
            *(nn.Linear(5 * config.dim, first), BatchNorm(first), nn.ReLU(), nn.Dropout(config.dropout_first)),
            *(nn.Linear(first, second), BatchNorm(second), nn.ReLU(), nn.Dropout(config.dropout_second)),
            nn.Linear(second, config.findings),
        )

    def forward(
        self,
        *,
        image: Tensor | None = None,
        embedding: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        kinds: Tensor | None = None,
        clinical: Tensor | None = None,
        known: Tensor | None = None,
        presence: Tensor | None = None,
        attention: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """-> logits float32 [B, findings].

        image: float [B, N, vision_dim], the patches; embedding: float [B, embedding_dim], with it where the config has one. Of an
        encoder without patches, the embedding is given as `image` with N = 1.
        text: float [B, S, text_dim]; text_mask: bool [B, S], False is padding; kinds: int [B, S], places in KINDS.
        clinical: float [B, clinical_dim], scaled; known: bool [B, clinical_dim], False where the value is missing.
        presence: bool [B, 3], in the order of MODALITIES; without it, what is given is present. A text without a segment, and a
        chart without one known value, are absent whatever it says.

        attention: return a dict instead, with `logits`, `segments` float [B, S] (how the image spreads its attention over
        the segments) and `patches` float [B, N] (how the text does over the patches): means over heads, and over the
        asking tokens as they are weighted when pooled. They sum to 1 over what is present, and are 0 where nothing is.
        Where the one that asks is absent, the vector that stands for it asks: an image alone has its `patches` too.

        Raises ValueError if no modality is given, or one without what belongs to it.
        """
        parts = (image, text, clinical)
        rows = next((x for x in parts if x is not None), None)
        if rows is None:
            raise ValueError("MDFNet needs an image, a text or a chart")
        wanting = {
            "embedding": image is not None and embedding is None and self.config.embedding_dim > 0,
            "text_mask and kinds": text is not None and (text_mask is None or kinds is None),
            "known": clinical is not None and known is None,
        }
        if any(wanting.values()):
            raise ValueError(f"MDFNet was given a modality without its {', '.join(k for k, v in wanting.items() if v)}")

        batch, cfg = len(rows), self.config
        patches, segments = (0 if x is None else x.shape[1] for x in (image, text))
        empty = rows.new_zeros
        if image is None or not patches:
            image, embedding = empty(batch, 1, cfg.vision_dim), empty(batch, cfg.embedding_dim)
        if text is None or text_mask is None or kinds is None or not segments:
            text, text_mask, kinds = empty(batch, 1, cfg.text_dim), empty(batch, 1), empty(batch, 1)
        if clinical is None or known is None:
            clinical = known = empty(batch, cfg.clinical_dim)
        text_mask, known = text_mask.bool(), known.bool()
        present = torch.stack([torch.full_like(known[:, 0], patches > 0), text_mask.any(1), known.any(1)], dim=1)
        if presence is not None:
            present = present & presence.bool()
        if self.training:
            present = drop(present, (cfg.drop_image, cfg.drop_text, cfg.drop_clinical))

        vision = self.vision(image, embedding, present[:, 0])
        words = self.text(text, kinds, text_mask, present[:, 1])
        chart = self.clinical(clinical, known, present[:, 2])
        fused, over_segments, over_patches = self.attention(vision, words, chart, text_mask, present, image.shape[1])
        logits = self.head(fused).float()
        if not attention:
            return logits
        return {"logits": logits, "segments": over_segments[:, :segments], "patches": over_patches[:, :patches]}


class Vision(nn.Module):
    """float [B, N, vision_dim] (and float [B, embedding_dim]) -> [B, N (+ 1), dim]: the patches first, then the embedding."""

    def __init__(self, config: MDFNetConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.vision_dim, config.dim)
        self.embed = nn.Linear(config.embedding_dim, config.dim) if config.embedding_dim else None
        self.norm = nn.LayerNorm(config.dim)
        self.absent = absent(config.dim)

    def forward(self, tokens: Tensor, embedding: Tensor | None, present: Tensor) -> Tensor:
        here = present[:, None, None]
        states = self.project(cleared(tokens, here, self.absent.dtype))
        if self.embed is not None and embedding is not None:
            whole = self.embed(cleared(embedding, present[:, None], self.absent.dtype))
            states = torch.cat([states, whole[:, None]], dim=1)
        return torch.where(here, self.norm(states), self.absent)


class Text(nn.Module):
    """float [B, S, text_dim], kinds int [B, S] -> [B, S, dim]."""

    def __init__(self, config: MDFNetConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.text_dim, config.dim)
        self.kinds = KindEmbedding(len(KINDS), config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.absent = absent(config.dim)

    def forward(self, segments: Tensor, kinds: Tensor, mask: Tensor, present: Tensor) -> Tensor:
        here = mask & present[:, None]
        kinds = torch.where(here, kinds, 0).long()  # padding may have any number
        states = self.project(cleared(segments, here[..., None], self.absent.dtype)) + self.kinds(kinds)
        return torch.where(present[:, None, None], self.norm(states), self.absent)


class Clinical(nn.Module):
    """float [B, clinical_dim] and known bool [B, clinical_dim] -> [B, dim].

    Value and mask both enter, so that a missing value is not the mean. An absent chart goes through batch norm as one where nothing is
    known: its content counts for nothing, and a batch may lack every chart.
    """

    def __init__(self, config: MDFNetConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(2 * config.clinical_dim, config.dim)
        self.rest = nn.Sequential(BatchNorm(config.dim), nn.ReLU(), nn.Dropout(config.dropout_clinical))
        self.absent = absent(config.dim)

    def forward(self, values: Tensor, known: Tensor, present: Tensor) -> Tensor:
        known = known & present[:, None]
        values = cleared(values, known, self.absent.dtype)
        states = self.rest(self.dense(torch.cat([values, known.to(values.dtype)], dim=1)))
        return torch.where(present[:, None], states, self.absent)


class Reading(nn.Module):
    """Vision and text over the chart, then over each other -> [B, 5 * dim] for the head, and what was looked at."""

    def __init__(self, config: MDFNetConfig) -> None:
        super().__init__()
        self.vision_over_clinical = CrossAttention(config, may_pass=True)
        self.text_over_clinical = CrossAttention(config, may_pass=True)
        self.vision_over_text = CrossAttention(config)
        self.text_over_vision = CrossAttention(config)
        self.pool_vision, self.pool_text = Pool(config.dim), Pool(config.dim)
        self.pool_vision_after, self.pool_text_after = Pool(config.dim), Pool(config.dim)

    def forward(
        self, vision: Tensor, text: Tensor, clinical: Tensor, text_mask: Tensor, present: Tensor, patches: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """vision [B, N (+ 1), dim], text [B, S, dim], clinical [B, dim] -> fused, weights [B, S] and [B, N].

        The embedding of the whole image asks and is pooled, but is not read: it has no place on the image.
        """
        image_here, text_here, chart_here = present[:, :1], present[:, 1:2], present[:, 2:]
        segments = text_mask & text_here
        # Of an absent text every place holds the same learned vector: their mean is that vector.
        any_token, any_segment = torch.ones_like(vision[..., 0], dtype=torch.bool), text_mask | ~text_here
        first_vision, _ = self.pool_vision(vision, any_token)
        first_text, _ = self.pool_text(text, any_segment)

        vision, _ = self.vision_over_clinical(vision, clinical[:, None], chart_here)
        text, _ = self.text_over_clinical(text, clinical[:, None], chart_here)
        vision_after, on_segments = self.vision_over_text(vision, text, segments)
        text_after, on_patches = self.text_over_vision(text, vision[:, :patches], image_here.expand(-1, patches))

        last_vision, asked_vision = self.pool_vision_after(vision_after, any_token)
        last_text, asked_text = self.pool_text_after(text_after, any_segment)
        fused = torch.cat([first_vision, first_text, clinical, last_vision, last_text], dim=1)
        over_segments = (asked_vision[:, None] @ on_segments)[:, 0]
        over_patches = (asked_text[:, None] @ on_patches)[:, 0]
        return fused, over_segments, over_patches


class CrossAttention(nn.Module):
    """Multi-head attention of one modality over another, with residual and layer norm.

    may_pass: a query may also read nothing. Over a single key a softmax is 1 whatever is asked; with this it is a gate (as
    `add_zero_attn` of torch.nn.MultiheadAttention).
    """

    def __init__(self, config: MDFNetConfig, may_pass: bool = False) -> None:
        super().__init__()
        self.heads, self.may_pass = config.heads, may_pass
        self.query, self.key, self.value, self.out = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.dropout, self.norm = nn.Dropout(config.dropout_attention), nn.LayerNorm(config.dim)

    def forward(self, asking: Tensor, read: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """asking [B, Q, dim], read [B, K, dim], keep bool [B, K] -> [B, Q, dim] and weights float32 [B, Q, K] (means over heads).

        The weights are the ones used: dropout falls on what attention adds, not on them.
        """
        query, key, value = (split(x, self.heads) for x in (self.query(asking), self.key(read), self.value(read)))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = masked_softmax(scores, keep[:, None, None], self.may_pass)
        added = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return self.norm(asking + self.dropout(self.out(added))), weights.mean(1)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm in the precision of its running statistics: DeepSpeed's bf16 casts the weights and leaves those in float32."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        assert mean is not None and self.momentum is not None
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        done = F.batch_norm(input.to(mean.dtype), mean, var, weight, bias, self.training, self.momentum, self.eps)
        return done.to(self.weight.dtype)


# Layers that begin otherwise than PyTorch's do so in `reset_parameters`, which their constructor calls: under ZeRO-3 a layer's weights are
# cut up as soon as it stands, and what sets them afterwards sets nothing. (What PyTorch draws is drawn all the same, so that the layers
# made after it begin with one seed as they always did.)


class KindEmbedding(nn.Embedding):
    """No louder at first than a segment's own vector, which is of unit length before it is projected."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.02)


class EvenScore(nn.Linear):
    """The same score for every token at first."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class Pool(nn.Module):
    """A mean whose weights are learned, one score a token; the plain mean at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = EvenScore(dim, 1, bias=False)

    def forward(self, tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, N, dim], keep bool [B, N] -> [B, dim] and weights float32 [B, N]."""
        weights = masked_softmax(self.score(tokens)[..., 0], keep)
        return (weights.to(tokens.dtype)[:, None] @ tokens)[:, 0], weights


def masked_softmax(scores: Tensor, keep: Tensor, may_pass: bool = False) -> Tensor:
    """Softmax in float32 over the last axis of `scores`, over what `keep` (bool, broadcast) leaves; zeros where it leaves nothing.

    may_pass: one more score of 0 takes its share, which is not returned.
    """
    scores = scores.float().masked_fill(~keep, torch.finfo(torch.float32).min)
    if may_pass:
        return F.pad(scores, (0, 1)).softmax(-1)[..., :-1] * keep
    return scores.softmax(-1) * keep


def cleared(x: Tensor, here: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the precision of the weights, with zeros where `here` is False, over NaN too. No gradient flows to what was cleared."""
    return torch.where(here, x, 0.0).to(dtype)


def absent(dim: int) -> nn.Parameter:
    """The learned vector that stands for a modality that is not there."""
    return nn.Parameter(0.02 * torch.randn(dim))


def drop(present: Tensor, rates: tuple[float, ...]) -> Tensor:
    """present bool [B, M] -> the same with each modality hidden at its rate; a sample that would lose all keeps all."""
    stays = torch.stack([torch.rand(len(present), device=present.device) >= rate for rate in rates], dim=1)
    left = present & stays
    return torch.where(left.any(1, keepdim=True), left, present)


def split(x: Tensor, heads: int) -> Tensor:
    """[B, N, dim] -> [B, heads, N, dim / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def components(model: MDFNet) -> dict[str, nn.Module]:
    """What it is made of, in the order of the data's way; every parameter is in one of them."""
    return {
        "vision projection": model.vision,
        "text projection": model.text,
        "clinical": model.clinical,
        "attention": model.attention,
        "head": model.head,
    }
