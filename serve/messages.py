"""What passes between the gateway and the deployments (dataclasses), and what the gateway takes and gives (pydantic: the OpenAPI).

Between processes a failure of one item is a value, not an exception: a `RowError` in its place, so that it spoils no batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from contracts.config import Config
from contracts.findings import FINDINGS
from contracts.pages import NOT_FOR_DIAGNOSIS

# ---- between processes ----


@dataclass(frozen=True, eq=False)
class Encoded:
    """An uploaded image, encoded. row: as FEATURES holds it; stored: the 518 px JPEG that the encoder saw."""

    row: Mapping[str, Any]
    stored: bytes


@dataclass(frozen=True)
class Question:
    """text, image: at least one. where: SQL over the index's columns, made by the gateway. pictures: a thumbnail of each answer."""

    text: str | None
    image: Encoded | None
    via: Literal["image", "report"] | None
    where: str | None
    k: int
    pictures: bool


# ---- what the gateway takes ----


class SearchFilter(Config):
    """All that is given has to hold."""

    split: list[Literal["train", "validate", "test"]] | None = None
    view: list[str] | None = Field(None, description="such as PA, AP", max_length=16)
    findings: dict[str, Literal[1, 0, -1]] | None = Field(None, description="a finding's label: 1 stated, 0 denied, -1 uncertain")


class SearchRequest(Config):
    text: str | None = Field(None, max_length=4_000, description="what to look for, in words")
    image: str | None = Field(None, description="a JPEG, PNG or DICOM to look for the like of, base64")
    via: Literal["image", "report"] | None = Field(
        None, description="what to compare with; by default words with reports, an image with images"
    )
    filter: SearchFilter | None = None
    k: Annotated[int, Field(ge=1, le=100)] = 10
    pictures: bool = Field(False, description="with a thumbnail of each answer, where the service has the images")


class EmbedRequest(Config):
    texts: list[Annotated[str, Field(max_length=20_000)]] | None = Field(None, max_length=64)
    images: list[str] | None = Field(None, max_length=16, description="base64")


# ---- what it gives ----


class Finding(BaseModel):
    name: str = Field(examples=["Edema"])
    probability: float = Field(ge=0, le=1, examples=[0.31], description="calibrated on the validate split, where the model is")
    threshold: float = Field(ge=0, le=1, examples=[0.27], description="fitted on the validate split")
    positive: bool = Field(examples=[True], description="probability >= threshold")


class SegmentRead(BaseModel):
    """A sentence group of the note that was made of the chart. share: of the image's attention over all that it could read."""

    name: str = Field(examples=["vitals"])
    text: str
    share: float


class PassageRead(BaseModel):
    """A passage of the knowledge base that the note fetched."""

    id: str
    topic: str | None = None
    text: str
    source: str | None = None
    score: float = Field(description="how well it fits the segment that asked, in [0, 1]")
    asked_by: str = Field(description="the segment's name")
    share: float


class Evidence(BaseModel):
    note: list[SegmentRead]
    passages: list[PassageRead]


class Classified(BaseModel):
    model: str = Field(examples=["fusion"])
    calibrated: bool
    findings: list[Finding]
    images: int = Field(description="how many images the study has; their probabilities are averaged")
    read: list[Literal["image", "chart"]] = Field(description="what of the study the network was shown")
    evidence: Evidence | None = Field(None, description="where asked for, and a chart was given")
    overlays: list[str | None] | None = Field(
        None, description="where asked for: of each image a PNG, base64, with the text's attention drawn over it"
    )
    pictures: list[str | None] | None = Field(None, description="with the overlays: each image as the network saw it, a JPEG, base64")
    notice: str = NOT_FOR_DIAGNOSIS


class Match(BaseModel):
    study_id: str
    split: str
    view: str
    score: float
    labels: dict[str, int] = Field(description="of the findings that are mentioned: 1 stated, 0 denied, -1 uncertain")
    impression: str | None
    picture: str | None = Field(None, description="JPEG, base64")


class Found(BaseModel):
    matches: list[Match]
    notice: str = NOT_FOR_DIAGNOSIS


class Embedded(BaseModel):
    texts: list[list[float]] | None = None
    images: list[list[float]] | None = None
    text_encoder: str | None = None
    image_encoder: str | None = None


class Loaded(BaseModel):
    """A model that answers. metrics: as `cxray evaluate` or training left them. card: its README, in Markdown."""

    name: str = Field(examples=["fusion"])
    task: str
    route: str = Field(examples=["/v1/classify"])
    fingerprint: str
    data: dict[str, Any]
    metrics: dict[str, Any]
    findings: list[str] = list(FINDINGS)
    card: str | None = None


class Models(BaseModel):
    models: list[Loaded]
    notice: str = NOT_FOR_DIAGNOSIS


class ExampleHead(BaseModel):
    id: str
    title: str = Field(description="view, and who the patient is by the chart")


class Examples(BaseModel):
    examples: list[ExampleHead]


class Example(ExampleHead):
    """A study of the test split that the service was told to show. The report and the labels are the truth, and no input."""

    images: list[str] = Field(description="JPEG, base64")
    chart: dict[str, Any] | None
    report: str | None
    labels: dict[str, int]


class ProblemDetails(BaseModel):
    """RFC 9457."""

    type: str = Field("about:blank", examples=["urn:cxray:unreadable-image"])
    title: str
    status: int
    detail: str | None = None
    instance: str | None = Field(None, description="urn of the request's id")
