"""The images of a study, its chart, or both -> probabilities of the findings."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from contracts.chart import Chart
from contracts.errors import RowError
from serve import uploads
from serve.messages import Classified
from serve.problems import Problem, documented, of_row
from serve.routes import answer, backends, limits, schema_of, takes
from serve.security import admitted

router = APIRouter(tags=["classify"])

_CHART = {"age": 67, "sex": "F", "chief_complaint": "Dyspnea", "acuity": 2, "triage": {"hours": -2.5, "heartrate": 104, "o2sat": 91}}
_BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {
            "image": {
                "type": "array",
                "items": _BINARY,
                "description": "the study's images: JPEG, PNG or DICOM; by their bytes, not their names",
            },
            "chart": schema_of(Chart),
        },
        "additionalProperties": False,
    },
    "encoding": {"chart": {"contentType": "application/json"}},
    "example": {"chart": _CHART},
}
_JSON = {"schema": schema_of(Chart), "example": _CHART}
_SAID = {
    "model": "fusion",
    "calibrated": True,
    "findings": [{"name": "Edema", "probability": 0.31, "threshold": 0.27, "positive": True}],
    "images": 1,
    "read": ["image", "chart"],
    "evidence": None,
    "overlays": None,
    "notice": "For research, not for diagnosis.",
}


@router.post(
    "/v1/classify",
    summary="Findings of a study",
    response_model=Classified,
    responses={200: {"content": {"application/json": {"example": _SAID}}}} | documented(401, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=takes({"multipart/form-data": _FORM, "application/json": _JSON} | {kind: {"schema": _BINARY} for kind in uploads.IMAGES}),
    dependencies=[Depends(admitted)],
)
async def classify(
    request: Request,
    evidence: Annotated[bool, Query(description="with the note and the passages that the network read, and each one's share")] = False,
    overlay: Annotated[bool, Query(description="with a picture of where the network looked, of each image")] = False,
    knowledge: Annotated[bool, Query(description="false: passages of the knowledge base are left out")] = True,
) -> Response:
    """Send `multipart/form-data` with `image` (one or more files), `chart` (JSON), or both; or one image, or one chart, as the body.

    A value of the chart that is out of its plausible range counts as missing.
    """
    models = backends(request)
    if "fusion" not in models:
        await models.ask("fusion", "classify")  # says what is loaded, before a body is read
    study = await uploads.study(request, limits(request))
    if not study.images and study.chart is None:
        raise Problem(422, "nothing_to_read", "send an image, a chart, or both")
    encoded = await models.images(study.images)
    said = await models.ask("fusion", "classify", encoded, study.chart, evidence, overlay, knowledge)
    if isinstance(said, RowError):
        raise of_row(said, "the study")
    return answer(said)
